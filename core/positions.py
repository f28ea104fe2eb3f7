"""Where a token stands: sinusoidal and learned encodings, and angles that are exact at any position.

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

from core.config import Positions, check_above, check_choice, check_enabled
from core.layers import (
    check_axes,
    check_floating,
    check_integers,
    check_parameter,
    check_tokens,
    embed,
    known_values,
)

_TWO_PI = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")


def position_ids(x: Float[Array, "*B T D"], offset: int | Integer[Array, "*B"] | None = None) -> Integer[Array, "..."]:
    """The positions `[*B, T]` of a chunk that starts at `offset` in each row, or at 0 in all, `[1, T]`.

    They are int32: ValueError for a known offset from which they would not be.
    """
    check_axes("x", x, "T D")
    batch, length = x.shape[:-2], x.shape[-2]
    ids = jnp.arange(length, dtype=jnp.int32).reshape((1,) * len(batch) + (length,))
    if offset is None:
        return ids
    _check_int32("positions", known_values(offset), ahead=length - 1)  # NumPy's would wrap below
    offset = jnp.asarray(offset)
    if not jnp.issubdtype(offset.dtype, jnp.integer):
        raise TypeError(f"an offset must be an integer or an array of them, got {offset.dtype}")
    if offset.shape not in ((), batch):
        raise ValueError(f"an offset must be one integer or have the batch shape {batch}, got {offset.shape}")
    return ids + _as_int32("offsets", offset).reshape(*(offset.shape or (1,) * len(batch)), 1)


def sinusoidal_table(length: int, d_model: int) -> Float[Array, "L D"]:
    """sin(p / 10000^(2i/D)) in column 2i, cos of the same in 2i + 1 (2017, section 3.5).

    An odd width is the next even table without its last column.

    >>> sinusoidal_table(3, 4).shape
    (3, 4)
    """
    return sinusoidal(jnp.arange(length, dtype=jnp.int32), d_model)


def sinusoidal(positions: Integer[Array, "*B"], d_model: int, dtype=jnp.float32) -> Float[Array, "*B D"]:
    """The rows of the sinusoidal table at any positions, traced ones too."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"sinusoids must be floating point, got dtype={dtype}")
    even = d_model + d_model % 2
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    sin, cos = sin_cos(positions, inverse_frequencies(even, 10_000.0), wide)
    return jnp.stack([sin, cos], axis=-1).reshape(*positions.shape, even)[..., :d_model].astype(dtype)


def add_positions(
    x: Float[Array, "*B T D"],
    positions: Integer[Array, "..."],
    *,
    kind: Positions,
    embedding: Float[Array, "L D"] | None = None,
) -> Float[Array, "*B T D"]:
    """x plus its absolute encoding, sinusoidal or learned; other kinds act elsewhere and leave x as it is.

    `positions` is `[*B, T]`, 1 where it broadcasts. One beyond a learned table raises, and gives NaN under jit.
    """
    check_choice("kind", kind, Positions)
    check_axes("x", x, "T D")
    check_floating("x", x)
    if kind in ("sinusoidal", "learned"):
        check_positions(positions, x.shape[:-1])
    if kind == "sinusoidal":
        return x + sinusoidal(positions, x.shape[-1], x.dtype)
    if kind == "learned":
        if embedding is None:
            raise ValueError("learned positions need their embedding table, got none")
        check_parameter("embedding", embedding, "L D", axis=1, x=x)
        if x.shape[-2] > embedding.shape[0]:
            raise ValueError(
                f"a learned table of max_length={embedding.shape[0]} has no position for {x.shape[-2]} tokens; "
                "shorten the input or raise max_length"
            )
        return x + learned(positions, embedding).astype(x.dtype)
    return x


def check_positions(positions: Integer[Array, "..."], shape: tuple[int, ...]) -> None:
    """ValueError unless the positions broadcast to those tokens, `[*B, T]`, and not the tokens to them."""
    if len(positions.shape) != len(shape) or any(p not in (1, n) for p, n in zip(positions.shape, shape, strict=True)):
        raise ValueError(f"positions must be [*B, T], here {shape}, 1 where they broadcast, got {positions.shape}")


def learned(positions: Integer[Array, "*B"], embedding: Float[Array, "L D"]) -> Float[Array, "*B D"]:
    """Rows of a learned table. A position that it lacks raises, and gives NaN under jit."""
    check_tokens(positions, embedding.shape[0], "positions")
    return embed(positions, embedding)


@functools.cache
def inverse_frequencies(width: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i/width) for i < width / 2, in radians a position."""
    check_above("theta", theta, 0)
    return tuple(theta ** (-2 * i / width) for i in range(width // 2))


def sin_cos(
    positions: Integer[Array, "*B"], frequencies: tuple[float, ...], dtype=jnp.float32
) -> tuple[Float[Array, "*B F"], Float[Array, "*B F"]]:
    """sin and cos of position times frequency, within 2^-23 for any int32 position (2^-45 in float64).

    TypeError for a `dtype` other than those two, and for positions of unsigned 32 or 64 bits, which int32 cannot hold;
    ValueError for others that it cannot, where they are known.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}; cast what comes out")
    check_enabled(dtype)
    if not isinstance(frequencies, tuple):
        raise TypeError(f"frequencies must be a tuple of floats, got {type(frequencies).__name__}")
    bits = 8 * dtype.itemsize
    unsigned, signed = (jnp.uint64, jnp.int64) if bits == 64 else (jnp.uint32, jnp.int32)
    # p f = p whole + (p mod 2^16) rest + (p div 2^16) (high + low), where whole and high are integers, so that
    # what is left to floating point stays below 2^16 units of the last place
    whole, rest, high, low = _turns(frequencies, bits)
    rank = (1,) * positions.ndim + (len(frequencies),)
    positions = _as_int32("positions", positions[..., None])
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


def _as_int32(name: str, x: Array) -> Array:
    check_integers(name, x)
    if x.dtype.itemsize >= 4 and jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        raise TypeError(f"{name} must be integers that int32 holds, got {x.dtype}; cast it with astype('int32')")
    if x.dtype.itemsize > 4:
        _check_int32(name, known_values(x))
    return x.astype(jnp.int32)


def _check_int32(name: str, known: np.ndarray | None, *, ahead: int = 0) -> None:
    """ValueError unless int32 holds the known integers, and so many after each."""
    if known is None or not known.size or not jnp.issubdtype(known.dtype, jnp.integer):
        return
    low, high = int(known.min()), int(known.max()) + ahead
    if low < -(2**31) or high >= 2**31:
        raise ValueError(f"{name} must lie in [-2^31, 2^31), got values from {low} to {high}")


@functools.cache
def _turns(frequencies: tuple[float, ...], bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each frequency in units of 2^-bits turns: whole + rest, and 2^16 rest as high + low; |rest|, |low| <= 1/2."""
    if not all(map(math.isfinite, frequencies)):
        raise ValueError(f"frequencies must be finite, got {frequencies}")
    exact = [Fraction(frequency) / _TWO_PI * 2**bits for frequency in frequencies]
    whole = [round(units) for units in exact]
    rest = [units - w for units, w in zip(exact, whole, strict=True)]
    high = [round(2**16 * r) for r in rest]
    low = [2**16 * r - h for r, h in zip(rest, high, strict=True)]
    integers = [np.array([w % 2**bits for w in words], np.uint64) for words in (whole, high)]
    fractions = [np.array(list(map(float, parts))) for parts in (rest, low)]
    return integers[0], fractions[0], integers[1], fractions[1]
