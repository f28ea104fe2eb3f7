"""Rotary positions (Su et al. 2021), in both layouts, on all or some features, and stretched to longer texts."""

import functools
import math
from typing import TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from core.config import RotaryLayout, TransformerConfig, check_above, check_at_least, check_choice
from core.layers import check_floating, wide_dtype
from core.positions import check_positions, inverse_frequencies, sin_cos


class RotarySettings(TypedDict):
    """What `rotary` needs to know beside the positions."""

    frequencies: tuple[float, ...]
    layout: RotaryLayout
    magnitude: float


def rotary(
    x: Float[Array, "*B T N H"],
    positions: Integer[Array, "..."],
    *,
    theta: float = 10_000.0,
    frequencies: tuple[float, ...] | None = None,
    layout: RotaryLayout = "half",
    magnitude: float = 1.0,
) -> Float[Array, "*B T N H"]:
    """Rotates pair i of features by position * frequencies[i]; products then depend on distances alone.

    The layout "half" pairs x_i with x_(i + W/2), "interleaved" x_2i with x_(2i + 1), where W is twice the number of
    frequencies; features beyond W stay as they are. `positions` is `[*B, T]`, 1 where it broadcasts. `frequencies`
    are in radians a position, theta^(-2i/H) unless given. ValueError for an odd H, or frequencies for more than H.

    >>> x = jnp.ones((2, 5, 4, 8))
    >>> rotary(x, jnp.arange(5)[None], layout="interleaved").shape
    (2, 5, 4, 8)
    """
    check_floating("x", x)
    check_choice("layout", layout, RotaryLayout)
    check_above("magnitude", magnitude, 0)
    if frequencies is None:
        if x.shape[-1] % 2:
            raise ValueError(f"rotary positions need an even head width, got H={x.shape[-1]}; or give frequencies")
        frequencies = inverse_frequencies(x.shape[-1], theta)
    width = 2 * len(frequencies)
    if width > x.shape[-1]:
        raise ValueError(f"{len(frequencies)} frequencies turn {width} features, got H={x.shape[-1]}")
    check_positions(positions, x.shape[:-2])
    dtype = wide_dtype(x)
    sin, cos = sin_cos(positions[..., None], frequencies, dtype)
    turned, rest = x[..., :width].astype(dtype), x[..., width:]
    if layout == "half":
        first, second = jnp.split(turned, 2, axis=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
    pair = (first * cos - second * sin) * magnitude, (second * cos + first * sin) * magnitude
    out = jnp.concatenate(pair, axis=-1) if layout == "half" else jnp.stack(pair, axis=-1).reshape(turned.shape)
    return jnp.concatenate([out.astype(x.dtype), rest], axis=-1)


@functools.cache
def rotary_settings(config: TransformerConfig) -> RotarySettings:
    """What the configuration says of rotary positions."""
    width, theta, factor = config.rotary_width, config.rotary_theta, config.rotary_factor
    match config.rotary_scaling:
        case "none":
            frequencies = inverse_frequencies(width, theta)
        case "linear":
            frequencies = linear_scaling(inverse_frequencies(width, theta), factor)
        case "ntk":
            frequencies = ntk_scaling(width, theta, factor)
        case "yarn":
            frequencies = yarn_scaling(width, theta, factor, config.rotary_original_length)
        case "llama3":
            frequencies = llama3_scaling(inverse_frequencies(width, theta), factor, config.rotary_original_length)
    magnitude = yarn_magnitude(factor) if config.rotary_scaling == "yarn" else 1.0
    return {"frequencies": frequencies, "layout": config.rotary_layout, "magnitude": magnitude}


def linear_scaling(frequencies: tuple[float, ...], factor: float) -> tuple[float, ...]:
    """Position interpolation: `factor` times as many positions share the old angles (Chen et al. 2023)."""
    _check_factor(factor)
    return tuple(frequency / factor for frequency in frequencies)


def ntk_scaling(width: int, theta: float, factor: float) -> tuple[float, ...]:
    """NTK-aware: theta grows so that the lowest frequency is divided by `factor`, the highest kept (bloc97, 2023)."""
    _check_factor(factor)
    return inverse_frequencies(width, theta * factor ** (width / (width - 2)) if width > 2 else theta)


def yarn_scaling(
    width: int, theta: float, factor: float, original_length: int, *, fast: float = 32.0, slow: float = 1.0
) -> tuple[float, ...]:
    """YaRN: what turns more than `fast` times in the original length is kept, less than `slow` times interpolated,
    with a ramp over the pairs between (Peng et al. 2023; the ramp is that of its released code)."""
    _check_factor(factor)
    check_above("the theta of YaRN", theta, 1)
    _check_turns(original_length, slow=slow, fast=fast)

    def pair_that_turns(times: float) -> float:
        return width * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(fast)), 0)
    high = max(min(math.ceil(pair_that_turns(slow)), width - 1), low + 0.001)
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
    frequencies = inverse_frequencies(width, theta)
    return tuple(f / factor * r + f * (1 - r) for f, r in zip(frequencies, ramp, strict=True))


def yarn_magnitude(factor: float) -> float:
    """By which YaRN multiplies rotated queries and keys: 0.1 ln(factor) + 1."""
    _check_factor(factor)
    return 0.1 * math.log(factor) + 1.0


def llama3_scaling(
    frequencies: tuple[float, ...], factor: float, original_length: int, *, low: float = 1.0, high: float = 4.0
) -> tuple[float, ...]:
    """Llama 3.1: what turns more than `high` times in the original length is kept, less than `low` times divided by
    `factor`, linear in the number of turns between (Dubey et al. 2024)."""
    _check_factor(factor)
    _check_turns(original_length, low=low, high=high)
    kept = [min(max((original_length * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0) for f in frequencies]
    return tuple(f / factor * (1 - share) + f * share for f, share in zip(frequencies, kept, strict=True))


def _check_factor(factor: float) -> None:
    check_at_least("a rotary scaling factor", factor, 1)


def _check_turns(original_length: int, **limits: float) -> None:
    check_at_least("original_length", original_length, 1)
    (slow, few), (fast, many) = limits.items()
    if not 0 < few < many < math.inf:
        raise ValueError(f"{slow} must be above 0 and below {fast}, both finite, got {slow}={few}, {fast}={many}")
