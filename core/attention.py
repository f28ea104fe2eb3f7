"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), with its edge cases decided.

The contract, in short; docs/attention.md has the reasons. A mask is True where a query may attend. A query that may
attend to nothing gets exactly 0. A key that no query may see may hold anything, NaN included. Logits, softmax and
sums are at least float32.
"""

import math
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from core.config import check_window
from core.layers import dropout, wide_dtype
from core.masks import Causal, Grid, Mask, Offset, Window, check_broadcasts, combine
from core.relative import Relative

IMPLEMENTATIONS = ("materialised",)


class Rules(TypedDict, total=False):
    """What decides the weights beside q and k; `dot_product_attention` explains each."""

    mask: Mask | Bool[Array, "..."] | None
    bias: Float[Array, "..."] | None
    relative: Relative | None
    causal: bool
    q_offset: Offset | None
    window: tuple[int, int] | None
    scale: float | None
    soft_cap: float | None
    sinks: Float[Array, "N"] | None


def split_heads(x: Float[Array, "*B T D"], num_heads: int) -> Float[Array, "*B T N H"]:
    """D = N * H consecutive features become N heads of width H; ValueError unless N divides D."""
    if num_heads < 1 or x.shape[-1] % num_heads:
        raise ValueError(f"the width D must be a multiple of num_heads, got D={x.shape[-1]}, num_heads={num_heads}")
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: Float[Array, "*B T N H"]) -> Float[Array, "*B T D"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def dot_product_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    mask: Mask | Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    relative: Relative | None = None,
    causal: bool = False,
    q_offset: Offset | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B T N Hv"]:
    """softmax(scale * q k^T + bias) v, in v's dtype.

    Query head n reads key head n // (N // K). `scale` is 1 / sqrt(H) unless given; `soft_cap` c turns the scaled
    logits into c tanh(logits / c) before anything is added to them (Gemma 2, 2024). `mask` is one of core.masks or a
    bool array, True where a query may attend; it and `bias` have the rank of the logits `[*B, N, T, S]`, 1 where they
    broadcast; a bias of -inf blocks. `relative` is one of core.relative. `causal`, `window=(left, right)` (how many
    keys before and after the query's own position), masks and relative encodings go by absolute position: query t
    sits at `q_offset + t`, key s at s; `q_offset` may differ by row. With T != S it must be said: 0 aligns the first
    query with the first key, S - T the last with the last. `sinks` is a logit for each head that takes its share of
    the softmax and has no value (Xiao et al. 2023; gpt-oss, 2025). Dropout acts on the weights, and only with a key.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))  # B=2, T=S=5, N=K=4, H=8
    >>> dot_product_attention(q, k, v, causal=True).shape
    (2, 5, 4, 8)
    """
    return attention_with_weights(
        q, k, v, mask=mask, bias=bias, relative=relative, causal=causal, q_offset=q_offset, window=window, scale=scale,
        soft_cap=soft_cap, sinks=sinks, dropout_rate=dropout_rate, dropout_key=dropout_key,
        implementation=implementation,
    )[0]  # fmt: skip


def attention_with_weights(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: str | None = None,
    **rules: Unpack[Rules],
) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B N T S"]]:
    """`dot_product_attention` and the weights it used, as they were before dropout."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    _check_queries(q, k)
    _check_values(k, v)
    grid, allowed = _grid(q, k, rules), allowed_keys(q, k, **rules)
    weights = _weights(q, k, grid, allowed, rules)
    dropped = dropout(weights, dropout_rate, key=dropout_key)
    out = _isolated_values(dropped, v, allowed)
    if (relative := rules.get("relative")) is not None and (values := relative.values(dropped, grid)) is not None:
        out = out + values.astype(out.dtype)
    return out, weights


def attention_weights(
    q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"], **rules: Unpack[Rules]
) -> Float[Array, "*B N T S"]:
    """softmax(scale * q k^T + bias) over the allowed keys; a row without any is exactly 0."""
    _check_queries(q, k)
    return _weights(q, k, _grid(q, k, rules), allowed_keys(q, k, **rules), rules)


def allowed_keys(
    q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"], **rules: Unpack[Rules]
) -> Bool[Array, "..."] | None:
    """Which keys each query may see, broadcastable to `[*B, N, T, S]`; None: all of them."""
    grid, bias, window = _grid(q, k, rules), rules.get("bias"), rules.get("window")
    if window is not None:
        check_window(window)
    mask = combine(
        rules.get("mask"),
        None if bias is None else _not_blocked(bias, grid),
        Causal() if rules.get("causal") else None,
        None if window is None else Window(*window),
    )
    return None if mask is None else mask.cells(grid)


