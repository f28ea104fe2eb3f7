"""The two frontends are the same program: as text, as dataflow, and in bits."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import core.layers
import core.vocabulary
import equinox_impl.attention
import equinox_impl.blocks
import equinox_impl.layers
import equinox_impl.stacks
import equinox_impl.training
import equinox_impl.transformer
import nnx_impl
from core.cache import as_slots
from core.config import TransformerConfig
from core.constraints import Constraints
from core.identity import dataflow_difference, program_text
from core.sampling import Sampling
from tests.frontends import (
    CONFIG,
    FRONTENDS,
    logits,
    optimizer,
    random_batch,
    random_examples,
    random_weights,
    same_bits,
)
from tests.strategies import COVERING_ROWS, configs, seeds

batches = st.sampled_from([(2,), (), (2, 1)])
blockwise = configs(attention_implementation="blockwise", dropout_rate=0.25, num_encoder_layers=1, num_decoder_layers=1)


def few(examples):
    """As many examples, and more by night; each traces whole models, so one that fails is reported, not shrunk."""
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    return settings(phases=phases, max_examples=max(examples, settings.default.max_examples // 20))


def forward(package, config, kind="Transformer"):
    return lambda weights, batch: logits(package, config, weights, batch, model_class=kind)


def forward_with_dropout(package, config, kind="Transformer"):
    return lambda weights, batch: logits(package, config, weights, batch, key=jax.random.key(1), model_class=kind)


def gradient(package, config, kind="Transformer"):
    def loss(weights, batch):
        model = package.from_weights(config, weights, model_class=getattr(package, kind))
        return package.loss_fn(package.evaluation(model), batch)[0]

    return jax.grad(loss)


def gradient_with_dropout(package, config, kind="Transformer"):
    def loss(weights, batch):
        model = package.from_weights(config, weights, model_class=getattr(package, kind))
        return package.loss_fn(model, batch, jax.random.key(1), label_smoothing=0.1)[0]

    return jax.grad(loss)


def decode_step(package, config):
    def step(weights, batch):
        model = package.evaluation(package.from_weights(config, weights))
        tokens, cache = model.start(batch.source, source_mask=batch.source_mask, max_length=6)
        _, cache = model.decode_step(tokens[..., None], cache)
        return model.decode_step(batch.inputs[..., :2], cache)

    return step


def generation(package, config):
    def generate(weights, batch):
        model = package.evaluation(package.from_weights(config, weights))
        return package.generate(model, batch.source, source_mask=batch.source_mask, max_length=6)

    return generate


CLASSIFIER_PROGRAMS = [forward, gradient, forward_with_dropout, gradient_with_dropout]
PROGRAMS = [*CLASSIFIER_PROGRAMS, decode_step]


def packed(package, config):
    """Of the encoder-decoder: two pairs in one row, and every attention's weights."""

    def run(weights, batch):
        model = package.evaluation(package.from_weights(config, weights))
        ids = {"source_segments": (batch.source > 4).astype(int), "target_segments": (batch.inputs > 4).astype(int)}
        masks = {"source_mask": batch.source_mask, "target_mask": batch.target_mask}
        return model(batch.source, batch.inputs, **ids), model.run(
            batch.source, batch.inputs, return_weights=True, **ids, **masks
        )

    return run


def inference(package, config):
    """Logits under masks, the weights of attention to packed pairs, and a step with a cache, in one program."""

    def run(weights, batch):
        model = package.evaluation(package.from_weights(config, weights))
        source, inputs = batch.source, batch.inputs
        masks = {"source_mask": batch.source_mask, "target_mask": batch.target_mask}
        ids = {"source_segments": (source > 4).astype(int), "target_segments": (inputs > 4).astype(int)}
        tokens, cache = model.start(source, source_mask=batch.source_mask, max_length=6)
        return (
            model(source, inputs, **masks),
            model.run(source, inputs, return_weights=True, **masks, **ids),
            model.decode_step(tokens[..., None], cache),
        )

    return run


def texts(program, config, weights, batch, **kind):
    return [program_text(program(package, config, **kind), weights, batch) for package in FRONTENDS.values()]


def train_step_difference(config, weights, batch, kind="Transformer", **options):
    steps = []
    with jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
        for package in FRONTENDS.values():
            options["model_class"] = getattr(package, kind)
            model = package.from_weights(config, weights, model_class=options["model_class"])
            state = package.Trainer(model, optimizer()).optimizer_state()
            step = package.functional_step(config, optimizer(), label_smoothing=0.1, **options)
            steps.append(jax.make_jaxpr(step)(weights, state, batch, jax.random.key(2), jnp.uint32(3)))
    return dataflow_difference(*steps)


