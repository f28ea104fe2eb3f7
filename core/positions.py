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
from jaxtyping import Array, Float, Int

from core.config import Positions
from core.layers import embed, wide_dtype

_TWO_PI = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")


def position_ids(x: Float[Array, "*B T D"], offset: Int[Array, "*B"] | None = None) -> Int[Array, "..."]:
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


def sinusoidal(positions: Int[Array, "*B"], d_model: int, dtype=jnp.float32) -> Float[Array, "*B D"]:
    """The rows of the sinusoidal table at any positions, traced ones too."""
    sin, cos = sin_cos(positions, inverse_frequencies(d_model + d_model % 2, 10_000.0), dtype)
    return jnp.stack([sin, cos], axis=-1).reshape(*positions.shape, -1)[..., :d_model]


def add_positions(
    x: Float[Array, "*B T D"],
    *,
    kind: Positions,
    embedding: Float[Array, "L D"] | None = None,
    offset: Int[Array, "*B"] | None = None,
) -> Float[Array, "*B T D"]:
    """x plus its absolute encoding, sinusoidal or learned; other kinds act elsewhere and leave x as it is.

    A position beyond a learned table raises, and gives NaN under jit.
    """
    if kind == "sinusoidal":
        dtype = wide_dtype(x)
        return x + sinusoidal(position_ids(x, offset), x.shape[-1], dtype).astype(x.dtype)
    if kind == "learned":
        if embedding is None:
            raise ValueError("learned positions need their embedding table, got none")
        return x + learned(position_ids(x, offset), embedding).astype(x.dtype)
    return x


def learned(positions: Int[Array, "*B"], embedding: Float[Array, "L D"]) -> Float[Array, "*B D"]:
    """Rows of a learned table."""
    length = positions.shape[-1] if positions.ndim else 1
    if length > embedding.shape[0]:
        raise ValueError(
            f"a learned table of max_length={embedding.shape[0]} has no position for {length} tokens; "
            "shorten the input or raise max_length"
        )
    return embed(positions, embedding)


def rotary(
    x: Float[Array, "*B T N H"], positions: Int[Array, "..."], *, theta: float = 10_000.0
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
    positions: Int[Array, "*B"], frequencies: tuple[float, ...], dtype=jnp.float32
) -> tuple[Float[Array, "*B F"], Float[Array, "*B F"]]:
    """sin and cos of position times frequency, within 2^-23 for any int32 position (2^-45 in float64)."""
    bits = 8 * jnp.dtype(dtype).itemsize
    unsigned, signed = (jnp.uint64, jnp.int64) if bits == 64 else (jnp.uint32, jnp.int32)
    whole, rest = _turns(frequencies, bits)
    rank = (1,) * positions.ndim + (-1,)
    phase = positions[..., None].astype(unsigned) * jnp.asarray(whole, unsigned).reshape(rank)
    quadrant = (phase + unsigned(1 << (bits - 3))) >> unsigned(bits - 2)
    from_quadrant = (phase - (quadrant << unsigned(bits - 2))).astype(signed).astype(dtype)
    # what the whole part leaves out, at most half a unit of the last place for each position
    remainder = positions[..., None].astype(dtype) * jnp.asarray(rest, dtype).reshape(rank)
    angle = (from_quadrant + remainder) * (2 * math.pi / 2.0**bits)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    odd, upper = (quadrant & unsigned(1)) == 1, (quadrant & unsigned(2)) == 2
    sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, -sin, cos)
    return jnp.where(upper, -sin, sin), jnp.where(upper, -cos, cos)


@functools.cache
def _turns(frequencies: tuple[float, ...], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Each frequency in turns times 2^bits, as the nearest integer (mod 2^bits) and what is left."""
    exact = [Fraction(frequency) / _TWO_PI * 2**bits for frequency in frequencies]
    whole = [round(turns) for turns in exact]
    rest = [float(turns - w) for turns, w in zip(exact, whole, strict=True)]
    return np.array([w % 2**bits for w in whole], np.uint64), np.array(rest)
