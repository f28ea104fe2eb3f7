"""Where a token stands: sinusoidal, learned and rotary encodings, exact at any position.

Angles are position times frequency. In float32 that product loses one bit for each bit of the position: at
2^20 it is wrong by 0.04. Here the phase is kept in fixed point, as a fraction of a turn in an unsigned integer,
whose overflow is exactly the wrap-around that sin and cos need; so traced positions cost no accuracy.
"""

import functools
import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from core.config import Positions
from core.layers import check_tokens, embed, wide_dtype

_TWO_PI = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")


def position_ids(x: Float[Array, "*B T D"], offset: Integer[Array, "*B"] | None = None) -> Integer[Array, "..."]:
    """The positions `[*B, T]` of a chunk that starts at `offset` in each row, or at 0."""
    batch, length = x.shape[:-2], x.shape[-2]
    ids = jnp.arange(length, dtype=jnp.int32).reshape((1,) * len(batch) + (length,))
    return ids if offset is None else ids + offset[..., None]


def sinusoidal_table(length: int, d_model: int) -> Float[Array, "L D"]:
    """sin(p / 10000^(2i/D)) in column 2i, cos of the same in 2i + 1 (2017, section 3.5).

    An odd width is the next even table without its last column.

    >>> sinusoidal_table(3, 4).shape
    (3, 4)
    """
    return sinusoidal(jnp.arange(length, dtype=jnp.int32), d_model)


def sinusoidal(positions: Integer[Array, "*B"], d_model: int, dtype=jnp.float32) -> Float[Array, "*B D"]:
    """The rows of the sinusoidal table at any positions, traced ones too."""
    even = d_model + d_model % 2
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    sin, cos = sin_cos(positions, inverse_frequencies(even, 10_000.0), wide)
    return jnp.stack([sin, cos], axis=-1).reshape(*positions.shape, even)[..., :d_model].astype(dtype)


def add_positions(
    x: Float[Array, "*B T D"],
    *,
    kind: Positions,
    embedding: Float[Array, "L D"] | None = None,
    offset: Integer[Array, "*B"] | None = None,
) -> Float[Array, "*B T D"]:
    """x plus its absolute encoding, sinusoidal or learned; other kinds act elsewhere and leave x as it is.

    A position beyond a learned table raises, and gives NaN under jit.
    """
    if kind == "sinusoidal":
        return x + sinusoidal(position_ids(x, offset), x.shape[-1], x.dtype)
    if kind == "learned":
        if embedding is None:
            raise ValueError("learned positions need their embedding table, got none")
        if x.shape[-2] > embedding.shape[0]:
            raise ValueError(
                f"a learned table of max_length={embedding.shape[0]} has no position for {x.shape[-2]} tokens; "
                "shorten the input or raise max_length"
            )
        return x + learned(position_ids(x, offset), embedding).astype(x.dtype)
    return x


def learned(positions: Integer[Array, "*B"], embedding: Float[Array, "L D"]) -> Float[Array, "*B D"]:
    """Rows of a learned table. A position that it lacks raises, and gives NaN under jit."""
    check_tokens(positions, embedding.shape[0], "positions")
    return embed(positions, embedding)


def rotary(
    x: Float[Array, "*B T N H"], positions: Integer[Array, "..."], *, theta: float = 10_000.0
) -> Float[Array, "*B T N H"]:
    """Rotates the pair (x_i, x_(i + H/2)) by position * theta^(-2i/H) (Su et al. 2021, half-split layout).

    `positions` is `[*B, T]`, 1 where it broadcasts. Products of rotated queries and keys depend on their
    distance alone. ValueError for an odd H.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rotary positions need an even head width, got H={x.shape[-1]}")
    dtype = wide_dtype(x)
    sin, cos = sin_cos(positions[..., None], inverse_frequencies(x.shape[-1], theta), dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@functools.cache
def inverse_frequencies(width: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i/width) for i < width / 2, in radians a position."""
    return tuple(theta ** (-2 * i / width) for i in range(width // 2))


def sin_cos(
    positions: Integer[Array, "*B"], frequencies: tuple[float, ...], dtype=jnp.float32
) -> tuple[Float[Array, "*B F"], Float[Array, "*B F"]]:
    """sin and cos of position times frequency, within 2^-23 for any int32 position (2^-45 in float64).

    `dtype` is float32 or float64.
    """
    bits = 8 * jnp.dtype(dtype).itemsize
    unsigned, signed = (jnp.uint64, jnp.int64) if bits == 64 else (jnp.uint32, jnp.int32)
    # p f = p whole + (p mod 2^16) rest + (p div 2^16) (high + low), where whole and high are integers, so that
    # what is left to floating point stays below 2^16 units of the last place
    whole, rest, high, low = _turns(frequencies, bits)
    rank = (1,) * positions.ndim + (len(frequencies),)
    positions = positions[..., None].astype(jnp.int32)
    upper, lower = positions >> 16, positions & 0xFFFF
    phase = positions.astype(unsigned) * jnp.asarray(whole, unsigned).reshape(rank)
    phase = phase + upper.astype(unsigned) * jnp.asarray(high, unsigned).reshape(rank)
    quadrant = (phase + unsigned(1 << (bits - 3))) >> unsigned(bits - 2)
    from_quadrant = (phase - (quadrant << unsigned(bits - 2))).astype(signed).astype(dtype)
    remainder = lower.astype(dtype) * jnp.asarray(rest, dtype).reshape(rank)
    remainder = remainder + upper.astype(dtype) * jnp.asarray(low, dtype).reshape(rank)
    angle = (from_quadrant + remainder) * (2 * math.pi / 2.0**bits)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    odd, negative = (quadrant & unsigned(1)) == 1, (quadrant & unsigned(2)) == 2
    sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, -sin, cos)
    return jnp.where(negative, -sin, sin), jnp.where(negative, -cos, cos)


@functools.cache
def _turns(frequencies: tuple[float, ...], bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each frequency in units of 2^-bits turns: whole + rest, and 2^16 rest as high + low; |rest|, |low| <= 1/2."""
    exact = [Fraction(frequency) / _TWO_PI * 2**bits for frequency in frequencies]
    whole = [round(units) for units in exact]
    rest = [units - w for units, w in zip(exact, whole, strict=True)]
    high = [round(2**16 * r) for r in rest]
    low = [2**16 * r - h for r, h in zip(rest, high, strict=True)]
    integers = [np.array([w % 2**bits for w in words], np.uint64) for words in (whole, high)]
    fractions = [np.array(list(map(float, parts))) for parts in (rest, low)]
    return integers[0], fractions[0], integers[1], fractions[1]
