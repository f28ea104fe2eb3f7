"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), with its edge cases decided.

The contract, in short; docs/attention.md has the reasons. `mask` is bool, True where a query may attend,
with the rank of the logits `[*B, N, T, S]`. A query that may attend to nothing gets exactly 0. A key that no
query may see may hold anything, NaN included. Logits, softmax and sums are at least float32.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from core.layers import dropout, wide_dtype

Offset = int | Integer[Array, "..."]
Window = tuple[int, int]
IMPLEMENTATIONS = ("materialised",)
_FARTHEST = 2**31 - 1  # positions are int32


def split_heads(x: Float[Array, "*B T D"], num_heads: int) -> Float[Array, "*B T N H"]:
    """D = N * H consecutive features become N heads of width H."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: Float[Array, "*B T N H"]) -> Float[Array, "*B T D"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def dot_product_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    causal: bool = False,
    q_offset: Offset | None = None,
    window: Window | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B T N Hv"]:
    """softmax(scale * q k^T + bias) v, in v's dtype.

    Query head n reads key head n // (N // K). `scale` is 1 / sqrt(H) unless given. `bias` is added to the
    scaled logits and broadcasts like the mask; -inf blocks. `causal` and `window=(left, right)` (how many keys
    before and after the query's own position) go by absolute position: query t sits at `q_offset + t`, key s
    at s; `q_offset` may differ by row. With T != S it must be said: 0 aligns the first query with the first
    key, S - T the last with the last. Dropout acts on the weights, and only with a key.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))  # B=2, T=S=5, N=K=4, H=8
    >>> dot_product_attention(q, k, v, causal=True).shape
    (2, 5, 4, 8)
    """
    return attention_with_weights(
        q, k, v, mask=mask, bias=bias, causal=causal, q_offset=q_offset, window=window, scale=scale,
        dropout_rate=dropout_rate, dropout_key=dropout_key, implementation=implementation,
    )[0]  # fmt: skip


def attention_with_weights(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    causal: bool = False,
    q_offset: Offset | None = None,
    window: Window | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B N T S"]]:
    """`dot_product_attention` and the weights it used, as they were before dropout."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    _check_values(q, k, v)
    allowed = allowed_keys(q, k, mask=mask, bias=bias, causal=causal, q_offset=q_offset, window=window)
    k, v = _without_unseen(k, allowed), _without_unseen(v, allowed)
    weights = _softmax(_without_unseeing(q, allowed), k, allowed, bias, scale)
    dropped = dropout(weights, dropout_rate, key=dropout_key)
    return weighted_values(dropped, v), weights


def attention_weights(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    *,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    causal: bool = False,
    q_offset: Offset | None = None,
    window: Window | None = None,
    scale: float | None = None,
) -> Float[Array, "*B N T S"]:
    """softmax(scale * q k^T + bias) over the allowed keys; a row without any is exactly 0."""
    allowed = allowed_keys(q, k, mask=mask, bias=bias, causal=causal, q_offset=q_offset, window=window)
    k = _without_unseen(k, allowed)
    return _softmax(_without_unseeing(q, allowed), k, allowed, bias, scale)


def _softmax(q: Array, k: Array, allowed: Array | None, bias: Array | None, scale: float | None) -> Array:
    dtype = wide_dtype(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    # q is scaled before the product, so that large finite inputs do not overflow on the way
    q, k = (q.astype(dtype) * scale).swapaxes(-2, -3), k.astype(dtype).swapaxes(-2, -3)
    *batch, heads, queries, width = q.shape
    # the queries of one group stand below each other, so that each key head is one plain matrix product
    q = q.reshape(*batch, k.shape[-3], heads // k.shape[-3] * queries, width)
    logits = jnp.einsum("...th,...sh->...ts", q, k).reshape(*batch, heads, queries, k.shape[-2])
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True, initial=-jnp.inf))
    # a row without keys has highest = -inf and total = 0: both are replaced before they can make a NaN
    exponentials = jnp.exp(logits - jnp.where(highest == -jnp.inf, 0.0, highest))
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / jnp.where(total == 0.0, 1.0, total)


