"""Both frontends, and core beneath them, against the oracle of `reference.py`: float64 unless a law says otherwise."""

import functools
import math
from typing import NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import equinox_impl
from core.attention import dot_product_attention
from core.config import Positions
from core.decoding import BOS
from core.layers import feed_forward, layer_norm, linear, rms_norm
from core.losses import Batch, cross_entropy
from core.positions import sinusoidal
from core.rotary import rotary
from tests import reference
from tests.frontends import CONFIG, FRONTENDS, random_examples
from tests.strategies import attention_shapes, bool_mask, configs, qkv, seeds

S, T = 5, 4
LM = "DecoderOnlyTransformer"
_generate = [Phase.explicit, Phase.generate]  # an example compiles whole models: one that fails is not shrunk
few, one = (settings(max_examples=max(1, settings.default.max_examples // n), phases=_generate) for n in (8, 20))
batches = st.sampled_from([(2,), (), (2, 2)])
every_position = pytest.mark.parametrize("positions", get_args(Positions))
frontends = st.sampled_from(list(FRONTENDS.values()))
every_frontend = pytest.mark.parametrize("frontend", FRONTENDS.values(), ids=FRONTENDS)
DOUBLE = {"dtype": "float64", "param_dtype": "float64"}


@st.composite
def oracle_configs(draw, **fixed):
    """Configurations over the whole space, whose epsilons are large enough to be felt; computed in float64."""
    distance, buckets = draw(st.sampled_from([(3, 4), (5, 4), (6, 10)]))
    fields = {
        "num_encoder_layers": draw(st.sampled_from([1, 2, 0])),
        "num_decoder_layers": draw(st.sampled_from([1, 2, 0])),
        "norm_epsilon": draw(st.sampled_from([1e-1, 1e-3])),
        "relative_distance": distance,
        "relative_buckets": buckets,
        "rotary_theta": draw(st.sampled_from([7.0, 10_000.0])),
        "rotary_original_length": draw(st.sampled_from([20, 2048])),
    }
    grouped = {"num_heads": 6, "num_kv_heads": 3, "d_model": 12}  # 6 heads: no power of two, for ALiBi
    return draw(configs(**fields | draw(st.sampled_from([{}, grouped])) | DOUBLE | fixed))


def draw_config(data, seed, **fixed):
    """One of `oracle_configs`, never the simplest of all, which Hypothesis draws first each time: it costs as much."""
    assume(seed)
    return data.draw(oracle_configs(**fixed))


def random_weights(config, seed, model="Transformer"):
    """A random number for every parameter, biases and scales too, so that no term is trivial."""
    make = lambda key: equinox_impl.to_weights(getattr(equinox_impl, model)(config, key=key))
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(spec.shape) / (1 if len(spec.shape) == 1 else math.sqrt(spec.shape[0]))
        for name, spec in jax.eval_shape(make, jax.random.key(0)).items()
    }


class Text(NamedTuple):
    """Tokens `[*B, T]`, and which of them are real; None: all."""

    tokens: np.ndarray
    mask: np.ndarray | None


@st.composite
def texts(draw, batch, length, vocab, *, prompt=False):
    """Random tokens; real are the first of each row, any, or all. In a prompt the first, at least one."""
    rng = np.random.default_rng(draw(seeds))
    tokens = rng.integers(0, vocab, (*batch, length))
    ragged = np.arange(length) < rng.integers(int(prompt), length + 1, batch)[..., None]
    anywhere = ragged if prompt else rng.random(tokens.shape) < 0.6
    return Text(tokens, draw(st.sampled_from([ragged, anywhere, None])))


def segment_ids(batch, length, seed):
    """Up to three texts in each row, of any length, one side by side with the next."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(0, length + 1, (*batch, 1, 2))
    names = rng.permuted(np.broadcast_to([7, -1, 4], (*batch, 3)), axis=-1)
    return np.take_along_axis(names, (np.arange(length)[:, None] >= ends).sum(axis=-1), axis=-1)


def rebuilt(frontend, model, config, weights):
    return frontend.evaluation(frontend.from_weights(config, weights, model_class=getattr(frontend, model)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def logits(frontend, model, config, weights, *tokens, **masks):
    return rebuilt(frontend, model, config, weights)(*tokens, **masks)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("label_smoothing", "model"))
def loss(frontend, config, weights, batch, *, label_smoothing, model="Transformer"):
    model = rebuilt(frontend, model, config, weights)
    return frontend.loss_fn(model, batch, label_smoothing=label_smoothing)[0]


def assert_equals(exact, got, *, depth=0, context=""):
    """Within 1e-12 (1 + depth) of the largest number."""
    tolerance = 1e-12 * (1 + depth) * np.abs(exact).max(initial=0)
    np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance, err_msg=str(context))


@every_position
@given(data=st.data(), batch=batches, seed=seeds)
@one
def test_encoder_decoder_logits_equal_the_oracle(positions, data, batch, seed):
    """Packed texts, and the padding in them; the oracle runs them one by one."""
    with jax.enable_x64(True):
        config = draw_config(data, seed, positions=positions)
        source, source_mask = data.draw(texts(batch, S, config.source_vocab_size))
        target, target_mask = data.draw(texts(batch, T, config.target_vocab_size))
        weights, how = random_weights(config, seed), {"source_mask": source_mask, "target_mask": target_mask}
        how |= {"source_segments": segment_ids(batch, S, seed), "target_segments": segment_ids(batch, T, seed + 1)}
        exact = reference.transformer(weights, config, source, target, **how)
        for name, frontend in FRONTENDS.items():
            got = logits(frontend, "Transformer", config, weights, source, target, **how)
            depth = config.num_encoder_layers + config.num_decoder_layers
            assert_equals(exact, got, depth=depth, context=(name, config))


SIDES = {
    "encoder": ("EncoderOnlyTransformer", reference.encoder_only, "source"),
    "decoder": ("DecoderOnlyTransformer", reference.decoder_only, "target"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["one text a row", "packed"])
@pytest.mark.parametrize("side", SIDES)
@given(data=st.data(), batch=batches, seed=seeds)
@few
def test_one_stack_logits_equal_the_oracle(side, packed, data, batch, seed):
    with jax.enable_x64(True):
        config = draw_config(data, seed, source_vocab_size=13)
        (model, oracle, name), (tokens, mask) = SIDES[side], data.draw(texts(batch, S, 13))
        ids, weights = segment_ids(batch, S, seed) if packed else None, random_weights(config, seed, model)
        exact = oracle(weights, config, tokens, mask, ids)
        for package, frontend in FRONTENDS.items():
            how = {f"{name}_mask": mask, f"{name}_segments": ids}
            got = logits(frontend, model, config, weights, tokens, **how)
            assert_equals(exact, got, depth=2, context=(package, config))


@every_position
@given(data=st.data(), batch=batches, seed=seeds)
@one
def test_classifier_logits_equal_the_oracle_whatever_stands_at_padding(positions, data, batch, seed):
    """The oracle reads 0 there, the models NaN and infinity."""
    with jax.enable_x64(True):
        config = draw_config(data, seed, positions=positions, source_features=4)
        mask, weights = data.draw(texts(batch, S, 2)).mask, random_weights(config, seed, "Classifier")
        (source,), real = normals(seed, (*batch, S, 4)), np.True_ if mask is None else mask[..., None]
        exact = reference.classifier(weights, config, np.where(real, source, 0.0), mask)
        foul = jnp.asarray(np.where(real, source, np.resize([np.nan, np.inf, -np.inf], source.shape)))
        for name, frontend in FRONTENDS.items():
            got = logits(frontend, "Classifier", config, weights, foul, source_mask=mask)
            assert_equals(exact, got, depth=config.num_encoder_layers, context=(name, config))


@given(data=st.data(), batch=batches, seed=seeds, label_smoothing=st.sampled_from([0.1, 0.0]))
@one
def test_the_loss_of_a_classifier_equals_the_oracle(data, batch, seed, label_smoothing):
    with jax.enable_x64(True):
        config = draw_config(data, seed)
        weights, examples = random_weights(config, seed, "Classifier"), random_examples(config, seed, batch=batch)
        scores = reference.classifier(weights, config, np.float64(examples.source), examples.source_mask)
        exact = reference.cross_entropy(
            scores[..., None, :], np.asarray(examples.labels), np.asarray(examples.target_mask), label_smoothing
        )
        for name, frontend in FRONTENDS.items():
            got = loss(frontend, config, weights, examples, label_smoothing=label_smoothing, model="Classifier")
            assert_equals(exact, got, depth=config.num_encoder_layers, context=(name, config))


@every_position
@given(data=st.data(), batch=batches, seed=seeds)
@one
def test_prefix_language_models_equal_the_oracle(positions, data, batch, seed):
    with jax.enable_x64(True):
        config = draw_config(data, seed, positions=positions, num_decoder_layers=data.draw(st.sampled_from([1, 2])))
        tokens, mask = data.draw(texts(batch, S, 13))
        each_row = np.random.default_rng(seed).integers(0, S + 1, batch, "int32") if batch else np.int32(2)
        prefix, weights = data.draw(st.sampled_from([each_row, np.int32(3)])), random_weights(config, seed, LM)
        exact = reference.decoder_only(weights, config, tokens, mask, prefix=prefix)
        for name, frontend in FRONTENDS.items():
            got = logits(frontend, LM, config, weights, tokens, target_mask=mask, prefix=prefix)
            assert_equals(exact, got, depth=2, context=(name, config))


@functools.partial(jax.jit, static_argnums=(0, 1))
def continued(frontend, config, weights, tokens, history=None):
    """Logits of a segment, and what the next one is to remember."""
    out, extras = rebuilt(frontend, LM, config, weights).run(tokens, history=history)
    return out, extras["decoder.history"]


@pytest.mark.parametrize("positions", ["transformer_xl", "rotary", "shaw", "t5", "alibi", "none"])
@given(data=st.data(), batch=batches, seed=seeds)
@one
def test_segments_with_their_history_equal_the_oracle(positions, data, batch, seed):
    with jax.enable_x64(True):
        config = draw_config(data, seed, positions=positions, num_decoder_layers=2, history_length=3)
        weights, tokens = random_weights(config, seed, LM), data.draw(texts((3, *batch), 2, 13)).tokens
        history = tuple(np.asarray(x) for x in normals(seed, *[(*batch, 3, config.d_model)] * 2))
        exact, left = reference.transformer_xl(weights, config, tokens, history)
        for name, frontend in FRONTENDS.items():
            past = history
            for segment, wanted in zip(tokens, exact, strict=True):
                got, past = continued(frontend, config, weights, segment, past)
                assert_equals(wanted, got, depth=2, context=(name, config))
            for wanted, got in zip(left, past, strict=True):
                assert_equals(wanted, got, depth=2, context=(name, config))


@given(data=st.data(), frontend=frontends, seed=seeds)
@one
def test_segments_that_remember_all_are_one_long_text(data, frontend, seed):
    """Needs no oracle: causal attention to a whole history is causal attention."""
    with jax.enable_x64(True):
        positions = data.draw(st.sampled_from(["transformer_xl", "rotary", "shaw", "t5", "alibi"]))
        config = draw_config(data, seed, positions=positions, num_decoder_layers=1, history_length=4)
        tokens, weights = data.draw(texts((2,), 6, 13)).tokens, random_weights(config, seed, LM)
        (first, past), whole = continued(frontend, config, weights, tokens[:, :4]), tokens
        assert_equals(first, logits(frontend, LM, config, weights, whole)[:, :4], depth=1, context=config)
        second, past = continued(frontend, config, weights, tokens[:, 4:], past)
        assert_equals(second, logits(frontend, LM, config, weights, whole)[:, 4:], depth=1, context=config)
        assert [x.shape for x in past] == [(2, 4, config.d_model)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def history_gradient(frontend, config, weights, tokens, history):
    return jax.value_and_grad(
        lambda history: jnp.square(continued(frontend, config, weights, tokens, history)[0]).sum()
    )(history)


@given(data=st.data(), frontend=frontends, seed=seeds)
@one
def test_a_history_is_attended_to_and_takes_no_gradient(data, frontend, seed):
    with jax.enable_x64(True):
        config = draw_config(data, seed, positions="transformer_xl", num_decoder_layers=2, history_length=3)
        weights, tokens = random_weights(config, seed, LM), data.draw(texts((2,), 3, 13)).tokens
        history = tuple(np.asarray(x) for x in normals(seed, *[(2, 3, config.d_model)] * 2))
        value, gradients = history_gradient(frontend, config, weights, tokens, history)
        assert not any(np.any(gradient) for gradient in gradients), config
        for layer in range(2):
            other = tuple(past - 2.0 * past * (i == layer) for i, past in enumerate(history))
            assert float(history_gradient(frontend, config, weights, tokens, other)[0]) != float(value), (layer, config)


def draw_batch(data, config, batch):
    source, source_mask = data.draw(texts(batch, S, config.source_vocab_size))
    target, target_mask = data.draw(texts(batch, T, config.target_vocab_size))
    labels, _ = data.draw(texts(batch, T, config.target_vocab_size))
    everything = np.ones(source.shape, bool), np.ones(target.shape, bool)
    masks = [ones if mask is None else mask for mask, ones in zip((source_mask, target_mask), everything, strict=True)]
    return Batch(source, masks[0], target, labels, masks[1])


@given(data=st.data(), batch=batches, seed=seeds, label_smoothing=st.sampled_from([0.1, 0.0]))
@few
def test_the_loss_equals_the_oracle(data, batch, seed, label_smoothing):
    with jax.enable_x64(True):
        config = draw_config(data, seed)
        weights, batch = random_weights(config, seed), draw_batch(data, config, batch)
        scores = reference.transformer(weights, config, batch.source, batch.inputs, *batch[1::3])
        exact = reference.cross_entropy(scores, batch.labels, batch.target_mask, label_smoothing)
        for name, frontend in FRONTENDS.items():
            got = loss(frontend, config, weights, batch, label_smoothing=label_smoothing)
            depth = config.num_encoder_layers + config.num_decoder_layers
            assert_equals(exact, got, depth=depth, context=(name, config))


@given(batch=batches, seed=seeds, label_smoothing=st.sampled_from([0.0, 0.3]), size=st.sampled_from([1.0, 1e3]))
def test_cross_entropy_weighs_tokens_like_the_oracle(batch, seed, label_smoothing, size):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        scores, labels = size * rng.standard_normal((*batch, T, 7)), rng.integers(0, 7, (*batch, T))
        weights = rng.random((*batch, T)) * (rng.random((*batch, T)) < 0.7)
        got = cross_entropy(*map(jnp.asarray, (scores, labels)), weights=jnp.asarray(weights),
                            label_smoothing=label_smoothing)  # fmt: skip
        assert_equals(reference.cross_entropy(scores, labels, weights, label_smoothing), got)


@given(data=st.data(), seed=seeds, frontend=frontends)
@one
def test_loss_gradients_equal_finite_differences(data, seed, frontend):
    with jax.enable_x64(True):
        # one layer costs least to compile, and a large epsilon lets a difference tell the slope
        config = draw_config(data, seed, num_encoder_layers=1, num_decoder_layers=1, norm_epsilon=0.1)
        weights, batch = random_weights(config, seed), draw_batch(data, config, (2,))
        f = functools.partial(loss, frontend, config, batch=batch, label_smoothing=0.1)
        check_grads(lambda weights: f(weights), (weights,), order=1, eps=1e-6, atol=1e-7, rtol=1e-7)


def _some_attention(q, k, v, bias, sinks):
    """A row without keys, a key without queries, and all that adds to the logits."""
    mask = np.random.default_rng(0).random((2, 1, 4, 3, 5)) < 0.7
    mask[0, 0, 1, 2], mask[..., 3] = False, False
    return dot_product_attention(q, k, v, mask=jnp.asarray(mask), bias=bias, causal=True, q_offset=2, window=(3, 0),
                                 soft_cap=1.5, sinks=sinks)  # fmt: skip


def _some_feed_forward(activation, x, *kernels):
    return feed_forward(x, *(lambda x, w=w: linear(x, w) for w in kernels), activation=activation)


def _some_cross_entropy(scores, weights):
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 3)))
    return cross_entropy(scores, labels, weights=jnp.square(weights), label_smoothing=0.1)


DIFFERENTIABLE = {
    "attention": (_some_attention, [(2, 1, 3, 4, 6), (2, 1, 5, 2, 6), (2, 1, 5, 2, 3), (2, 1, 4, 3, 5), (4,)]),
    "layer_norm": (functools.partial(layer_norm, epsilon=0.01), [(2, 3, 6), (6,), (6,)]),
    "rms_norm": (functools.partial(rms_norm, epsilon=0.01), [(2, 3, 6), (6,)]),
    "rotary": (lambda x: rotary(x, jnp.arange(4)[None] + jnp.array([[7], [0]])), [(2, 4, 3, 6)]),
    "gelu": (functools.partial(_some_feed_forward, "gelu"), [(2, 3, 4), (4, 5), (5, 4)]),
    "gelu_tanh": (functools.partial(_some_feed_forward, "gelu_tanh"), [(2, 3, 4), (4, 5), (5, 4)]),
    "swiglu": (functools.partial(_some_feed_forward, "swiglu"), [(2, 3, 4), (4, 5), (5, 4), (4, 5)]),
    "cross_entropy": (_some_cross_entropy, [(2, 3, 7), (2, 3)]),
}


def normals(seed, *shapes):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(name, args, tangents, key):
    f = DIFFERENTIABLE[name][0]
    out, forward = jax.jvp(f, args, tangents)
    cotangent = jax.random.normal(key, out.shape, out.dtype)
    return cotangent, forward, jax.vjp(f, *args)[1](cotangent)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@given(seed=seeds)
def test_backward_is_the_adjoint_of_forward(name, seed):
    """<J v, u> = <v, J^T u>."""
    with jax.enable_x64(True):
        shapes = DIFFERENTIABLE[name][1]
        args, tangents = normals(seed, *shapes), normals([seed, 1], *shapes)
        cotangent, forward, backward = _derivatives(name, args, tangents, jax.random.key(seed))
        products = np.concatenate([np.ravel(t * b) for t, b in zip(tangents, backward, strict=True)])
        size = np.abs(products).sum()
        assert abs(np.vdot(forward, cotangent) - products.sum()) <= 1e-12 * size  # NaN fails


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@given(seed=seeds)
@one
def test_derivatives_equal_finite_differences(name, seed):
    with jax.enable_x64(True):
        f, shapes = DIFFERENTIABLE[name]
        check_grads(jax.jit(f), normals(seed, *shapes), order=2, eps=1e-6, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_sinusoidal_tables_equal_the_oracle(width, x64):
    got = sinusoidal(jnp.arange(50, dtype=jnp.int32), width, jnp.float64)
    assert_equals(reference.sinusoidal(50, width), got)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="prefix")
def started(frontend, model, config, weights, source, mask, *, prefix):
    how = {"prefix": True} if prefix else {}
    return rebuilt(frontend, model, config, weights).start(source, source_mask=mask, max_length=5, **how)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def stepped(frontend, model, config, weights, tokens, cache):
    return rebuilt(frontend, model, config, weights).decode_step(tokens, cache)


def with_junk(cache):
    """NaN in all slots that no token fills."""
    unused = lambda slots: np.arange(slots.shape[-2]) >= np.asarray(cache.length)[..., None]
    foul = lambda slots: jnp.where(unused(slots)[..., None, :, None], jnp.nan, slots)
    return cache._replace(attention=jax.tree.map(foul, cache.attention))


def decoded(frontend, model, config, weights, prompt, more, *, size, prefix=False, junk=False):
    """Logits after the prompt and after each of `more` but its last, `size` at a step, from the cache."""
    last, cache = started(frontend, model, config, weights, *prompt, prefix=prefix)
    text, found = np.concatenate([np.asarray(last)[..., None], more], axis=-1), []
    for start in range(0, more.shape[-1], size):
        cache = with_junk(cache) if junk else cache
        out, cache = stepped(frontend, model, config, weights, text[..., start : start + size], cache)
        found.append(out)
    return np.concatenate(found, axis=-2)


def oracle_decoded(model, config, weights, prompt, more, *, prefix=False):
    """The same from whole texts."""
    (source, mask), before = prompt, more[..., :-1]
    if model == "Transformer":
        begin = np.full((*source.shape[:-1], 1), BOS)
        return reference.transformer(weights, config, source, np.concatenate([begin, before], axis=-1), mask)
    out = np.empty((*more.shape, config.target_vocab_size))
    for b in np.ndindex(source.shape[:-1]):
        real = source[b] if mask is None else source[b][mask[b]]
        whole = np.concatenate([real, before[b]])
        out[b] = reference.decoder_only(weights, config, whole, prefix=len(real) * prefix)[len(real) - 1 :]
    return out


def draw_decoding(data, model, config, batch, seed):
    language_model = model == LM
    prompt = data.draw(texts(batch, S, 13 if language_model else config.source_vocab_size, prompt=language_model))
    how = {"prefix": data.draw(st.booleans())} if language_model else {}
    more = data.draw(texts(batch, 4, 13)).tokens
    return (model, config, random_weights(config, seed, model), prompt, more), how


def assert_decodes(data, config, model, batch, seed, size):
    case, how = draw_decoding(data, model, config, batch, seed)
    exact = oracle_decoded(*case, **how)
    for name, frontend in FRONTENDS.items():
        got = decoded(frontend, *case, **how, size=size)
        assert_equals(exact, got, depth=2, context=(name, config))
    np.testing.assert_array_equal(decoded(frontend, *case, **how, size=size, junk=True), got, err_msg=str(config))


@every_position
@given(data=st.data(), batch=batches, seed=seeds, size=st.sampled_from([1, 2]))
@one
def test_decoding_equals_the_oracle_whatever_lies_in_unused_slots(positions, data, batch, seed, size):
    with jax.enable_x64(True):
        config = draw_config(data, seed, positions=positions, num_decoder_layers=data.draw(st.sampled_from([1, 2])))
        assert_decodes(data, config, LM, batch, seed, size)


@given(data=st.data(), batch=batches, seed=seeds, size=st.sampled_from([1, 2]))
@few
def test_decoding_from_a_source_equals_the_oracle(data, batch, seed, size):
    with jax.enable_x64(True):
        config = draw_config(data, seed, num_encoder_layers=1, num_decoder_layers=1)
        assert_decodes(data, config, "Transformer", batch, seed, size)


LIMITS = {"float32": 100 * 2.0**-24, "bfloat16": 10 * 2.0**-8}


@pytest.mark.parametrize("model", ["Transformer", LM])
@pytest.mark.parametrize("dtype", LIMITS)
@given(data=st.data(), batch=batches, seed=seeds, frontend=frontends)
@one
def test_narrow_models_decode_like_the_oracle(model, dtype, data, batch, seed, frontend):
    """Within so many units of rounding of the largest logit; epsilon keeps norms from magnifying them more.

    The most that was seen in 60 draws: 13 units of float32, 2 of bfloat16.
    """
    layers = {"num_encoder_layers": 1 if model == "Transformer" else 0, "num_decoder_layers": 1}
    config = draw_config(data, seed, dtype=dtype, param_dtype=dtype, norm_epsilon=0.1, **layers)
    (*start, weights, prompt, more), how = draw_decoding(data, model, config, batch, seed)
    weights = {name: jnp.asarray(array, dtype) for name, array in weights.items()}
    exact = oracle_decoded(*start, jax.tree.map(np.float64, weights), prompt, more, **how)
    got = decoded(frontend, *start, weights, prompt, more, **how, size=1)
    assert got.dtype == np.float32
    error = np.abs(got - exact).max() / np.abs(exact).max()
    assert error <= LIMITS[dtype], (error / LIMITS[dtype], config)


def generated(frontend, model, config, weights, tokens, mask, **how):
    weights, tokens, mask = jax.tree.map(jnp.asarray, (weights, tokens, mask))
    return frontend.generate(rebuilt(frontend, model, config, weights), tokens, source_mask=mask, **how)


def raggedest_end(written):
    """The token that, as the end, makes rows stop at the most different times."""
    rows = written.reshape(-1, written.shape[-1])
    ends = lambda token: [min(np.flatnonzero(row == token), default=len(row)) for row in rows]
    return max(range(13), key=lambda token: (np.ptp(ends(token)), token in written))


@given(data=st.data(), batch=batches, seed=seeds, bos_id=st.integers(0, 12))
@one
def test_cached_generation_equals_the_uncached_oracle(data, batch, seed, bos_id):
    with jax.enable_x64(True):
        config = draw_config(data, seed)
        source, mask = data.draw(texts(batch, S, config.source_vocab_size))
        weights = random_weights(config, seed)

        def oracle(eos_id):
            rows = []
            for b in np.ndindex(batch):
                after = lambda text, b=b: reference.transformer(
                    weights, config, source[b], text, reference.row(mask, b)
                )
                rows.append(reference.greedy(after, [bos_id], max_length=6, eos_id=eos_id, pad_id=3))
            return np.array(rows).reshape(*batch, 6)

        eos_id = raggedest_end(oracle(-1))
        for name, frontend in FRONTENDS.items():
            how = {"max_length": 6, "bos_id": bos_id, "eos_id": eos_id, "pad_id": 3}
            got = generated(frontend, "Transformer", config, weights, source, mask, **how)
            np.testing.assert_array_equal(got, oracle(eos_id), err_msg=str((name, config)))


@pytest.mark.parametrize("prefix", [False, True])
@given(data=st.data(), batch=batches, seed=seeds)
@one
def test_cached_continuation_of_ragged_prompts_equals_the_uncached_oracle(prefix, data, batch, seed):
    with jax.enable_x64(True):
        config = draw_config(data, seed)
        prompt, mask = data.draw(texts(batch, S, config.target_vocab_size, prompt=True))
        weights = random_weights(config, seed, LM)

        def oracle(eos_id):
            rows = []
            for b in np.ndindex(batch):
                begin = prompt[b] if mask is None else prompt[b][mask[b]]
                after = functools.partial(reference.decoder_only, weights, config, prefix=len(begin) * prefix)
                rows.append(reference.greedy(after, begin, max_length=6, eos_id=eos_id, pad_id=3))
            return np.array(rows).reshape(*batch, 6)

        eos_id = raggedest_end(oracle(-1))
        for name, frontend in FRONTENDS.items():
            how = {"max_length": 6, "eos_id": eos_id, "pad_id": 3, "prefix": prefix}
            got = generated(frontend, LM, config, weights, prompt, mask, **how)
            np.testing.assert_array_equal(got, oracle(eos_id), err_msg=str((name, config)))


attend = eqx.filter_jit(dot_product_attention)


@st.composite
def sights(draw, shape, dtype):
    """What a query may see, said in all ways that attention takes, in any combination."""
    seed, size = draw(seeds), (*shape.batch, shape.N, shape.T, shape.S)
    rng = np.random.default_rng(seed)
    bias = np.where(rng.random(size) < 0.2, -np.inf, rng.standard_normal(size)).astype(dtype)
    each_row = rng.integers(-1, shape.S, shape.batch, dtype=np.int32) if shape.batch else 1
    how = {
        "mask": draw(st.sampled_from([None, bool_mask(shape, seed)])),
        "bias": draw(st.sampled_from([None, bias])),
        "causal": draw(st.booleans()),
        "q_offset": draw(st.sampled_from([0, shape.S - shape.T, each_row])),
        "window": draw(st.sampled_from([None, (1, 0), (0, 2)])),
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    return {name: value for name, value in how.items() if value is not None}


def poison_unseen(scores, k, v):
    """NaN and infinity at the keys that no query may see."""
    unseen = (scores == -np.inf).all(axis=-2)
    unseen = unseen.reshape(*k.shape[:-3], k.shape[-2], -1, k.shape[-3]).all(axis=-2).swapaxes(-1, -2)
    k[unseen], v[unseen] = np.nan, np.inf


def draw_attention(data, shape, seed, dtype, *, scale=1.0):
    """q, k, v and how, k and v poisoned where nobody looks; and the oracle's scores, in float64."""
    q, k, v = qkv(shape, seed, dtype, scale=scale)
    how = data.draw(sights(shape, dtype))
    scores = reference.attention_scores(*map(np.float64, (q, k)), **how)
    poison_unseen(scores, k, v)
    return (q, k, v), how, scores


@given(data=st.data(), shape=attention_shapes, seed=seeds)
def test_attention_equals_the_oracle(data, shape, seed):
    with jax.enable_x64(True):
        qkv, how, _ = draw_attention(data, shape, seed, "float64")
        how |= data.draw(st.sampled_from([{}, {"soft_cap": 1.5}]))
        how |= data.draw(st.sampled_from([{}, {"sinks": np.random.default_rng(seed).standard_normal(shape.N)}]))
        assert_equals(reference.attention(*qkv, **how), attend(*qkv, **how))


def rounding_bound(q, k, v, scores, *, bias=0.0, scale=None, **_):
    """How far float32 attention may lie from the exact one: rule T1, one unit for each operation."""
    group, (S, D), unit = q.shape[-2] // k.shape[-2], (k.shape[-3], k.shape[-1]), 2.0**-24
    scale, bias = 1 / math.sqrt(D) if scale is None else scale, np.broadcast_to(bias, scores.shape)
    bound = np.zeros((*q.shape[:-1], v.shape[-1]))
    for *b, n, t in np.ndindex(scores.shape[:-1]):
        seen = np.flatnonzero(scores[*b, n, t] > -np.inf)
        if seen.size:
            keys, values = k[*b, seen, n // group], np.abs(v[*b, seen, n // group])
            size = (scale * np.abs(keys) @ np.abs(q[*b, t, n]) + np.abs(bias[*b, n, t, seen])).max()
            weights, gap = reference.softmax(scores[*b, n, t, seen]), scores[*b, n, t].max() - scores[*b, n, t, seen]
            relative = 2 * (D + 2) * size + weights @ gap + 2 * S + 6
            bound[*b, t, n] = unit * (relative * (weights @ values) + (weights * gap) @ values)
            bound[*b, t, n] += 2 * S * 2.0**-126 * values.max()
    return bound


@given(data=st.data(), shape=attention_shapes, seed=seeds, scale=st.sampled_from([1.0, 0.1, 10.0]))
def test_float32_attention_is_within_the_derived_bound(data, shape, seed, scale):
    qkv, how, scores = draw_attention(data, shape, seed, "float32", scale=scale)
    exact = [x.astype(np.float64) for x in qkv]
    error = np.abs(attend(*qkv, **how) - reference.attention(*exact, **how))
    np.testing.assert_array_less(error, rounding_bound(*exact, scores, **how) + 1e-300, err_msg=f"{shape} {how}")


def plain_attention(q, k, v, mask):
    """Attention as one would write it in NumPy, every step rounded to the inputs' dtype."""
    k, v = (np.moveaxis(np.repeat(x, q.shape[-2] // x.shape[-2], axis=-2), -2, -3)[..., None, :, :] for x in (k, v))
    scores = (np.moveaxis(q, -2, -3)[..., None, :] * k).sum(axis=-1) * q.dtype.type(1 / math.sqrt(q.shape[-1]))
    exponentials = np.where(mask, np.exp(scores - scores.max(axis=-1, keepdims=True)), q.dtype.type(0))
    total = exponentials.sum(axis=-1, keepdims=True)
    weights = exponentials / np.where(total == 0, q.dtype.type(1), total)
    return np.moveaxis((weights[..., None] * v).sum(axis=-2), -2, -3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(shape=attention_shapes, seed=seeds, scale=st.sampled_from([1.0, 4.0]))
def test_16_bit_attention_is_rounded_once_and_no_worse_than_twice_the_plain_one(dtype, shape, seed, scale):
    mask, number = bool_mask(shape, seed), jnp.dtype(dtype).type
    narrow = qkv(shape, seed, jnp.dtype(dtype), scale=scale)
    wide = [x.astype(np.float64) for x in narrow]
    exact, scores = reference.attention(*wide, mask=mask), reference.attention_scores(*wide[:2], mask=mask)
    got, plain, rounded = attend(*narrow, mask=mask), plain_attention(*narrow, mask), exact.astype(number)
    assert got.dtype == dtype
    error, plain_error = (np.abs(np.asarray(x, np.float64) - exact) for x in (got, plain))
    noise = np.abs((rounded + number(0.3)) - number(0.3) - rounded).max()
    assert error.max() <= 2 * plain_error.max() + 2 * float(noise)
    info = jnp.finfo(dtype)
    once = float(info.eps) / 2 * np.abs(exact) + 2 * rounding_bound(*wide, scores) + float(info.smallest_subnormal)
    np.testing.assert_array_less(error, once, err_msg=f"{shape}")


# bad input of the calls


def model_of(frontend, name, **fields):
    config = CONFIG.replace(**{"num_decoder_layers": 2, **fields})
    weights = jax.tree.map(lambda x: jnp.asarray(x, "float32"), random_weights(config, 0, name))
    return frontend.evaluation(frontend.from_weights(config, weights, model_class=getattr(frontend, name)))


XL = {"positions": "transformer_xl", "history_length": 3}
TOKENS = jnp.asarray([[3, 4, 5], [1, 2, 3]], jnp.int32)
IDS, REAL = jnp.asarray([[0, 0, 1], [1, 1, 1]], jnp.int32), jnp.ones((2, 3), bool)
PAST, FRACTIONS = jnp.zeros((2, 3, 8), jnp.float32), jnp.zeros((2, 3), jnp.float32)
BAD_CALLS = {
    "history with a mask": (LM, XL, {"history": (PAST, PAST), "target_mask": REAL},
                            "a history continues whole rows: masks, segments and prefix go without"),
    "history with segments": (LM, XL, {"history": (PAST, PAST), "target_segments": IDS},
                              "a history continues whole rows: masks, segments and prefix go without"),
    "history with a prefix": (LM, XL, {"history": (PAST, PAST), "prefix": 1},
                              "a history continues whole rows: masks, segments and prefix go without"),
    "history without a length": (LM, XL | {"history_length": 0}, {"history": (PAST, PAST)},
                                 "a history needs history_length in the configuration, got 0"),
    "too few histories": (LM, XL, {"history": (PAST,)}, "history holds each block's inputs, 2 here, got 1"),
    "another batch": (LM, XL, {"history": (PAST, PAST[:1])},
                      r"a history must fit its segment \(2, 3, 8\) in all but the length, got \[.*\(1, 3, 8\)\]"),
    "another width": (LM, XL, {"history": (PAST[..., :1], PAST)},
                      r"must fit its segment \(2, 3, 8\) in all but the length, got \[\(2, 3, 1\)"),
    "a fraction as prefix": (LM, {}, {"prefix": jnp.float32(1)},
                             r"a prefix has an integer length, one or of the batch shape \(2,\), got float32 \(\)"),
    "a prefix for three rows": (LM, {}, {"prefix": jnp.ones(3, jnp.int32)},
                                r"of the batch shape \(2,\), got int32 \(3,\)"),
    "segments of the source alone": ("Transformer", {}, {"source_segments": IDS},
                                     "segment ids go with both source and target or with neither"),
    "segments of the target alone": ("Transformer", {}, {"target_segments": IDS},
                                     "segment ids go with both source and target or with neither"),
    "fractions as segment ids": ("Transformer", {}, {"source_segments": FRACTIONS, "target_segments": FRACTIONS},
                                 "segment ids must be integers, got float32"),
    "fewer segment ids": (LM, {}, {"target_segments": IDS[:, :2]},
                          r"segment ids must have the shape of their tokens, here \(2, 3\), got \(2, 2\)"),
    "fewer source ids": ("Transformer", {}, {"source_segments": IDS[:1], "target_segments": IDS},
                         r"segment ids must have the shape of their tokens, here \(2, 3\), got \(1, 3\)"),
    "fewer target ids": ("Transformer", {}, {"source_segments": IDS, "target_segments": IDS[0]},
                         r"segment ids must have the shape of their tokens, here \(2, 3\), got \(3,\)"),
    "a mask of another shape": ("EncoderOnlyTransformer", {}, {"source_mask": REAL[:, :1]},
                                r"a padding mask must have the shape of its tokens, here \(2, 3\), got \(2, 1\)"),
}  # fmt: skip


@every_frontend
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_of_a_call_are_named_with_the_rule(frontend, case, untyped):
    name, fields, arguments, message = BAD_CALLS[case]
    tokens = (TOKENS, TOKENS) if name == "Transformer" else (TOKENS,)
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(lambda: model_of(frontend, name, **fields).run(*tokens, **arguments)[0])


@every_frontend
def test_bad_arguments_of_generation_are_named_with_the_rule(frontend, untyped):
    with pytest.raises(ValueError, match="prefix and prefill_chunk are for decoder-only models; an encoder reads"):
        frontend.generate(model_of(frontend, "Transformer"), TOKENS, prefix=True, max_length=2)
    with pytest.raises(ValueError, match="each row of a prompt needs its real tokens first, at least one"):
        frontend.generate(model_of(frontend, LM), TOKENS, source_mask=~REAL, prefix=True, max_length=2)


@every_frontend
def test_a_cache_that_overflows_poisons_its_rows(frontend):
    model = model_of(frontend, LM, positions="t5", attention_window=(1, 0))
    last, cache = eqx.filter_jit(lambda: model.start(TOKENS, prefix=True, max_length=1))()
    step = eqx.filter_jit(lambda tokens, cache: model.decode_step(tokens, cache))
    for i in range(3):
        logits, cache = step(last[..., None], cache)
        assert np.isnan(logits).all() == (i == 2), i  # two of four slots hold the prompt
    with pytest.raises(ValueError, match="the cache holds 4 tokens a row, 5 are there and 1 more came"):
        model.decode_step(last[..., None], cache)
