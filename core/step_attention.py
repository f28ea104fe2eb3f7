"""Attention of one query, as in a decoding step: keys and values are read as they lie, none of them is copied.

What `core.attention` does to keys and values first, so that no NaN may pass from what a query does not see, waits here
until something is not finite: the rows of all keys are many times what one query makes of them.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from core.attention import isolated_values, softmax_parts, summed_dtype, unless_finite, with_relative_values
from core.layers import wide_dtype, wider_dtype
from core.logits import (
    Rules,
    allowed_keys,
    attention_logits,
    check_queries,
    check_values,
    completed_logits,
    logits_grid,
    logits_scale,
    weighted_values,
)


def step_attention(
    q: Float[Array, "*B 1 N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    owners: Integer[Array, "*B S"] | None = None,
    **rules: Unpack[Rules],
) -> Float[Array, "*B 1 N Hv"]:
    """`core.attention.dot_product_attention`, with derivatives only where all is finite.

    With `owners` the last of *B are beams, and what beam w has at position s is that of beam owners[w, s].
    """
    check_queries(q, k)
    check_values(k, v)
    relative = rules.get("relative")
    if owners is not None and relative is not None:
        k, v, owners = _gathered(k, owners), _gathered(v, owners), None
    grid, allowed, dtype = logits_grid(q, k, rules), allowed_keys(q, k, **rules), summed_dtype(v, rules)
    owned = None if owners is None else _owned(owners)
    if owned is None:
        logits = attention_logits(q, k, grid, rules)
    else:
        scaled = q.astype(wide_dtype(q)) * logits_scale(q, rules)
        logits = completed_logits(_owned_products(scaled, k, owned), q, k, grid, rules)
    exponentials, total = softmax_parts(logits, allowed, rules)
    if owned is None:
        out = weighted_values(exponentials, v, total, dtype=dtype)
    else:
        out = _owned_values(exponentials, v, owned, total)
    if allowed is not None:
        finite = jnp.isfinite(out).all(axis=-1, keepdims=True)
        own = lambda: v if owners is None else _gathered(v, owners)
        seen = lambda: isolated_values(exponentials, own(), allowed, total, dtype=dtype)
        out = unless_finite(out, lambda: jnp.where(finite, out, seen()))
    return with_relative_values(out, exponentials, total, grid, rules).astype(v.dtype)


def _gathered(x: Float[Array, "*B W S K H"], owners: Integer[Array, "*B W S"]) -> Float[Array, "*B W S K H"]:
    """What each beam has seen, moved to where it is."""
    return jnp.take_along_axis(x, owners[..., None, None], axis=x.ndim - 4)


def _owned(owners: Integer[Array, "*B W S"]) -> Bool[Array, "*B O 1 W 1 S"]:
    """Whether beam O holds what beam W has at S."""
    beams = owners.shape[-2]
    holders = jax.lax.broadcasted_iota(owners.dtype, (*(1,) * (owners.ndim - 2), beams, 1, 1), owners.ndim - 2)
    return (owners[..., None, :, :] == holders)[..., :, None, :, None, :]


def _owned_products(
    q: Float[Array, "*B W 1 N H"], k: Float[Array, "*B W S K H"], owned: Bool[Array, "*B O 1 W 1 S"]
) -> Float[Array, "*B W N 1 S"]:
    """q k^T of all beams of a row with the keys in all its slots, of which each keeps what is its own."""
    *batch, beams, _, heads, width = q.shape
    keys, kv_heads = k.shape[-3:-1]
    grouped = q.reshape(*batch, 1, beams, kv_heads, heads // kv_heads, width).swapaxes(-3, -4)
    grouped = grouped.reshape(*batch, 1, kv_heads, beams * heads // kv_heads, width)
    grouped = jnp.broadcast_to(grouped, (*batch, beams, *grouped.shape[-3:]))
    products = jnp.einsum("...th,...sh->...ts", grouped, k.astype(q.dtype).swapaxes(-2, -3))
    products = products.reshape(*batch, beams, kv_heads, beams, heads // kv_heads, keys)
    own = jnp.where(owned, products, 0).sum(axis=len(batch))
    return own.swapaxes(-3, -4).reshape(*batch, beams, heads, 1, keys)


def _owned_values(
    weights: Float[Array, "*B W N 1 S"],
    v: Float[Array, "*B W S K Hv"],
    owned: Bool[Array, "*B O 1 W 1 S"],
    total: Float[Array, "*B W N 1 1"],
) -> Float[Array, "*B W 1 N Hv"]:
    """`weighted_values`, each value taken from the slots that hold it."""
    *batch, beams, heads, _, keys = weights.shape
    kv_heads, width = v.shape[-2:]
    dtype = wider_dtype(weights.dtype, v.dtype)
    grouped = weights.astype(dtype).reshape(*batch, 1, beams, kv_heads, heads // kv_heads, keys).swapaxes(-3, -4)
    grouped = jnp.where(owned, grouped, 0).reshape(*batch, beams, kv_heads, beams * heads // kv_heads, keys)
    parts = grouped @ v.astype(dtype).swapaxes(-2, -3)
    out = parts.reshape(*batch, beams, kv_heads, beams, heads // kv_heads, width).sum(axis=len(batch))
    out = out.swapaxes(-3, -4).reshape(*batch, beams, heads, 1, width) / total.astype(dtype)
    return out.swapaxes(-2, -3).astype(v.dtype)
