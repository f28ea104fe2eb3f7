"""The formulas of the papers in NumPy float64. Shares no code with any implementation that it judges."""

import math
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int


def allowed_keys(
    shape: tuple[int, ...],
    *,
    mask: Bool[np.ndarray, "..."] | None = None,
    bias: Float[np.ndarray, "..."] | None = None,
    causal: bool = False,
    q_offset: Int[np.ndarray, "*B"] | int = 0,
    window: tuple[int, int] | None = None,
) -> Bool[np.ndarray, "*B N T S"]:
    """Which keys each query may see, bool `[*B, N, T, S]` = shape."""
    *batch, _, queries, keys = shape
    position = np.broadcast_to(q_offset, batch)[..., None, None, None] + np.arange(queries)[:, None]
    ahead = np.arange(keys) - position
    allowed = np.ones(shape, bool)
    if mask is not None:
        allowed &= mask
    if bias is not None:
        allowed &= bias != -np.inf
    if causal:
        allowed &= ahead <= 0
    if window is not None:
        allowed &= (-window[0] <= ahead) & (ahead <= window[1])
    return allowed


def scores(
    q: Float[np.ndarray, "*B T N H"],
    k: Float[np.ndarray, "*B S K H"],
    *,
    bias: Float[np.ndarray, "..."] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sizes: bool = False,
    **visibility,
) -> Float[np.ndarray, "*B N T S"]:
    """The logits `[*B, N, T, S]`, -inf where a query may not see a key.

    With `sizes` every term is taken by its size: how large the numbers were that met in a logit.
    """
    q, k = (np.abs(x) if sizes else x for x in (np.asarray(q, np.float64), np.asarray(k, np.float64)))
    k = np.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)  # query head n reads key head n // (N // K)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = np.einsum("...tnh,...snh->...nts", q, k) * (abs(scale) if sizes else scale)
    if soft_cap is not None:
        logits = logits + 4 * np.minimum(logits, soft_cap) if sizes else soft_cap * np.tanh(logits / soft_cap)
    if bias is not None:
        wide = np.where(bias == -np.inf, 0.0, np.asarray(bias, np.float64))
        logits = logits + (np.abs(wide) if sizes else wide)
    allowed = allowed_keys(logits.shape, bias=bias, **visibility)
    return np.where(allowed, logits, -np.inf)


def softmax(
    logits: Float[np.ndarray, "*B N T S"], sinks: Float[np.ndarray, "N"] | None = None
) -> Float[np.ndarray, "*B N T S"]:
    """exp(l_j) / sum_i exp(l_i) over the last axis, a row of -inf gives 0; a sink adds to the sum alone."""
    highest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    sink = np.asarray([-np.inf] if sinks is None else sinks, np.float64)[:, None, None]
    highest = np.maximum(highest, sink)
    highest = np.where(np.isneginf(highest), 0.0, highest)
    exponentials = np.exp(logits - highest)
    total = exponentials.sum(axis=-1, keepdims=True) + np.exp(sink - highest)
    return exponentials / np.where(total == 0, 1.0, total)


