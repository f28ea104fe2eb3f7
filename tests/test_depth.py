"""A scan over layers is the loop: the same numbers, weights, randomness and states, in a program that does not grow."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import core.weights
import equinox_impl
import nnx_impl
from core.identity import program_text
from core.weights import is_stacked, unstacked
from tests.frontends import (
    CONFIG,
    FRONTENDS,
    LEARNED_DISTANCES,
    logits,
    random_batch,
    random_examples,
    random_weights,
    same_bits,
)
from tests.strategies import configs, seeds

every_frontend = pytest.mark.parametrize("package", FRONTENDS.values(), ids=FRONTENDS)
few = partial(settings, phases=[Phase.explicit, Phase.generate])
WIDE = {"dtype": "float64", "param_dtype": "float64"}
KINDS = ["Transformer", "EncoderOnlyTransformer", "DecoderOnlyTransformer", "Classifier"]
DEEP = CONFIG.replace(
    num_encoder_layers=3, num_decoder_layers=2, stochastic_depth_rate=0.5, attention_dropout_rate=0.25
)
deep = configs(num_encoder_layers=2, num_decoder_layers=2, stochastic_depth_rate=0.25)
rematerialised = st.sampled_from([{}, {"remat": True}, {"remat": True, "remat_keeps": "projections"}])


def close(found, wanted, layers=5):
    """Within T3, in float64."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * (layers + 1) * scale)


def both(config, program, *args):
    """The results of a program in a scan and in a loop."""
    return (jax.jit(program(config.replace(scan_layers=scan)))(*args) for scan in (True, False))


def data_for(kind, config, seed):
    """An encoder alone has a label for each token of its source."""
    if kind == "Classifier":
        return random_examples(config, seed)
    return random_batch(config, seed, lengths=(4, 4) if kind == "EncoderOnlyTransformer" else (5, 4))


def loss(package, config, weights, batch, *, kind, key):
    model = package.from_weights(config, weights, model_class=getattr(package, kind))
    return package.loss_fn(model if key is not None else package.evaluation(model), batch, key, label_smoothing=0.1)


@every_frontend
@pytest.mark.parametrize("scan", [False, True])
def test_what_is_computed_again_is_kept_from_merging_with_the_first_time_but_in_a_scan(scan, package):
    config = CONFIG.replace(scan_layers=scan, remat=True)
    weights, batch = random_weights(config, 0), random_batch(config, 0)
    program = str(
        jax.make_jaxpr(lambda key: loss(package, config, weights, batch, kind=KINDS[0], key=key))(jax.random.key(0))
    )
    assert f"prevent_cse={not scan}" in program
    assert f"prevent_cse={scan}" not in program


@given(
    kind=st.sampled_from(KINDS),
    config=deep,
    remat=rematerialised,
    package=st.sampled_from(list(FRONTENDS.values())),
    seed=seeds,
)
@few(max_examples=2)
def test_losses_and_gradients_of_a_scan_are_those_of_the_loop_with_the_same_dropout(kind, config, remat, package, seed):
    with jax.enable_x64(True):
        config = config.replace(tie_embeddings="none", source_vocab_size=13, **WIDE)
        data = data_for(kind, config, seed)
        weights = random_weights(config, seed, model_class=kind)

        def program(config):
            function = partial(loss, package, config, kind=kind, key=jax.random.key(seed))
            return jax.value_and_grad(lambda weights: function(weights, data), has_aux=True)

        (scanned, found), (looped, wanted) = both(config.replace(**remat), program, weights)
    close(found, wanted)
    np.testing.assert_allclose(scanned[0], looped[0], rtol=1e-6)  # the loss is a float32


@given(config=deep, package=st.sampled_from(list(FRONTENDS.values())), seed=seeds)
@few(max_examples=2)
def test_outputs_attention_weights_and_decoding_of_a_scan_are_those_of_the_loop(config, package, seed):
    with jax.enable_x64(True):
        config = config.replace(**WIDE)
        data, weights = random_batch(config, seed), random_weights(config, seed)

        def program(config):
            def run(weights):
                model = package.evaluation(package.from_weights(config, weights))
                masks = {"source_mask": data.source_mask, "target_mask": data.target_mask}
                tokens, cache = model.start(data.source, source_mask=data.source_mask, max_length=5)
                first, cache = model.decode_step(tokens[..., None], cache)
                generated = package.generate(model, data.source, source_mask=data.source_mask, max_length=5)
                step = model.decode_step(data.inputs[..., :2], cache)
                return model.run(data.source, data.inputs, **masks, return_weights=True), first, step, generated

            return run

        scanned, looped = both(config, program, weights)
        assert list(scanned[0][1]) == list(looped[0][1])  # names, in order
    close(scanned, looped)


