"""Equinox: `eqx.nn.MultiheadAttention` with projections that are the identity, norms, dropout and rotary positions."""

import equinox as eqx
import jax
import jax.numpy as jnp

from conformance.adapters import Attention, Dropout, Norm, Rotary, lenient


def attend(q, k, v, *, mask=None, dropout_rate=0.0, dropout_seed=None):
    (rows, _, N, H), Hv = q.shape, v.shape[-1]
    module = eqx.nn.MultiheadAttention(
        N, N * H, value_size=N * Hv, output_size=N * Hv, qk_size=H, vo_size=Hv, dropout_p=dropout_rate,
        inference=dropout_seed is None, dtype=q.dtype, key=jax.random.key(0),
    )  # fmt: skip
    weights = lambda m: [x.weight for x in (m.query_proj, m.key_proj, m.value_proj, m.output_proj)]
    module = eqx.tree_at(weights, module, [jnp.eye(len(w), dtype=w.dtype) for w in weights(module)])
    q, k, v = (x.reshape(rows, x.shape[1], -1) for x in (q, k, v))
    keys = None if dropout_seed is None else jax.random.split(jax.random.key(dropout_seed), rows)
    row = lambda q, k, v, mask, key: module(q, k, v, mask, key=key)
    return jax.vmap(row)(q, k, v, mask, keys).reshape(*q.shape[:2], N, Hv)


CAN = {"jax", "bfloat16", "float16", "float64", "value width", "mask", "dropout"}
attention = Attention("eqx.nn.MultiheadAttention", attend, CAN, lenient)


def by_row(module, x):
    for _ in x.shape[:-1]:
        module = jax.vmap(module)
    return module(x)


def layer_normed(x, scale, bias, *, epsilon):
    module = eqx.nn.LayerNorm(x.shape[-1], eps=epsilon, dtype=x.dtype)
    return by_row(eqx.tree_at(lambda m: (m.weight, m.bias), module, (scale, bias)), x)


def rms_normed(x, scale, *, epsilon):
    module = eqx.nn.RMSNorm(x.shape[-1], eps=epsilon, use_bias=False, dtype=x.dtype)
    return by_row(eqx.tree_at(lambda m: m.weight, module, scale), x)


layer_norm = Norm("eqx.nn.LayerNorm", layer_normed, {"jax", "bfloat16", "float64", "centre", "bias"}, lenient)
rms_norm = Norm("eqx.nn.RMSNorm", rms_normed, {"jax", "bfloat16", "float64"}, lenient)


def drop(x, *, rate, seed=None):
    key = None if seed is None else jax.random.key(seed)
    return eqx.nn.Dropout(rate, inference=seed is None)(x, key=key)


dropout = Dropout("eqx.nn.Dropout", drop, {"jax", "bfloat16"}, lenient)


def turn(x, *, theta):
    module = eqx.nn.RotaryPositionalEmbedding(x.shape[-1], theta)
    over_heads = jax.vmap(module, in_axes=1, out_axes=1)
    return jax.vmap(over_heads)(x)


rotary = Rotary("eqx.nn.RotaryPositionalEmbedding", turn, {"jax", "bfloat16"}, lenient)
adapters = (attention, layer_norm, rms_norm, rotary, dropout)