def mix(weights: Float[np.ndarray, "*B N T S"], v: Float[np.ndarray, "*B S K Hv"]) -> Float[np.ndarray, "*B T N Hv"]:
    """Sum of weight times value, `[*B, T, N, Hv]`."""
    v = np.repeat(np.asarray(v, np.float64), weights.shape[-3] // v.shape[-2], axis=-2)
    return np.einsum("...nts,...snh->...tnh", weights, v)


def attention(
    q: Float[np.ndarray, "*B T N H"],
    k: Float[np.ndarray, "*B S K H"],
    v: Float[np.ndarray, "*B S K Hv"],
    *,
    sinks: Float[np.ndarray, "N"] | None = None,
    **options,
) -> Float[np.ndarray, "*B T N Hv"]:
    """softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, section 3.2.1)."""
    return mix(softmax(scores(q, k, **options), sinks), v)


def norm(
    x: Float[np.ndarray, "*B D"],
    scale: Float[np.ndarray, "D"],
    bias: Float[np.ndarray, "D"] | float,
    epsilon: float,
    centre: bool,
) -> Float[np.ndarray, "*B D"]:
    """Layer norm (Ba et al. 2016), or without centring RMS norm (Zhang and Sennrich 2019)."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=-1, keepdims=True) if centre else x
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return centred / deviation * np.asarray(scale, np.float64) + bias


def rotary(
    x: Float[np.ndarray, "*B T N H"], positions: Int[np.ndarray, "*B T"], theta: float, interleaved: bool = False
) -> Float[np.ndarray, "*B T N H"]:
    """Turns pair i of x `[*B, T, N, H]` by position * theta^(-2i/H) (Su et al. 2021).

    Pair i is (i, i + H/2), or interleaved (2i, 2i + 1).
    """
    x = np.asarray(x, np.float64)
    pairs = x.shape[-1] // 2
    angles = np.asarray(positions, np.float64)[..., None, None] * theta ** (-np.arange(pairs) / pairs)
    one, two = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, pairs), slice(pairs, None))
    out = np.empty_like(x)
    out[..., one] = x[..., one] * np.cos(angles) - x[..., two] * np.sin(angles)
    out[..., two] = x[..., two] * np.cos(angles) + x[..., one] * np.sin(angles)
    return out


def sinusoidal(positions: Int[np.ndarray, "L"], d_model: int) -> Float[np.ndarray, "L D"]:
    """sin(p / 10000^(2i/D)) in column 2i, cos in 2i + 1 (2017, section 3.5); an odd table is cut from an even one."""
    even = d_model + d_model % 2
    angles = np.asarray(positions, np.float64)[:, None] * 10_000.0 ** (-np.arange(0, even, 2) / even)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(positions), even)[:, :d_model]


def bucket(distance: int, *, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """The bucket of key minus query (Raffel et al. 2020), in exact integers.

    Half of the buckets are for single distances, the others grow geometrically up to max_distance:
    exact + floor(log(n / exact) / log(max_distance / exact) * (buckets - exact)).
    """
    first, n = 0, -distance
    if bidirectional:
        num_buckets //= 2
        first, n = (num_buckets if n < 0 else 0), abs(n)
    n = max(n, 0)
    exact = num_buckets // 2
    if n < exact:
        return first + n
    rest, ratio, step = num_buckets - exact, Fraction(n, exact), 0
    while step < rest - 1 and ratio**rest >= Fraction(max_distance, exact) ** (step + 1):
        step += 1
    return first + exact + step


def slopes(num_heads: int) -> Float[np.ndarray, "N"]:
    """2^(-8h/n) for h = 1..n; other n than powers of two: the next lower power's, then every other of the double's."""
    power = 2 ** int(math.log2(num_heads))
    first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    if power == num_heads:
        return first
    return np.concatenate([first, slopes(2 * power)[::2][: num_heads - power]])


def relative_shift(x: Float[np.ndarray, "*B T C"]) -> Float[np.ndarray, "*B T S"]:
    """out[i, j] = x[i, T - 1 - i + j] for x `[*B, T, T + S - 1]` (Dai et al. 2019, appendix B)."""
    queries = x.shape[-2]
    keys = x.shape[-1] - queries + 1
    index = queries - 1 - np.arange(queries)[:, None] + np.arange(keys)
    return np.take_along_axis(x, np.broadcast_to(index, (*x.shape[:-2], queries, keys)), axis=-1)


def cross_entropy(
    logits: Float[np.ndarray, "*B V"],
    labels: Int[np.ndarray, "*B"],
    weights: Float[np.ndarray, "*B"],
    label_smoothing: float = 0.0,
) -> np.float64:
    """sum of weight * -sum_v target_v log softmax(logits)_v over the sum of weights, target = (1-s) one_hot + s/V."""
    total = np.asarray(weights, np.float64).sum()
    if total == 0:
        return np.float64(0)
    counted = weights != 0
    rows, labels, weights = (
        np.asarray(logits[counted], np.float64),
        labels[counted],
        np.asarray(weights[counted], np.float64),
    )
    highest = rows.max(axis=-1, keepdims=True)
    log_probabilities = rows - highest - np.log(np.exp(rows - highest).sum(axis=-1, keepdims=True))
    target = np.full(rows.shape, label_smoothing / rows.shape[-1])
    target[np.arange(len(rows)), labels] += 1 - label_smoothing
    return (weights * -(target * log_probabilities).sum(axis=-1)).sum() / total