def kind_of_positions(row):
    return f"{row['positions']} {row['rotary_scaling']}" if row["positions"] == "rotary" else row["positions"]


@pytest.mark.parametrize("row", COVERING_ROWS, ids=kind_of_positions)
def test_every_value_of_every_option_lowers_to_the_same_text(row):
    with jax.enable_x64("float64" in (row["dtype"], row["param_dtype"])):
        config = TransformerConfig(**row)
        weights, data = random_weights(config, 0), random_batch(config, 0)
        for program in (inference, gradient_with_dropout):
            first, second = texts(program, config, weights, data)
            assert first == second, f"{program.__name__} of {config} differs"


@given(config=configs(), batch=batches, seed=seeds)
@few(6)
def test_both_frontends_lower_to_the_same_text(config, batch, seed):
    weights, data = random_weights(config, 0), random_batch(config, seed, batch=batch)
    for program in PROGRAMS:
        first, second = texts(program, config, weights, data)
        assert first == second, f"{program.__name__} of {config} differs"


@given(config=blockwise, batch=batches, seed=seeds)
@few(2)
def test_blockwise_models_lower_to_the_same_text(config, batch, seed):
    weights, data = random_weights(config, 0), random_batch(config, seed, batch=batch)
    for program in (decode_step, gradient_with_dropout):
        first, second = texts(program, config, weights, data)
        assert first == second, f"{program.__name__} of {config} differs"
    assert train_step_difference(config, weights, data) is None, config


@given(config=configs(dropout_rate=0.25), seed=seeds)
@few(4)
def test_both_train_steps_are_the_same_dataflow(config, seed):
    assert train_step_difference(config, random_weights(config, 0), random_batch(config, seed)) is None, config


def one_stack(package, config, name):
    """Logits of a model that has no other stack, the weights of attention to what is packed, and logits in training."""

    def run(weights, batch):
        model = package.from_weights(config, weights, model_class=getattr(package, name))
        side, given = ("target", batch.inputs) if name == "DecoderOnlyTransformer" else ("source", batch.source)
        mask = {f"{side}_mask": getattr(batch, f"{side}_mask")}
        packed = {} if name == "Classifier" else {f"{side}_segments": (given > 4).astype(int)}
        randomness = {"rngs" if package is nnx_impl else "key": jax.random.key(3)}
        evaluated = package.evaluation(model)
        return (
            evaluated(given, **mask),
            evaluated.run(given, return_weights=True, **mask, **packed),
            model(given, **mask, **randomness),
        )

    return run


@pytest.mark.parametrize("name", ["EncoderOnlyTransformer", "DecoderOnlyTransformer", "Classifier"])
@given(config=configs(dropout_rate=0.25), batch=batches, seed=seeds)
@few(4)
def test_models_of_one_stack_lower_to_the_same_text(name, config, batch, seed):
    draw = random_examples if name == "Classifier" else random_batch
    weights, data = random_weights(config, 0, model_class=name), draw(config, seed, batch=batch)
    found = [program_text(one_stack(package, config, name), weights, data) for package in FRONTENDS.values()]
    assert found[0] == found[1], config


@given(config=configs(dropout_rate=0.25), batch=batches, seed=seeds)
@few(4)
def test_classifiers_lower_to_the_same_text(config, batch, seed):
    """And in tree mode to the same once more."""
    weights, data = random_weights(config, 0, model_class="Classifier"), random_examples(config, seed, batch=batch)
    for program in CLASSIFIER_PROGRAMS:
        first, second = texts(program, config, weights, data, kind="Classifier")
        assert first == second, f"{program.__name__} of {config} differs"
        with nnx_mode(graph=False):
            assert program_text(program(nnx_impl, config, "Classifier"), weights, data) == first, config


@given(config=configs(dropout_rate=0.25), seed=seeds, accumulate=st.booleans())
@few(3)
def test_train_steps_of_classifiers_are_the_same_dataflow(config, seed, accumulate):
    weights = random_weights(config, 0, model_class="Classifier")
    data = random_examples(config, seed, batch=(3, 2) if accumulate else (2,))
    assert train_step_difference(config, weights, data, "Classifier", accumulate=accumulate) is None, config


