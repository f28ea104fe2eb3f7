"""The logits of attention, and who may see whom: what all its implementations share, so that all accept the same."""

import math
from numbers import Real
from typing import TypedDict, Unpack

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from core.config import check_window
from core.layers import wide_dtype, wider_dtype
from core.masks import Causal, Grid, Mask, Offset, Window, check_broadcasts, combine
from core.relative import Relative


class Rules(TypedDict, total=False):
    """What decides the weights beside q and k; `core.attention.dot_product_attention` explains each."""

    mask: Mask | Bool[Array, "..."] | None
    bias: Float[Array, "..."] | None
    relative: Relative | None
    causal: bool
    q_offset: Offset | None
    window: tuple[int, int] | None
    scale: float | None
    soft_cap: float | None
    sinks: Float[Array, "N"] | None


def attention_logits(
    q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"], grid: Grid, rules: Rules
) -> Float[Array, "*B N T S"]:
    """cap(scale * q k^T) + relative + bias, in at least float32; sinks and masks are the caller's."""
    dtype, scale = wide_dtype(q), logits_scale(q, rules)
    q, k = q.astype(dtype), k.astype(dtype)
    # q is scaled before the product, so that large finite inputs do not overflow on the way
    return completed_logits(head_products(q * scale, k), q, k, grid, rules)


def head_products(q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"]) -> Float[Array, "*B N T S"]:
    """q k^T, head by head."""
    q, k = q.swapaxes(-2, -3), k.swapaxes(-2, -3)
    *batch, heads, queries, width = q.shape
    # the queries of one group stand below each other, so that each key head is one plain matrix product
    q = q.reshape(*batch, k.shape[-3], heads // k.shape[-3] * queries, width)
    return jnp.einsum("...th,...sh->...ts", q, k).reshape(*batch, heads, queries, k.shape[-2])


def completed_logits(
    products: Float[Array, "*B N T S"],
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    grid: Grid,
    rules: Rules,
) -> Float[Array, "*B N T S"]:
    """The scaled products, capped, with all that is added to them."""
    cap, logits = rules.get("soft_cap"), products
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if (relative := rules.get("relative")) is not None:
        logits = logits + relative.logits(q, k, grid, scale=logits_scale(q, rules))
    if (bias := rules.get("bias")) is not None:
        logits = logits + bias.astype(logits.dtype)
    return logits


def logits_scale(q: Float[Array, "*B T N H"], rules: Rules) -> float:
    """What the products are multiplied with."""
    scale = rules.get("scale")
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def logits_grid(q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"], rules: Rules) -> Grid:
    """The cells of these logits."""
    return Grid((*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3]), rules.get("q_offset"))


def given_mask(rules: Rules) -> Mask | None:
    """All the masks of the rules as one; a bias blocks besides."""
    window = rules.get("window")
    if window is not None:
        check_window(window)
    return combine(
        rules.get("mask"),
        Causal() if rules.get("causal") else None,
        None if window is None else Window(*window),
    )


def allowed_keys(
    q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"], **rules: Unpack[Rules]
) -> Bool[Array, "..."] | None:
    """Which keys each query may see, broadcastable to `[*B, N, T, S]`; None: all of them."""
    check_rules(rules)
    grid, bias = logits_grid(q, k, rules), rules.get("bias")
    mask = combine(given_mask(rules), None if bias is None else _not_blocked(bias, grid))
    return None if mask is None else mask.cells(grid)


def _not_blocked(bias: Array, grid: Grid) -> Array:
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"bias must be floating point, got {bias.dtype}; a bool mask goes into mask=")
    check_broadcasts("bias", bias.shape, grid.shape)
    return bias != -jnp.inf


def sink_logits(sinks: Float[Array, "N"], logits: Float[Array, "*B N T S"]) -> Float[Array, "..."]:
    """The sinks with the rank of the logits."""
    heads = logits.shape[-3]
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"sinks must be one logit for each of N={heads} heads, got {sinks.dtype} {sinks.shape}")
    return sinks.astype(logits.dtype).reshape((1,) * (logits.ndim - 3) + (heads, 1, 1))


def weighted_values(
    weights: Float[Array, "*B N T S"],
    v: Float[Array, "*B S K Hv"],
    total: Float[Array, "*B N T 1"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B T N Hv"]:
    """Sum over the keys of weight times value, by `total`, accumulated in the wider of the two dtypes.

    It comes in v's dtype unless another is named.
    """
    if (*v.shape[:-3], v.shape[-3]) != (*weights.shape[:-3], weights.shape[-1]) or weights.shape[-3] % v.shape[-2]:
        raise ValueError(
            "weights [*B, N, T, S] and v [*B, S, K, Hv] must agree in *B and S, N a multiple of K, "
            f"got weights {weights.shape}, v {v.shape}"
        )
    wider = wider_dtype(weights.dtype, v.dtype)
    v_first = v.astype(wider).swapaxes(-2, -3)
    *batch, heads, queries, keys = weights.shape
    grouped = weights.astype(wider).reshape(*batch, v.shape[-2], heads // v.shape[-2] * queries, keys)
    out = (grouped @ v_first).reshape(*batch, heads, queries, v.shape[-1])
    out = out if total is None else out / total.astype(wider)
    return out.swapaxes(-2, -3).astype(v.dtype if dtype is None else dtype)


def check_rules(rules: Rules) -> None:
    """TypeError or ValueError for a rule that there is not, and for a value that is of no use to any attention."""
    if unknown := sorted(rules.keys() - Rules.__annotations__.keys()):
        raise TypeError(f"attention has no rule {', '.join(unknown)}; the rules are {', '.join(Rules.__annotations__)}")
    causal, relative, scale, cap = (rules.get(name) for name in ("causal", "relative", "scale", "soft_cap"))
    if not isinstance(causal, bool | np.bool | None):
        raise TypeError(f"causal must be True or False, got {causal!r}; an array goes into mask=")
    if not isinstance(relative, Relative | None):
        raise TypeError(f"relative must be one of core.relative, such as ALiBi(), or None, got {relative!r}")
    for name in ("bias", "sinks"):
        if not isinstance(rules.get(name), Array | np.ndarray | None):
            raise TypeError(f"{name} must be an array or None, got {rules.get(name)!r}")
    if scale is not None and not (isinstance(scale, Real) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number, or None for 1 / sqrt(H), got {scale}; scale q by an array")
    if cap is not None and not (isinstance(cap, Real) and 0 < float(cap) < math.inf):
        raise ValueError(f"soft_cap must be a finite number above 0, or None for no cap, got {cap}")


def check_queries(q: Array, k: Array) -> None:
    """ValueError or TypeError unless q and k fit each other."""
    if q.ndim < 3 or k.ndim != q.ndim or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q [*B, T, N, H] and k [*B, S, K, H] must agree in *B and H, got q {q.shape}, k {k.shape}")
    if q.shape[-1] == 0 or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            "the query heads N must be a multiple of the key heads K, and the head width H at least 1, "
            f"got N={q.shape[-2]}, K={k.shape[-2]}, H={q.shape[-1]}"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype != k.dtype:
        raise TypeError(f"q and k must share one floating dtype, got {q.dtype} and {k.dtype}; cast one of them")


def check_values(k: Array, v: Array) -> None:
    """ValueError or TypeError unless v fits k."""
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"k and v must agree in all axes but the last, got k {k.shape}, v {v.shape}")
    if not jnp.issubdtype(v.dtype, jnp.floating):
        raise TypeError(f"v must be floating point, got {v.dtype}")
