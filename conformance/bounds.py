"""How far floating point may lie from the formula."""

import numpy as np
from jaxtyping import Float

from conformance import oracle

U = 2.0**-24
"""Half a unit in the last place of a float32 in [1, 2)."""


def float32_attention(
    q: Float[np.ndarray, "*B T N H"], k: Float[np.ndarray, "*B S K H"], v: Float[np.ndarray, "*B S K Hv"], **options
) -> Float[np.ndarray, "*B T N Hv"]:
    """A bound on each element's error `[*B, T, N, Hv]` of attention in float32, to first order in U.

    Of a row with weights w and logits s, g_j = max s - s_j, and A the largest sum of sizes that met in a logit:
    U ([2 (H + 2) A + sum w g + 2 S + 6] sum w |v| + sum w g |v|) + 2 S 2^-126 max |v|.
    """
    sinks = options.pop("sinks", None)
    keys, width = k.shape[-3], q.shape[-1]
    logits = oracle.scores(q, k, **options)
    weights = oracle.softmax(logits, sinks)
    sizes = oracle.scores(q, k, **options, sizes=True).max(axis=-1, keepdims=True, initial=0)
    highest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        wide = np.asarray(sinks, np.float64)[:, None, None]
        highest, sizes = np.maximum(highest, wide), np.maximum(sizes, np.abs(wide))
    gaps = weights * np.where(np.isneginf(logits), 0.0, highest - logits)
    factor = 2 * (width + 2) * sizes + gaps.sum(axis=-1, keepdims=True) + 2 * keys + 6
    size = np.abs(v)
    tiny = 2 * keys * 2.0**-126 * np.asarray(size.max(initial=0), np.float64)
    return U * (oracle.mix(factor * weights, size) + oracle.mix(gaps, size)) + tiny


def low_precision_attention(
    q: Float[np.ndarray, "*B T N H"], k: Float[np.ndarray, "*B S K H"], v: Float[np.ndarray, "*B S K Hv"], **options
) -> float:
    """Twice the largest error of the plain computation in v's own 16 bit dtype, and the rounding of the result."""
    exact = oracle.attention(q, k, v, **options)
    rounded = lambda x: x.astype(v.dtype).astype(np.float64)
    logits = rounded(oracle.scores(q, k, **options))
    exponentials = rounded(np.exp(logits - logits.max(axis=-1, keepdims=True)))
    weights = rounded(exponentials / rounded(exponentials.sum(axis=-1, keepdims=True)))
    naive = rounded(oracle.mix(weights, v))
    there_and_back = rounded(rounded(exact + 0.3) - 0.3)
    last = np.abs(rounded(exact) - exact).max(initial=0)
    return 2 * np.abs(naive - exact).max(initial=0) + 2 * np.abs(there_and_back - exact).max(initial=0) + last


def float32_norm(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray | float, epsilon: float, centre: bool
) -> np.ndarray:
    """A bound on the error of a norm in float32 that centres before it squares."""
    x = np.asarray(x, np.float64)
    width = x.shape[-1]
    centred = x - x.mean(axis=-1, keepdims=True) if centre else x
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    shift = (width + 2) * np.abs(x).max(axis=-1, keepdims=True) / deviation if centre else 0.0
    normed = np.abs(centred / deviation)
    return 2 * U * ((shift * (1 + normed) + (width + 12) * normed) * np.abs(scale) + np.abs(bias))