def weighted_values(weights: Float[Array, "*B N T S"], v: Float[Array, "*B S K Hv"]) -> Float[Array, "*B T N Hv"]:
    """Sum over the keys of weight times value, accumulated in the wider of the two dtypes, in v's dtype."""
    if (*v.shape[:-3], v.shape[-3]) != (*weights.shape[:-3], weights.shape[-1]) or weights.shape[-3] % v.shape[-2]:
        raise ValueError(
            "weights [*B, N, T, S] and v [*B, S, K, Hv] must agree in *B and S, N a multiple of K, "
            f"got weights {weights.shape}, v {v.shape}"
        )
    dtype = max(weights.dtype, v.dtype, key=lambda dtype: dtype.itemsize)
    v_first = v.astype(dtype).swapaxes(-2, -3)
    *batch, heads, queries, keys = weights.shape
    grouped = weights.astype(dtype).reshape(*batch, v.shape[-2], heads // v.shape[-2] * queries, keys)
    out = (grouped @ v_first).reshape(*batch, heads, queries, v.shape[-1])
    return out.swapaxes(-2, -3).astype(v.dtype)


def _weights(q: Array, k: Array, grid: Grid, allowed: Array | None, rules: Rules) -> Array:
    dtype, scale, cap = wide_dtype(q), rules.get("scale"), rules.get("soft_cap")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"soft_cap must be a finite number above 0, or None for no cap, got {cap}")
    q, k = _without_unseeing(q, allowed).astype(dtype), _without_unseen(k, allowed).astype(dtype)
    # q is scaled before the product, so that large finite inputs do not overflow on the way
    logits = _products(q * scale, k)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if (relative := rules.get("relative")) is not None:
        logits = logits + relative.logits(q, k, grid, scale=scale)
    if (bias := rules.get("bias")) is not None:
        logits = logits + bias.astype(dtype)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return _softmax(logits, _sink_logits(rules.get("sinks"), logits))


def _products(q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"]) -> Float[Array, "*B N T S"]:
    q, k = q.swapaxes(-2, -3), k.swapaxes(-2, -3)
    *batch, heads, queries, width = q.shape
    # the queries of one group stand below each other, so that each key head is one plain matrix product
    q = q.reshape(*batch, k.shape[-3], heads // k.shape[-3] * queries, width)
    return jnp.einsum("...th,...sh->...ts", q, k).reshape(*batch, heads, queries, k.shape[-2])


def _softmax(logits: Float[Array, "*B N T S"], sinks: Float[Array, "..."] | None) -> Float[Array, "*B N T S"]:
    highest = logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
    if sinks is not None:
        highest = jnp.maximum(highest, sinks)
    # a row without keys has highest = -inf and total = 0: both are replaced before they can make a NaN
    highest = jax.lax.stop_gradient(jnp.where(highest == -jnp.inf, 0.0, highest))
    exponentials = jnp.exp(logits - highest)
    total = exponentials.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - highest)
    return exponentials / jnp.where(total == 0.0, 1.0, total)


def _sink_logits(sinks: Float[Array, "N"] | None, logits: Float[Array, "*B N T S"]) -> Array | None:
    if sinks is None:
        return None
    heads = logits.shape[-3]
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"sinks must be one logit for each of N={heads} heads, got {sinks.dtype} {sinks.shape}")
    return sinks.astype(logits.dtype).reshape((1,) * (logits.ndim - 3) + (heads, 1, 1))


def _isolated_values(weights: Array, v: Array, allowed: Array | None) -> Array:
    """`weighted_values`, where NaN or Inf in a value makes NaN of the queries that may see it and of no other."""
    if allowed is None:
        return weighted_values(weights, v)
    v = _without_unseen(v, allowed)  # also where it is finite: its gradient may overflow
    finite = jnp.isfinite(v).all(axis=-1)
    hidden = ~finite.swapaxes(-1, -2).repeat(weights.shape[-3] // v.shape[-2], axis=-2)[..., None, :]
    met = (allowed & hidden).any(axis=-1).swapaxes(-1, -2)[..., None]
    return jnp.where(met, jnp.nan, weighted_values(weights, jnp.where(finite[..., None], v, jnp.zeros((), v.dtype))))


def _grid(q: Array, k: Array, rules: Rules) -> Grid:
    return Grid((*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3]), rules.get("q_offset"))


def _not_blocked(bias: Array, grid: Grid) -> Array:
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"bias must be floating point, got {bias.dtype}; a bool mask goes into mask=")
    check_broadcasts("bias", bias.shape, grid.shape)
    return bias != -jnp.inf


def _without_unseen(x: Float[Array, "*B S K H"], allowed: Bool[Array, "..."] | None) -> Float[Array, "*B S K H"]:
    """x with 0 at the keys that no query may see, for 0 * NaN is NaN in the sums that follow."""
    if allowed is None:
        return x
    seen = allowed.any(axis=-2)  # [*B, N, S], 1 where it broadcasts
    if seen.shape[-2] != 1:
        *batch, heads, keys = seen.shape
        seen = seen.reshape(*batch, x.shape[-2], heads // x.shape[-2], keys).any(axis=-2)
    return jnp.where(seen.swapaxes(-1, -2)[..., None], x, jnp.zeros((), x.dtype))


def _without_unseeing(q: Float[Array, "*B T N H"], allowed: Bool[Array, "..."] | None) -> Float[Array, "*B T N H"]:
    """q with 0 at the queries that may see no key: their gradients are 0, whatever they hold."""
    if allowed is None:
        return q
    return jnp.where(allowed.any(axis=-1).swapaxes(-1, -2)[..., None], q, jnp.zeros((), q.dtype))


def _check_queries(q: Array, k: Array) -> None:
    if q.ndim < 3 or k.ndim != q.ndim or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q [*B, T, N, H] and k [*B, S, K, H] must agree in *B and H, got q {q.shape}, k {k.shape}")
    if q.shape[-1] == 0 or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            "the query heads N must be a multiple of the key heads K, and the head width H at least 1, "
            f"got N={q.shape[-2]}, K={k.shape[-2]}, H={q.shape[-1]}"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype != k.dtype:
        raise TypeError(f"q and k must share one floating dtype, got {q.dtype} and {k.dtype}; cast one of them")


def _check_values(k: Array, v: Array) -> None:
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"k and v must agree in all axes but the last, got k {k.shape}, v {v.shape}")
    if not jnp.issubdtype(v.dtype, jnp.floating):
        raise TypeError(f"v must be floating point, got {v.dtype}")