def biased(package, config):
    """Attention with an additive bias: to itself, to a memory, and to one that lies in slots."""

    def run(weights, batch):
        model = package.evaluation(package.from_weights(config, weights))
        block, x = model.decoder.blocks[0], model.embed_target(batch.inputs)
        memory = model.encode(batch.source, source_mask=batch.source_mask)
        bias = jnp.where(batch.source_mask, batch.source.astype("float32"), -jnp.inf)[..., None, None, :]
        itself = jnp.where(batch.target_mask, batch.inputs.astype("float32"), -jnp.inf)[..., None, None, :]
        slots = as_slots(block.cross_attention.keys_values(memory))
        return (
            block.attention(x, bias=itself, causal=True),
            block.cross_attention(x, memory, bias=bias),
            block.cross_attention(x[..., :1, :], slots, bias=bias),
            block.cross_attention(x, memory),
        )

    return run


@given(batches, seeds)
@few(3)
def test_attention_with_a_bias_lowers_to_the_same_text_and_heeds_it(batch, seed):
    weights, data = random_weights(CONFIG, 0), random_batch(CONFIG, seed, batch=batch)
    first, second = texts(biased, CONFIG, weights, data)
    assert first == second
    _, added, stepped, without = jax.jit(biased(FRONTENDS["nnx"], CONFIG))(weights, data)
    np.testing.assert_allclose(added[..., :1, :], stepped, rtol=0, atol=2e-6)
    assert not np.array_equal(added, without)


def test_losses_in_chunks_lower_to_the_same_text(monkeypatch):
    monkeypatch.setattr(core.vocabulary, "_HELD", 1)
    weights, data = random_weights(CONFIG, 0), random_batch(CONFIG, 0)
    first, second = texts(gradient_with_dropout, CONFIG, weights, data)
    assert first == second
    assert train_step_difference(CONFIG, weights, data) is None
    monkeypatch.undo()
    assert texts(gradient_with_dropout, CONFIG, weights, data)[0] != first


def continued(package, config):
    """Two segments and the history between them, the decoder-only model."""

    def run(weights, batch):
        model = package.evaluation(package.from_weights(config, weights, model_class=package.DecoderOnlyTransformer))
        first, extras = model.run(batch.inputs, return_weights=True)
        return first, model.run(batch.labels, history=extras["decoder.history"])

    return run


def prefixed(package, config):
    """A prefix language model, whole and cached."""

    def run(weights, batch):
        model = package.evaluation(package.from_weights(config, weights, model_class=package.DecoderOnlyTransformer))
        tokens, cache = model.start(batch.inputs, prefix=True, max_length=3)
        return model(batch.inputs, prefix=2), model.decode_step(tokens[..., None], cache)

    return run


@given(config=configs(), batch=batches, seed=seeds)
@few(3)
def test_packed_continued_and_prefixed_models_lower_to_the_same_text(config, batch, seed):
    data = random_batch(config, seed, batch=batch)
    kinds = [(packed, "Transformer", config), (prefixed, "DecoderOnlyTransformer", config)]
    if config.positions not in ("sinusoidal", "learned"):
        kinds.append((continued, "DecoderOnlyTransformer", config.replace(history_length=3)))
    for program, name, its_config in kinds:
        weights = random_weights(its_config, 0, model_class=name)
        first, second = texts(program, its_config, weights, data)
        assert first == second, f"{program.__name__} of {its_config} differs"


def decoded(package, config, name):
    """Every way of decoding, and scoring."""
    rules = Constraints(repetition_penalty=1.2, no_repeat_ngram=2, min_length=1, banned=(3,))
    randomness = "rngs" if package is nnx_impl else "key"

    def run(weights, batch):
        model = package.from_weights(config, weights, model_class=getattr(package, name))
        common = {"max_length": 4, "constraints": rules, "forced": jnp.asarray([-1, 4], jnp.int32)}
        own = {} if name == "Transformer" else {"prefill_chunk": 2}
        drawn = {"sampling": Sampling(0.7, 5, 0.9, 0.01), randomness: jax.random.key(2)}
        return (
            package.generate(model, batch.source, **common, **own),
            package.generate(model, batch.source, **common, **own, **drawn),
            package.beam_search(model, batch.source, **common, **own, beam_size=3, n_best=2),
            package.score(model, batch.source, batch.labels, target_mask=batch.target_mask, **own),
        )

    return run


@pytest.mark.parametrize("name", ["Transformer", "DecoderOnlyTransformer"])
@given(config=configs(), batch=batches, seed=seeds)
@few(3)
def test_every_way_of_decoding_lowers_to_the_same_text(name, config, batch, seed):
    weights, data = random_weights(config, 0, model_class=name), random_batch(config, seed, batch=batch)
    found = [program_text(decoded(package, config, name), weights, data) for package in FRONTENDS.values()]
    assert found[0] == found[1], config