@every_frontend
@pytest.mark.parametrize("config", LEARNED_DISTANCES.values(), ids=LEARNED_DISTANCES)
def test_segments_in_a_scan_hand_on_the_history_of_the_loop(package, config, x64):
    config = config.replace(num_decoder_layers=3, history_length=3, norm_order="pre", **WIDE)
    kind, data = "DecoderOnlyTransformer", random_batch(config, 0)
    weights = random_weights(config, 0, model_class=kind)

    def program(config):
        def run(weights):
            model = package.evaluation(
                package.from_weights(config, weights, model_class=package.DecoderOnlyTransformer)
            )
            first, extras = model.run(data.inputs, return_weights=True)
            return first, model.run(data.labels, history=extras["decoder.history"]), extras

        return run

    scanned, looped = both(config, program, weights)
    assert list(scanned[2]) == list(looped[2])
    assert len(scanned[2]["decoder.history"]) == 3
    close(scanned, looped)


@pytest.mark.parametrize("kind", KINDS)
@given(config=configs(num_encoder_layers=3), data=st.data(), seed=seeds)
@few(max_examples=3)
def test_one_weights_file_is_for_loop_and_scan(kind, config, data, seed, tmp_path_factory):
    """There and back, through a file, in any frontend: the same names in the same order, and the same bits."""
    weights, file = random_weights(config, seed, model_class=kind), tmp_path_factory.mktemp("weights") / "w.safetensors"
    passed = weights
    for scan in (True, False, True):
        package = data.draw(st.sampled_from(list(FRONTENDS.values())))
        model = package.from_weights(config.replace(scan_layers=scan), passed, model_class=getattr(package, kind))
        core.weights.save(file, package.to_weights(model))
        assert list(package.to_weights(model)) == list(weights)
        passed = core.weights.load(file)
        assert same_bits(dict(passed), dict(weights))


@every_frontend
@given(config=configs(num_encoder_layers=2, num_decoder_layers=3), seed=st.integers(0, 2**31))
@few(max_examples=2)
def test_one_seed_initialises_loop_and_scan_alike(package, config, seed):
    first, second = (
        package.to_weights(package.init_transformer(config.replace(scan_layers=scan), seed=seed))
        for scan in (True, False)
    )
    assert list(first) == list(second)
    assert same_bits(first, second)


@every_frontend
def test_what_does_not_fit_is_named_by_layer(package):
    config, weights = DEEP.replace(scan_layers=True), random_weights(DEEP, 0)
    name = "encoder.blocks.1.attention.q_proj.kernel"
    with pytest.raises(ValueError, match=re.escape(f"missing {name} float32[8, 8]")):
        package.from_weights(config, {n: w for n, w in weights.items() if n != name})
    with pytest.raises(ValueError, match=r"extra encoder\.blocks\.3\.attention\.q_proj\.kernel"):
        package.from_weights(config, weights | {name.replace("1", "3"): weights[name]})
    with pytest.raises(ValueError, match=re.escape(f"{name} must be float32[8, 8], got float32[8, 9]")):
        package.from_weights(config, weights | {name: jnp.zeros((8, 9))})


@every_frontend
def test_block_i_of_a_scan_is_block_i_of_the_loop(package):
    weights = random_weights(DEEP, 0)
    looped, scanned = (package.from_weights(DEEP.replace(scan_layers=scan), weights) for scan in (False, True))
    for stack in ("encoder", "decoder"):
        first, second = getattr(looped, stack).blocks, getattr(scanned, stack).blocks
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert type(a) is type(b)
            assert a.dropout.depth_rate == b.dropout.depth_rate
            assert list(package.to_weights(a)) == list(package.to_weights(b))
            assert same_bits(package.to_weights(a), package.to_weights(b))
        assert same_bits(package.to_weights(first[-1]), package.to_weights(second[-1]))
        with pytest.raises(IndexError):
            second[len(first)]


