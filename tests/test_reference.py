"""Both frontends, and core beneath them, against the oracle of `reference.py`: float64 unless a law says otherwise."""

import functools
import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import equinox_impl
import nnx_impl
from core.attention import dot_product_attention
from core.layers import feed_forward, layer_norm, linear, rms_norm
from core.losses import Batch, cross_entropy
from core.positions import rotary, sinusoidal
from tests import reference
from tests.strategies import attention_shapes, bool_mask, configs, qkv, seeds

FRONTENDS = {"nnx": nnx_impl, "equinox": equinox_impl}
S, T = 5, 3
few, fewer = (settings(max_examples=max(2, settings.default.max_examples // n)) for n in (5, 10))  # each one compiles
batches = st.sampled_from([(2,), (), (2, 2)])
every_position = pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "none"])


@st.composite
def float64_configs(draw, **fixed):
    """Configurations that compute in float64; their epsilons are large enough to be felt."""
    fields = {
        "num_encoder_layers": draw(st.sampled_from([1, 2, 0])),
        "num_decoder_layers": draw(st.sampled_from([1, 2, 0])),
        "norm_epsilon": draw(st.sampled_from([1e-1, 1e-3])),
        "rotary_theta": draw(st.sampled_from([7.0, 10_000.0])),
    }
    double = {"dtype": "float64", "param_dtype": "float64", "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    return draw(configs(**fields | double | fixed))


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


def rebuilt(frontend, model, config, weights):
    return frontend.evaluation(frontend.from_weights(config, weights, model_class=getattr(frontend, model)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def logits(frontend, model, config, weights, *tokens, **masks):
    return rebuilt(frontend, model, config, weights)(*tokens, **masks)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="label_smoothing")
def loss(frontend, config, weights, batch, *, label_smoothing):
    model = rebuilt(frontend, "Transformer", config, weights)
    return frontend.loss_fn(model, batch, label_smoothing=label_smoothing)[0]


def assert_equals(exact, got, *, depth=0, context=""):
    """Within 1e-12 (1 + depth) of the largest number."""
    tolerance = 1e-12 * (1 + depth) * np.abs(exact).max(initial=0)
    np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance, err_msg=str(context))


@every_position
@given(data=st.data(), batch=batches, seed=seeds)
@few
def test_encoder_decoder_logits_equal_the_oracle(positions, data, batch, seed):
    with jax.enable_x64(True):
        config = data.draw(float64_configs(positions=positions))
        source, source_mask = data.draw(texts(batch, S, config.source_vocab_size))
        target, target_mask = data.draw(texts(batch, T, config.target_vocab_size))
        weights, masks = random_weights(config, seed), {"source_mask": source_mask, "target_mask": target_mask}
        exact = reference.transformer(weights, config, source, target, **masks)
        for name, frontend in FRONTENDS.items():
            got = logits(frontend, "Transformer", config, weights, source, target, **masks)
            depth = config.num_encoder_layers + config.num_decoder_layers
            assert_equals(exact, got, depth=depth, context=(name, config))


@every_position
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@given(data=st.data(), batch=batches, seed=seeds)
@fewer
def test_one_stack_logits_equal_the_oracle(side, positions, data, batch, seed):
    with jax.enable_x64(True):
        config = data.draw(float64_configs(positions=positions, source_vocab_size=13))
        tokens, mask = data.draw(texts(batch, S, 13))
        model, oracle, mask_name, layers = {
            "encoder": ("EncoderOnlyTransformer", reference.encoder_only, "source_mask", config.num_encoder_layers),
            "decoder": ("DecoderOnlyTransformer", reference.decoder_only, "target_mask", config.num_decoder_layers),
        }[side]
        weights = random_weights(config, seed, model)
        for name, frontend in FRONTENDS.items():
            got = logits(frontend, model, config, weights, tokens, **{mask_name: mask})
            assert_equals(oracle(weights, config, tokens, mask), got, depth=layers, context=(name, config))


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
        config = data.draw(float64_configs())
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


@pytest.mark.parametrize("frontend", FRONTENDS.values(), ids=FRONTENDS)
@given(data=st.data(), seed=seeds)
@fewer
def test_loss_gradients_equal_finite_differences(frontend, data, seed):
    with jax.enable_x64(True):
        # one layer costs least to compile, and a large epsilon lets a difference tell the slope
        config = data.draw(float64_configs(num_encoder_layers=1, num_decoder_layers=1, norm_epsilon=0.1))
        weights, batch = random_weights(config, seed), draw_batch(data, config, (2,))
        f = functools.partial(loss, frontend, config, batch=batch, label_smoothing=0.1)
        check_grads(lambda weights: f(weights), (weights,), order=1, eps=1e-6, atol=1e-7, rtol=1e-7)


def _some_attention(q, k, v, bias):
    """A row without keys, a key without queries, and all that adds to the logits."""
    mask = np.random.default_rng(0).random((2, 1, 4, 3, 5)) < 0.7
    mask[0, 0, 1, 2], mask[..., 3] = False, False
    return dot_product_attention(q, k, v, mask=jnp.asarray(mask), bias=bias, causal=True, q_offset=2, window=(3, 0))


def _some_feed_forward(activation, x, *kernels):
    return feed_forward(x, *(lambda x, w=w: linear(x, w) for w in kernels), activation=activation)


def _some_cross_entropy(scores, weights):
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 3)))
    return cross_entropy(scores, labels, weights=jnp.square(weights), label_smoothing=0.1)