def test_accumulated_and_rematerialised_train_steps_are_the_same_dataflow():
    config = CONFIG.replace(remat=True)
    data = jax.tree.map(lambda *x: jnp.stack(x), *(random_batch(config, seed) for seed in range(2)))
    weights = random_weights(config, 0)
    assert train_step_difference(config, weights, data, accumulate=True) is None
    assert train_step_difference(config, weights, jax.tree.map(lambda x: x[0], data)) is None


@given(config=configs(), batch=batches, seed=seeds)
@few(2)
def test_outputs_gradients_and_generated_tokens_are_equal_in_bits(config, batch, seed):
    weights, data = random_weights(config, seed), random_batch(config, seed, batch=batch)
    for program in (forward_with_dropout, gradient, generation):
        first, second = (jax.jit(program(package, config))(weights, data) for package in FRONTENDS.values())
        assert same_bits(first, second), f"{program.__name__} of {config} differs"


KINDS = ["Transformer", "EncoderOnlyTransformer", "DecoderOnlyTransformer", "Classifier"]


@pytest.mark.parametrize("kind", KINDS)
@given(config=configs(), seed=st.integers(0, 2**31))
@few(3)
def test_one_seed_initialises_the_same_bits(kind, config, seed):
    models = [
        package.init_transformer(config, seed=seed, model_class=getattr(package, kind))
        for package in FRONTENDS.values()
    ]
    assert [type(model).__name__ for model in models] == [kind] * 2
    first, second = (package.to_weights(model) for package, model in zip(FRONTENDS.values(), models, strict=True))
    assert list(first) == list(second)
    assert same_bits(first, second)


@pytest.mark.parametrize("kind", KINDS)
@given(config=configs(), seed=seeds)
@few(3)
def test_weights_go_from_each_frontend_to_the_other_and_back(kind, config, seed):
    weights = random_weights(config, seed, model_class=kind)
    for order in (list(FRONTENDS.values()), list(FRONTENDS.values())[::-1]):
        passed = weights
        for package in order:
            passed = package.to_weights(package.from_weights(config, passed, model_class=getattr(package, kind)))
        assert list(passed) == list(weights)
        assert same_bits(passed, weights)


@given(graph=st.booleans(), config=configs(dropout_rate=0.25, attention_dropout_rate=0.1))
@few(3)
def test_twenty_training_steps_are_equal_in_bits(graph, config):
    weights = random_weights(config, 0)
    trainers = {}
    with nnx_mode(graph=graph), jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
        for name, package in FRONTENDS.items():
            model = package.from_weights(config, {key: jnp.copy(value) for key, value in weights.items()})
            trainers[name] = package.Trainer(model, optimizer(), seed=7, label_smoothing=0.1)
        for step in range(20):
            data = random_batch(config, step)
            first, second = (trainer.train(data) for trainer in trainers.values())
            assert same_bits(first, second), f"step {step} of {config}: {first} and {second}"
        states = [trainer.optimizer_state() for trainer in trainers.values()]
        after = [package.to_weights(trainers[name].model) for name, package in FRONTENDS.items()]
        evaluated = [trainer.evaluate(data) for trainer in trainers.values()]
    assert same_bits(*after)
    assert list(states[0]) == list(states[1])
    assert same_bits(*states)
    assert same_bits(*evaluated)
    assert not same_bits(weights, after[0])


@given(config=configs(dropout_rate=0.25), seed=seeds)
@few(2)
def test_classifiers_train_in_equal_bits(config, seed):
    weights, trainers = random_weights(config, seed, model_class="Classifier"), []
    with jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
        for package in FRONTENDS.values():
            model = package.from_weights(config, weights, model_class=package.Classifier)
            trainers.append(package.Trainer(model, optimizer(), seed=7, label_smoothing=0.1))
        for step in range(5):
            data = random_examples(config, step)
            assert same_bits(*(trainer.train(data) for trainer in trainers)), f"step {step} of {config}"
        assert same_bits(*(trainer.evaluate(data) for trainer in trainers))
    first, second = (p.to_weights(trainer.model) for p, trainer in zip(FRONTENDS.values(), trainers, strict=True))
    assert same_bits(first, second)
    assert not same_bits(first, weights)


@given(config=configs(), seed=seeds)
@few(3)
def test_batched_equals_vmapped_in_bits(config, seed):
    weights, data = random_weights(config, seed), random_batch(config, seed, batch=(3,))
    for package in FRONTENDS.values():
        batched = jax.jit(partial(logits, package, config))(weights, data)
        vmapped = jax.jit(jax.vmap(partial(logits, package, config), in_axes=(None, 0)))(weights, data)
        assert same_bits(batched, vmapped), config