def weighted_values(weights: Float[Array, "*B N T S"], v: Float[Array, "*B S K Hv"]) -> Float[Array, "*B T N Hv"]:
    """Sum over the keys of weight times value, accumulated in the weights' dtype, in v's dtype."""
    v_first = v.astype(weights.dtype).swapaxes(-2, -3)
    *batch, heads, queries, keys = weights.shape
    grouped = weights.reshape(*batch, v.shape[-2], heads // v.shape[-2] * queries, keys)
    out = (grouped @ v_first).reshape(*batch, heads, queries, v.shape[-1])
    return out.swapaxes(-2, -3).astype(v.dtype)


def allowed_keys(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    *,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    causal: bool = False,
    q_offset: Offset | None = None,
    window: Window | None = None,
) -> Bool[Array, "..."] | None:
    """Which keys each query may see, broadcastable to `[*B, N, T, S]`; None: all of them."""
    _check_queries(q, k)
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
    conditions = []
    if mask is not None:
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"mask must be bool, True where a query may attend, got {mask.dtype}; "
                "an additive mask goes into bias=, a 0/1 mask through .astype(bool)"
            )
        _check_broadcasts("mask", mask.shape, shape)
        conditions.append(mask)
    if bias is not None:
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(f"bias must be floating point, got {bias.dtype}; a bool mask goes into mask=")
        _check_broadcasts("bias", bias.shape, shape)
        conditions.append(bias != -jnp.inf)
    if causal or window is not None:
        ahead = _keys_ahead(shape, q_offset)
        if causal:
            conditions.append(ahead <= 0)
        if window is not None:
            left, right = _checked_window(window)
            conditions.append((-left <= ahead) & (ahead <= right))
    if not conditions:
        return None
    allowed = conditions[0]
    for condition in conditions[1:]:
        allowed = allowed & condition
    return allowed


def _keys_ahead(shape: tuple[int, ...], q_offset: Offset | None) -> Integer[Array, "..."]:
    """How far each key's position lies ahead of each query's, rank of the logits."""
    *batch, _, queries, keys = shape
    if q_offset is None:
        if queries != keys:
            raise ValueError(
                f"causal and window go by position: with T={queries} queries and S={keys} keys give q_offset, "
                f"0 to align the first query with the first key or S - T = {keys - queries} the last with the last"
            )
        q_offset = 0
    offset = jnp.asarray(q_offset)
    if not jnp.issubdtype(offset.dtype, jnp.integer):
        raise TypeError(f"q_offset must be an integer or an array of them, got {offset.dtype}")
    offset = offset.astype(jnp.int32)
    if offset.shape not in ((), tuple(batch)):
        raise ValueError(f"q_offset must be one integer or have the batch shape {tuple(batch)}, got {offset.shape}")
    offset = offset.reshape(*(offset.shape or (1,) * len(batch)), 1, 1, 1)
    rank = len(shape)
    query = jax.lax.broadcasted_iota(jnp.int32, (1,) * (rank - 2) + (queries, 1), rank - 2)
    key = jax.lax.broadcasted_iota(jnp.int32, (1,) * (rank - 1) + (keys,), rank - 1)
    return key - (query + offset)


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


def _check_values(q: Array, k: Array, v: Array) -> None:
    _check_queries(q, k)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"k and v must agree in all axes but the last, got k {k.shape}, v {v.shape}")
    if not jnp.issubdtype(v.dtype, jnp.floating):
        raise TypeError(f"v must be floating point, got {v.dtype}")


def _check_broadcasts(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if len(got) != len(wanted) or any(g not in (1, w) for g, w in zip(got, wanted, strict=True)):
        raise ValueError(
            f"{name} must broadcast to the logits [*B, N, T, S] = {wanted}, with 1 where it does, got {got}; "
            "core.masks.padding_mask makes one from [*B, S]"
        )


def _checked_window(window: Window) -> Window:
    if not isinstance(window, tuple) or len(window) != 2 or any(type(w) is not int or w < 0 for w in window):
        raise ValueError(
            "window must be (left, right), how many keys before and after the query's own position it may see, "
            f"got {window!r}; a causal window of w keys is causal=True, window=(w - 1, 0)"
        )
    return min(window[0], _FARTHEST), min(window[1], _FARTHEST)
