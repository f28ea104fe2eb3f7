"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), with its edge cases decided.

The contract, in short; docs/attention.md has the reasons. A mask is True where a query may attend. A query that may
attend to nothing gets exactly 0. A key that no query may see may hold anything, NaN included. Logits, softmax and
sums are at least float32.
"""

import functools
from collections.abc import Callable
from typing import Unpack, get_args

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from core.blockwise import blockwise_attention
from core.config import Implementation, check_rate
from core.layers import dropout, wide_dtype
from core.logits import (
    Rules,
    allowed_keys,
    attention_logits,
    check_queries,
    check_values,
    logits_grid,
    sink_logits,
    weighted_values,
)
from core.masks import Grid, Mask, Offset
from core.relative import Relative

IMPLEMENTATIONS = tuple(name for name in get_args(Implementation) if name)
_BLOCKWISE_FROM = 512 * 512  # cells of the logits of one head: docs/performance.md has the measurement


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
    `implementation` is "materialised", "blockwise" (core.blockwise: O(T) memory, derivatives of first order) or None,
    which picks by size. Raises TypeError for a wrong dtype, ValueError for a wrong shape.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))  # B=2, T=S=5, N=K=4, H=8
    >>> dot_product_attention(q, k, v, causal=True).shape
    (2, 5, 4, 8)
    """
    check_implementation(implementation)
    check_queries(q, k)
    if implementation is None:
        implementation = "blockwise" if q.shape[-3] * k.shape[-3] >= _BLOCKWISE_FROM else "materialised"
    rules = Rules(
        mask=mask, bias=bias, relative=relative, causal=causal, q_offset=q_offset, window=window, scale=scale,
        soft_cap=soft_cap, sinks=sinks,
    )  # fmt: skip
    if implementation == "blockwise":
        return blockwise_attention(q, k, v, dropout_rate=dropout_rate, dropout_key=dropout_key, **rules)
    if dropout_key is not None:
        return attention_with_weights(q, k, v, dropout_rate=dropout_rate, dropout_key=dropout_key, **rules)[0]
    check_rate("the dropout rate", dropout_rate)
    return _materialised(q, k, v, rules)