@given(config=configs())
@few(3)
def test_graph_mode_and_tree_mode_lower_to_the_same_text(config):
    weights, data, found = random_weights(config, 0), random_batch(config, 0), []
    for graph in (True, False):
        with nnx_mode(graph=graph):
            found.append([program_text(program(nnx_impl, config), weights, data) for program in PROGRAMS])
    assert found[0] == found[1]


@contextlib.contextmanager
def nnx_mode(*, graph: bool):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        yield


# One line changed in one frontend: what it calls, and how the change reads.
CHANGES = {
    "another attention scale": (equinox_impl.attention, "dot_product_attention", {"scale": 0.7}),
    "attention without its mask": (equinox_impl.attention, "dot_product_attention", {"mask": None}),
    "attention with a soft cap": (equinox_impl.attention, "dot_product_attention", {"soft_cap": 3.0}),
    "attention that sees ahead": (equinox_impl.attention, "causal_or_prefix", {"prefix": 2}),
    "another epsilon": (equinox_impl.layers, "layer_norm", {"epsilon": 2e-6}),
    "pre norm for post norm": (equinox_impl.blocks, "residual", {"norm_order": "pre"}),
    "gelu for relu": (equinox_impl.blocks, "feed_forward", {"activation": "gelu"}),
    "the embedding not scaled": (equinox_impl.layers, "embed", {"scale": 1.0}),
    "no positions": (equinox_impl.layers, "add_positions", {"kind": "none"}),
    "no label smoothing": (equinox_impl.training, "projected_metrics", {"label_smoothing": 0.0}),
    "no dropout": (equinox_impl.layers, "dropout_key", {"deterministic": True}),
}
CHANGE_CONFIG = TransformerConfig(
    source_vocab_size=11,
    target_vocab_size=13,
    d_model=8,
    num_heads=2,
    d_ff=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.25,
)


def test_without_a_change_there_is_no_difference():
    weights, data = random_weights(CHANGE_CONFIG, 0), random_batch(CHANGE_CONFIG, 0)
    assert train_step_difference(CHANGE_CONFIG, weights, data) is None
    first, second = texts(gradient_with_dropout, CHANGE_CONFIG, weights, data)
    assert first == second


@pytest.mark.parametrize("change", CHANGES)
def test_one_changed_line_breaks_the_identity(change, monkeypatch):
    module, name, changed = CHANGES[change]
    original = getattr(module, name)

    def with_change(*args, **kwargs):
        return original(*args, **{**kwargs, **changed})

    weights, data = random_weights(CHANGE_CONFIG, 0), random_batch(CHANGE_CONFIG, 0)
    monkeypatch.setattr(module, name, with_change)
    assert train_step_difference(CHANGE_CONFIG, weights, data) is not None
    first, second = texts(gradient_with_dropout, CHANGE_CONFIG, weights, data)
    assert first != second


CLASSIFIER_CHANGES = {
    "the mean of all": (equinox_impl.transformer, "masked_mean", lambda mean: lambda x, real: mean(x)),
    "padding read": (equinox_impl.transformer, "source_vectors", lambda read: lambda x, real, **how: read(x, **how)),
    "attention to padding": (equinox_impl.transformer, "padding", lambda _: lambda real, shape: None),
}


@pytest.mark.parametrize("change", CLASSIFIER_CHANGES)
def test_one_changed_line_of_the_classifier_breaks_the_identity(change, monkeypatch):
    config = CHANGE_CONFIG.replace(source_features=3)
    weights, data = random_weights(config, 0, model_class="Classifier"), random_examples(config, 0)
    module, name, changed = CLASSIFIER_CHANGES[change]
    monkeypatch.setattr(module, name, changed(getattr(module, name)))
    assert train_step_difference(config, weights, data, "Classifier") is not None
    first, second = texts(forward, config, weights, data, kind="Classifier")
    assert first != second


def test_dropout_keys_in_another_order_break_the_identity(monkeypatch):
    original = core.layers.site_keys
    monkeypatch.setattr(equinox_impl.blocks, "site_keys", lambda key, number: original(key, number)[::-1])
    weights, data = random_weights(CHANGE_CONFIG, 0), random_batch(CHANGE_CONFIG, 0)
    first, second = texts(forward_with_dropout, CHANGE_CONFIG, weights, data)
    assert first != second
    assert "constant" in (train_step_difference(CHANGE_CONFIG, weights, data) or "")