def test_stacked_parameters_carry_the_name_of_the_axis_of_layers():
    model = nnx_impl.Transformer(DEEP.replace(scan_layers=True), rngs=nnx.Rngs(0))
    assert isinstance(model.encoder.blocks, nnx_impl.StackedBlocks)
    kernel = model.encoder.blocks.stacked.attention.q_proj.kernel
    assert kernel.get_metadata()["out_sharding"] == ("layers", "embed", "heads")
    assert model.encoder.blocks[1].attention.q_proj.kernel.get_metadata()["out_sharding"] == ("embed", "heads")


@every_frontend
def test_training_goes_on_from_loop_to_scan_and_back(package, x64):
    """With the state of an optimizer that has one array for each parameter, by the same names."""
    config, kind = DEEP.replace(**WIDE), "DecoderOnlyTransformer"
    weights, ends = random_weights(config, 0, model_class=kind), []
    for plan in ([False] * 3, [True, False, True]):
        now, state = weights, None
        for step, scan in enumerate(plan):
            model = package.from_weights(config.replace(scan_layers=scan), now, model_class=getattr(package, kind))
            trainer = package.Trainer(model, optax.sgd(0.1, momentum=0.9), seed=5)
            if state is not None:
                trainer.resume(state, step=step)
            trainer.train(random_batch(config, step))
            now, state = package.to_weights(trainer.model), dict(trainer.optimizer_state())
        ends.append((now, state))
    assert list(ends[0][1]) == list(ends[1][1])
    close(ends[1], ends[0], layers=50)


@every_frontend
@pytest.mark.parametrize("remat", [False, True])
def test_the_program_does_not_grow_with_the_depth(package, remat):
    """Of a model that holds its layers stacked, as text; that of the loop does."""

    def lines(layers, scan):
        config = CONFIG.replace(num_encoder_layers=layers, num_decoder_layers=layers, scan_layers=scan, remat=remat)
        weights = random_weights(config, 0)
        model, data = package.from_weights(config, weights), random_batch(config, 0)
        leaves, structure = jax.tree.flatten(model)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

        def objective(arrays):
            given = iter(arrays)
            model = structure.unflatten([next(given) if isinstance(x, jax.Array) else x for x in leaves])
            return package.loss_fn(model, data, jax.random.key(0))[0]

        return program_text(jax.grad(objective), arrays).count("\n")

    assert lines(2, scan=True) == lines(5, scan=True)
    assert lines(2, scan=False) < lines(5, scan=False)


@every_frontend
@pytest.mark.parametrize("scan", [False, True])
def test_what_remat_keeps_is_not_computed_again(package, scan):
    """Matrix products in the gradient's program: all projections twice, or only attention's own products."""

    def products(**remat):
        config = DEEP.replace(scan_layers=scan, **remat)
        weights, data = random_weights(config, 0), random_batch(config, 0)
        gradient = jax.grad(lambda weights: logits(package, config, weights, data).sum())
        return program_text(gradient, weights).count("stablehlo.dot_general")

    assert products() < products(remat=True, remat_keeps="projections") < products(remat=True)
    assert products(remat_keeps="projections") == products()


def test_only_arrays_of_all_layers_are_taken_apart():
    arrays = {
        "0.mu.decoder.blocks.stacked.a": jnp.arange(4.0).reshape(2, 2),
        "0.mu.decoder.blocks.stacked.b": jnp.arange(2.0),
        "0.mu.decoder.norm.scale": jnp.ones(3),
        "1.decoder.blocks.stacked.a": jnp.float32(7),  # one number for a parameter, whatever its shape
    }
    found = unstacked(arrays)
    assert list(found) == [
        "0.mu.decoder.blocks.0.a", "0.mu.decoder.blocks.0.b", "0.mu.decoder.blocks.1.a", "0.mu.decoder.blocks.1.b",
        "0.mu.decoder.norm.scale", "1.decoder.blocks.stacked.a",
    ]  # fmt: skip
    assert found["0.mu.decoder.blocks.1.a"].tolist() == [2.0, 3.0]
    assert not is_stacked("1.decoder.blocks.stacked.a", arrays["1.decoder.blocks.stacked.a"])
    assert same_bits(core.weights.fitted(found, arrays), arrays)
    assert equinox_impl.StackedBlocks.__name__ == nnx_impl.StackedBlocks.__name__