def check_implementation(implementation: str | None) -> None:
    """ValueError unless it is one of `IMPLEMENTATIONS`, or None."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")


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
    """`dot_product_attention` and the weights it used, as they were before dropout: materialised, whatever is named."""
    check_implementation(implementation)
    check_queries(q, k)
    check_values(k, v)
    grid, allowed = logits_grid(q, k, rules), allowed_keys(q, k, **rules)
    exponentials, total = softmax_parts(_logits(q, k, grid, allowed, rules), allowed, rules)
    dropped = dropout(exponentials, dropout_rate, key=dropout_key)
    out = isolated_values(dropped, v, allowed, total, dtype=summed_dtype(v, rules))
    return with_relative_values(out, dropped, total, grid, rules).astype(v.dtype), exponentials / total


def _materialised(q: Array, k: Array, v: Array, rules: Rules) -> Array:
    """The values of `attention_with_weights`; in a program that has no derivative of them, `_quickly`."""
    leaves, tree = jax.tree.flatten((q, k, v, rules))
    is_traced = lambda leaf: isinstance(leaf, Tracer)

    def of_traced(compute):
        def call(*arrays):
            given = iter(arrays)
            return compute(*jax.tree.unflatten(tree, [next(given) if is_traced(leaf) else leaf for leaf in leaves]))

        return call

    exactly = lambda q, k, v, rules: attention_with_weights(q, k, v, **rules)[0]
    values = jax.custom_jvp(of_traced(_quickly))
    values.defjvp(functools.partial(jax.jvp, of_traced(exactly)))
    return values(*filter(is_traced, leaves))


def _quickly(q: Array, k: Array, v: Array, rules: Rules) -> Array:
    """`attention_with_weights`, but by a shorter program as long as all that comes out is finite.

    What is hidden is lowered to -inf by a minimum, which the NaN of a key that others see may survive. A choice between
    elements would not let it, but would end the program that XLA makes on CPUs of the products and all between them.
    """
    grid, allowed = logits_grid(q, k, rules), allowed_keys(q, k, **rules)
    exactly = lambda: attention_with_weights(q, k, v, **rules)[0]
    if allowed is None:
        return exactly()
    check_values(k, v)
    ceiling = jnp.where(allowed, jnp.inf, -jnp.inf)
    exponentials, total = softmax_parts(jnp.minimum(_logits(q, k, grid, allowed, rules), ceiling), None, rules)
    out = weighted_values(exponentials, _without_unseen(v, allowed), total, dtype=summed_dtype(v, rules))
    out = with_relative_values(out, exponentials, total, grid, rules).astype(v.dtype)
    return unless_finite(out, exactly)


def unless_finite(out: Float[Array, "..."], carefully: Callable[[], Array]) -> Float[Array, "..."]:
    """`out`, but `carefully()` if anything in it is NaN or Inf."""
    finite = all_finite(jax.lax.stop_gradient(out))
    if not isinstance(finite, Tracer):  # outside of jit a condition would be compiled at every call
        return out if finite else carefully()
    return jax.lax.cond(finite, lambda: out, carefully)


@jax.custom_batching.custom_vmap
def all_finite(x: Float[Array, "..."]) -> Bool[Array, ""]:
    """Whether nothing in x is NaN or Inf; under `vmap` one answer for all rows, so that a `cond` stays one."""
    return jnp.isfinite(x).all()


@all_finite.def_vmap
def _all_rows_finite(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return all_finite(x), False


def summed_dtype(v: Float[Array, "*B S K Hv"], rules: Rules) -> jnp.dtype:
    """Of the sums of v: a wide one if a relative encoding may add to them, so that all of it is rounded once."""
    return v.dtype if rules.get("relative") is None else wide_dtype(v)


def with_relative_values(
    out: Float[Array, "*B T N Hv"],
    weights: Float[Array, "*B N T S"],
    total: Float[Array, "*B N T 1"],
    grid: Grid,
    rules: Rules,
) -> Float[Array, "*B T N Hv"]:
    """With what a relative encoding adds to the values, by `total`."""
    relative = rules.get("relative")
    values = None if relative is None else relative.values(weights, grid, out.shape[-1])
    return out if values is None else out + (values / total.swapaxes(-2, -3)).astype(out.dtype)


def attention_weights(
    q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"], **rules: Unpack[Rules]
) -> Float[Array, "*B N T S"]:
    """softmax(scale * q k^T + bias) over the allowed keys; a row without any is exactly 0."""
    check_queries(q, k)
    grid, allowed = logits_grid(q, k, rules), allowed_keys(q, k, **rules)
    exponentials, total = softmax_parts(_logits(q, k, grid, allowed, rules), allowed, rules)
    return exponentials / total


def _logits(q: Array, k: Array, grid: Grid, allowed: Array | None, rules: Rules) -> Array:
    """`attention_logits`, whatever stands where nobody looks from or to."""
    return attention_logits(_without_unseeing(q, allowed), _without_unseen(k, allowed), grid, rules)


def softmax_parts(
    logits: Float[Array, "*B N T S"], allowed: Bool[Array, "..."] | None, rules: Rules
) -> tuple[Float[Array, "*B N T S"], Float[Array, "*B N T 1"]]:
    """Their softmax over the allowed keys and the sinks, as exponentials and divisors; a row without any is exactly 0.

    Values are summed before the division: it is by far the smaller one, and then XLA makes one program on CPUs of the
    exponentials, their sum and the product with the values.
    """
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    # no choice between elements from here on, which would end the program that XLA makes of it; a row without keys is
    # as high as the lowest number, for -inf - -inf is NaN
    lowest = float(jnp.finfo(logits.dtype).min)
    highest, sinks = logits.max(axis=-1, keepdims=True, initial=lowest), rules.get("sinks")
    if sinks is not None:
        sinks = sink_logits(sinks, logits)
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    exponentials = jnp.exp(logits - highest)
    total = exponentials.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - highest)
    return exponentials, jnp.maximum(total, 0.5)  # of a row without keys 0, of all others at least 1


def isolated_values(
    weights: Float[Array, "*B N T S"],
    v: Float[Array, "*B S K Hv"],
    allowed: Bool[Array, "..."] | None,
    total: Float[Array, "*B N T 1"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B T N Hv"]:
    """`weighted_values`, where NaN or Inf in a value makes NaN of the queries that may see it and of no other."""
    if allowed is None:
        return weighted_values(weights, v, total, dtype=dtype)
    v = _without_unseen(v, allowed)  # also where it is finite: its gradient may overflow
    finite = jnp.isfinite(v).all(axis=-1)
    finite_v = jnp.where(finite[..., None], v, jnp.zeros((), v.dtype))
    met = _met(~finite, allowed, weights.shape[-3])
    return jnp.where(met, jnp.nan, weighted_values(weights, finite_v, total, dtype=dtype))


def _met(keys: Bool[Array, "*B S K"], allowed: Bool[Array, "..."], heads: int) -> Bool[Array, "*B T N 1"]:
    """Which queries may see any of these keys."""
    cells = keys.swapaxes(-1, -2).repeat(heads // keys.shape[-1], axis=-2)[..., None, :]
    return (allowed & cells).any(axis=-1).swapaxes(-1, -2)[..., None]


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
