"""Where the frameworks' own layers mean the same as ours, they agree: in float64, and jax.nn in float32."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import TransformerConfig
from core.layers import layer_norm, rms_norm
from core.losses import cross_entropy
from tests import reference
from tests.strategies import attention_shapes, bool_mask, qkv, seeds, square_shapes
from tests.test_reference import FRONTENDS, attend, random_weights, rebuilt, rounding_bound

FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}
close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
every_frontend = pytest.mark.parametrize("frontend", FRONTENDS.values(), ids=FRONTENDS)
few = settings(max_examples=max(2, settings.default.max_examples // 5))
peer_attend = eqx.filter_jit(jax.nn.dot_product_attention)


@pytest.fixture(autouse=True)
def lenient():
    """The peers promote ranks and dtypes; everywhere else the suite forbids it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def live_mask(shape, seed):
    """Every query sees at least one key: a row without any is where the peers leave our contract."""
    mask = np.array(np.broadcast_to(bool_mask(shape, seed), (*shape.batch, shape.N, shape.T, shape.S)))
    mask[..., seed % shape.S] = True
    return mask


def flat(x):
    """The peers know one leading axis: all of ours in one."""
    return x.reshape(-1, *x.shape[-3:])


def assert_within_bounds(shape, seed, ours, theirs):
    """Both lie within the float32 bound of the exact result; jax.nn computes in float32 whatever comes."""
    q, k, v = qkv(shape._replace(Hv=shape.H), seed)
    got = attend(q, k, v, **ours)
    wanted = peer_attend(flat(q), flat(k), flat(v), **theirs).reshape(q.shape)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    bound = rounding_bound(*wide, reference.attention_scores(*wide[:2], **ours), **ours)
    np.testing.assert_array_less(np.abs(got - wanted), 2 * bound, err_msg=f"{shape} {ours}")


@given(shape=attention_shapes, seed=seeds, masked=st.booleans(), biased=st.booleans())
def test_attention_equals_that_of_jax_nn(shape, seed, masked, biased):
    bias = np.random.default_rng(seed).standard_normal((*shape.batch, shape.N, shape.T, shape.S))
    how = {"mask": live_mask(shape, seed)} if masked else {"scale": 0.7}
    how |= {"bias": bias.astype("float32")} if biased else {}
    flattened = {name: flat(x) if isinstance(x, np.ndarray) else x for name, x in how.items()}
    assert_within_bounds(shape, seed, how, flattened)


@given(shape=square_shapes, seed=seeds, window=st.sampled_from([None, (1, 0), (2, 1)]))
def test_causal_attention_equals_that_of_jax_nn(shape, seed, window):
    theirs = {"is_causal": True, "local_window_size": window}
    assert_within_bounds(shape, seed, {"causal": True, "window": window}, theirs)


def attention_case(frontend, seed, kv_heads=None):
    """Attention of a model with random weights, those weights, queries, a memory and a mask `[B, N, T, S]`."""
    layers = {"num_encoder_layers": 0, "num_decoder_layers": 1, "num_heads": 4, "num_kv_heads": kv_heads}
    vocabularies = {"source_vocab_size": 2, "target_vocab_size": 2}
    config = TransformerConfig(d_model=12, d_ff=3, attention_bias=True, **layers, **vocabularies, **FLOAT64)
    rng = np.random.default_rng(seed)
    x, memory, mask = rng.standard_normal((2, 3, 12)), rng.standard_normal((2, 5, 12)), rng.random((2, 4, 3, 5)) < 0.6
    mask[..., seed % 5] = True
    weights, x, memory, mask = jax.tree.map(jnp.asarray, (random_weights(config, seed), x, memory, mask))
    attention = rebuilt(frontend, "Transformer", config, weights).decoder.blocks[0].cross_attention
    return attention, reference.below(weights, "decoder.blocks.0.cross_attention"), x, memory, mask


