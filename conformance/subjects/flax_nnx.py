"""Flax NNX: `nnx.dot_product_attention`, `nnx.MultiHeadAttention`, its cache, norms and dropout.

Modules are given projections that are the identity, so that q, k and v reach attention as they are.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from conformance.adapters import Attention, Cache, Dropout, Norm, compiled, lenient

CAN = {"jax", "bfloat16", "float16", "grouped heads", "mask", "broadcast mask", "causal", "combined", "dropout"}


def attend(q, k, v, *, mask=None, bias=None, causal=False, dropout_rate=0.0, dropout_seed=None):
    return nnx.dot_product_attention(
        q, k, v, bias, mask,
        is_causal=causal, dropout_rate=dropout_rate, deterministic=dropout_seed is None,
        dropout_rng=None if dropout_seed is None else jax.random.key(dropout_seed),
    )  # fmt: skip


def multi_head(q, k, v, *, mask=None, causal=False, dropout_rate=0.0, dropout_seed=None):
    (N, H), (K, _) = q.shape[-2:], k.shape[-2:]
    module = nnx.MultiHeadAttention(
        N, N * H, num_kv_heads=K, in_kv_features=K * H, dropout_rate=dropout_rate, decode=False,
        deterministic=dropout_seed is None, param_dtype=q.dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    for layer in (module.query, module.key, module.value, module.out):
        inputs = layer.kernel.shape[0] if layer is not module.out else N * H
        layer.kernel[...] = jnp.eye(inputs, dtype=q.dtype).reshape(layer.kernel.shape)
    flat = (x.reshape(*x.shape[:-2], -1) for x in (q, k, v))
    rngs = None if dropout_seed is None else nnx.Rngs(dropout=jax.random.key(dropout_seed))
    return module(*flat, mask=mask, is_causal=causal, rngs=rngs).reshape(q.shape)


attention = Attention("nnx.dot_product_attention", attend, CAN | {"bias", "leading axes"}, lenient)
multi_head_attention = Attention("nnx.MultiHeadAttention", multi_head, CAN, lenient)


def layer_normed(x, scale, bias, *, epsilon, **settings):
    module = nnx.LayerNorm(x.shape[-1], epsilon=epsilon, param_dtype=x.dtype, rngs=nnx.Rngs(0), **settings)
    module.scale[...], module.bias[...] = scale, bias  # pyright: ignore[reportOptionalSubscript]
    return module(x)


def rms_normed(x, scale, *, epsilon):
    module = nnx.RMSNorm(x.shape[-1], epsilon=epsilon, param_dtype=x.dtype, rngs=nnx.Rngs(0))
    module.scale[...] = scale  # pyright: ignore[reportOptionalSubscript]
    return module(x)


CAN_NORM = {"jax", "bfloat16", "centre", "bias"}
layer_norm = Norm("nnx.LayerNorm", layer_normed, CAN_NORM, lenient)
layer_norm_slow = Norm(
    "nnx.LayerNorm(use_fast_variance=False)",
    functools.partial(layer_normed, use_fast_variance=False),
    CAN_NORM,
    lenient,
)
rms_norm = Norm("nnx.RMSNorm", rms_normed, {"jax", "bfloat16"}, lenient)


def drop(x, *, rate, seed=None):
    module = nnx.Dropout(rate, deterministic=seed is None)
    return module(x, rngs=None if seed is None else nnx.Rngs(dropout=jax.random.key(seed)))


dropout = Dropout("nnx.Dropout", drop, {"jax", "bfloat16"}, lenient)


# the cache of MultiHeadAttention(decode=True), with and without is_causal=True; its state is split off


@functools.cache
def decoder(capacity: int):
    module = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
    module.init_cache((1, capacity, 8))
    return nnx.split(module)


def start(rows, capacity):
    graph, _ = decoder(capacity)
    module = nnx.merge(*decoder(capacity))
    module.init_cache((rows, capacity, 8))
    return graph, nnx.state(module)


def step(causal, state, x):
    graph, arrays = state
    out, arrays = _step(causal)(x, arrays, graph=graph)
    return out, (graph, arrays)


@functools.cache
def _step(causal):
    def run(x, arrays, *, graph):
        module = nnx.merge(graph, arrays)
        return module(x, is_causal=causal), nnx.state(module)

    return compiled(run)


@functools.cache
def _whole():
    graph, arrays = decoder(1)
    run = compiled(lambda x, arrays: nnx.merge(graph, arrays)(x, decode=False, is_causal=True))
    return lambda x: run(x, arrays)


def select(state, rows):
    graph, arrays = state
    return graph, jax.tree.map(lambda x: x[rows] if x.ndim == 4 else x, arrays)


def truncate(state, lengths):
    """The index is one for all rows."""
    graph, arrays = state
    module = nnx.merge(graph, arrays)
    module.cache_index[...] = jnp.asarray(lengths[0], jnp.int32)
    return graph, nnx.state(module)


def decoding(name, causal):
    return Cache(
        name,
        functools.partial(step, causal),
        {"reorder", "truncate"},
        lenient,
        width=8,
        start=start,
        full=lambda x: _whole()(x),
        select=select,
        truncate=truncate,
    )


cache = decoding("nnx.MultiHeadAttention(decode=True)", False)
cache_causal = decoding("the same, called with is_causal=True", True)
adapters = (
    attention, multi_head_attention, cache, cache_causal, layer_norm, layer_norm_slow, rms_norm, dropout,
)  # fmt: skip