DIFFERENTIABLE = {
    "attention": (_some_attention, [(2, 1, 3, 4, 6), (2, 1, 5, 2, 6), (2, 1, 5, 2, 3), (2, 1, 4, 3, 5)]),
    "layer_norm": (functools.partial(layer_norm, epsilon=0.01), [(2, 3, 6), (6,), (6,)]),
    "rms_norm": (functools.partial(rms_norm, epsilon=0.01), [(2, 3, 6), (6,)]),
    "rotary": (lambda x: rotary(x, jnp.arange(4)[None] + jnp.array([[7], [0]])), [(2, 4, 3, 6)]),
    "relu": (functools.partial(_some_feed_forward, "relu"), [(2, 3, 4), (4, 5), (5, 4)]),
    "gelu": (functools.partial(_some_feed_forward, "gelu"), [(2, 3, 4), (4, 5), (5, 4)]),
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
@fewer
def test_derivatives_equal_finite_differences(name, seed):
    with jax.enable_x64(True):
        f, shapes = DIFFERENTIABLE[name]
        check_grads(jax.jit(f), normals(seed, *shapes), order=2, eps=1e-6, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_sinusoidal_tables_equal_the_oracle(width, x64):
    got = sinusoidal(jnp.arange(50, dtype=jnp.int32), width, jnp.float64)
    assert_equals(reference.sinusoidal(50, width), got)


def generated(frontend, model, config, weights, tokens, mask, **how):
    weights, tokens, mask = jax.tree.map(jnp.asarray, (weights, tokens, mask))
    return frontend.generate(rebuilt(frontend, model, config, weights), tokens, source_mask=mask, **how)


def raggedest_end(written):
    """The token that, as the end, makes rows stop at the most different times."""
    rows = written.reshape(-1, written.shape[-1])
    ends = lambda token: [min(np.flatnonzero(row == token), default=len(row)) for row in rows]
    return max(range(13), key=lambda token: (np.ptp(ends(token)), token in written))


@every_position
@given(data=st.data(), batch=batches, seed=seeds, bos_id=st.integers(0, 12))
@fewer
def test_cached_generation_equals_the_uncached_oracle(positions, data, batch, seed, bos_id):
    with jax.enable_x64(True):
        config = data.draw(float64_configs(positions=positions))
        source, mask = data.draw(texts(batch, S, config.source_vocab_size))
        weights = random_weights(config, seed)

        def oracle(eos_id):
            rows = []
            for b in np.ndindex(batch):
                real = None if mask is None else mask[b]
                after = lambda text, b=b, real=real: reference.transformer(weights, config, source[b], text, real)
                rows.append(reference.greedy(after, [bos_id], max_length=6, eos_id=eos_id, pad_id=3))
            return np.array(rows).reshape(*batch, 6)

        eos_id = raggedest_end(oracle(-1))
        for name, frontend in FRONTENDS.items():
            how = {"max_length": 6, "bos_id": bos_id, "eos_id": eos_id, "pad_id": 3}
            got = generated(frontend, "Transformer", config, weights, source, mask, **how)
            np.testing.assert_array_equal(got, oracle(eos_id), err_msg=str((name, config)))


@every_position
@given(data=st.data(), batch=batches, seed=seeds)
@fewer
def test_cached_continuation_of_ragged_prompts_equals_the_uncached_oracle(positions, data, batch, seed):
    with jax.enable_x64(True):
        config = data.draw(float64_configs(positions=positions))
        prompt, mask = data.draw(texts(batch, S, config.target_vocab_size, prompt=True))
        weights = random_weights(config, seed, "DecoderOnlyTransformer")

        def oracle(eos_id):
            after = functools.partial(reference.decoder_only, weights, config)
            rows = [
                reference.greedy(after, prompt[b] if mask is None else prompt[b][mask[b]], max_length=6,
                                 eos_id=eos_id, pad_id=3)
                for b in np.ndindex(batch)
            ]  # fmt: skip
            return np.array(rows).reshape(*batch, 6)

        eos_id = raggedest_end(oracle(-1))
        for name, frontend in FRONTENDS.items():
            how = {"max_length": 6, "eos_id": eos_id, "pad_id": 3}
            got = generated(frontend, "DecoderOnlyTransformer", config, weights, prompt, mask, **how)
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