@every_frontend
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@given(seed=seeds)
@few
def test_multi_head_attention_equals_that_of_nnx(frontend, kv_heads, seed):
    with jax.enable_x64(True):
        ours, weights, x, memory, mask = attention_case(frontend, seed, kv_heads)
        theirs = nnx.MultiHeadAttention(
            4, 12, num_kv_heads=kv_heads, param_dtype=jnp.float64, deterministic=True, decode=False, rngs=nnx.Rngs(0)
        )
        for name, peer in {"q": theirs.query, "k": theirs.key, "v": theirs.value, "o": theirs.out}.items():
            peer.kernel[...] = weights[f"{name}_proj.kernel"].reshape(peer.kernel.shape)
            peer.bias[...] = weights[f"{name}_proj.bias"].reshape(peer.bias.shape)
        # asked for its weights it leaves jax.nn, and so float32
        out, sown = nnx.capture(theirs, nnx.Intermediate)(x, memory, mask=mask, sow_weights=True)
        got, attention_weights = ours.run(x, memory, mask=mask, return_weights=True)
        close(got, out)
        close(attention_weights, sown["attention_weights"][0])


@every_frontend
@given(seed=seeds)
@few
def test_multi_head_attention_equals_that_of_equinox(frontend, seed):
    with jax.enable_x64(True):
        ours, weights, x, memory, mask = attention_case(frontend, seed)
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        theirs = eqx.nn.MultiheadAttention(4, 12, **biases, dtype=jnp.float64, key=jax.random.key(0))
        projections = lambda m: [m.query_proj, m.key_proj, m.value_proj, m.output_proj]
        leaves = lambda m: [leaf for p in projections(m) for leaf in (p.weight, p.bias)]
        named = [(weights[f"{name}_proj.kernel"].T, weights[f"{name}_proj.bias"]) for name in "qkvo"]
        theirs = eqx.tree_at(leaves, theirs, [leaf for pair in named for leaf in pair])
        close(ours(x, memory, mask=mask), jax.vmap(theirs)(x, memory, memory, mask))


@given(seed=seeds, mean=st.sampled_from([0.0, 100.0]))
def test_layer_norm_equals_those_of_nnx_and_equinox(seed, mean):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x, scale, bias = (jnp.asarray(rng.standard_normal(shape)) for shape in [(2, 3, 6), 6, 6])
        got = layer_norm(x + mean, scale, bias, epsilon=0.01)
        theirs = nnx.LayerNorm(6, epsilon=0.01, use_fast_variance=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        theirs.scale[...], theirs.bias[...] = scale, bias
        close(got, theirs(x + mean))
        theirs = eqx.nn.LayerNorm(6, eps=0.01, dtype=jnp.float64)
        theirs = eqx.tree_at(lambda m: (m.weight, m.bias), theirs, (scale, bias))
        close(got, jax.vmap(jax.vmap(theirs))(x + mean))


@given(seed=seeds)
def test_rms_norm_equals_those_of_nnx_and_equinox(seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x, scale = (jnp.asarray(rng.standard_normal(shape)) for shape in [(2, 3, 6), 6])
        got = rms_norm(x, scale, epsilon=0.01)
        theirs = nnx.RMSNorm(6, epsilon=0.01, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        theirs.scale[...] = scale
        close(got, theirs(x))
        theirs = eqx.nn.RMSNorm(6, eps=0.01, use_bias=False, dtype=jnp.float64)
        close(got, jax.vmap(jax.vmap(eqx.tree_at(lambda m: m.weight, theirs, scale)))(x))


@given(seed=seeds, label_smoothing=st.sampled_from([0.0, 0.1, 0.9]))
def test_cross_entropy_equals_that_of_optax(seed, label_smoothing):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        logits, labels = jnp.asarray(3 * rng.standard_normal((2, 3, 7))), jnp.asarray(rng.integers(0, 7, (2, 3)))
        weights = jnp.asarray(rng.random((2, 3)))
        theirs = optax.softmax_cross_entropy(
            logits, optax.smooth_labels(jax.nn.one_hot(labels, 7, dtype=jnp.float64), label_smoothing)
        )
        got = cross_entropy(logits, labels, weights=weights, label_smoothing=label_smoothing)
        close(got, (theirs * weights).sum() / weights.sum())
        plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        close(cross_entropy(logits, labels), plain.mean())
