"""Who may see whom, as small values that compose: `Causal() & Padding(real) | Prefix(3)`, `~Window(2, 2)`.

A mask becomes an array only where it meets the logits `[*B, N, T, S]`: there query t stands at position
`q_offset + t` and key s at position s. True means *may attend*.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Integer

from core.config import check_window
from core.grid import Block, Grid, Offset
from core.values import STATIC, value

_FARTHEST = 2**31 - 1  # positions are int32


class Mask:
    """What masks have in common; with `&`, None stands for the mask that allows everything."""

    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to us
    positional = False
    """Whether positions decide, so that `span` may leave keys out."""

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        """True where allowed, of the logits' rank, 1 where it broadcasts."""
        raise NotImplementedError

    def cut(self, block: Block) -> "Mask":
        """The mask of one block, whose positions are counted from its first key."""
        raise NotImplementedError

    def span(self, first: Integer[Array, ""], last: Integer[Array, ""], keys: int) -> tuple[ArrayLike, ArrayLike]:
        """Between which keys, [begin, end), all lies that queries at positions first to last may see."""
        return 0, keys

    def __and__(self, other: Any) -> "Mask":
        return self if other is None else All((self, as_mask(other)))

    def __or__(self, other: Any) -> "Mask":
        return Either((self, as_mask(other)))

    def __invert__(self) -> "Mask":
        return Not(self)

    __rand__ = __and__
    __ror__ = __or__


@value
class Causal(Mask):
    """Keys at positions up to the query's own.

    >>> Causal().cells(Grid((1, 2, 3), q_offset=1)).astype(int).tolist()
    [[[1, 1, 0], [1, 1, 1]]]
    """

    positional = True

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        return grid.ahead() <= 0

    def cut(self, block: Block) -> "Causal":
        return self

    def span(self, first, last, keys):
        return 0, jnp.minimum(last, keys - 1) + 1


@value
class Window(Mask):
    """At most `left` keys before and `right` keys after the query's own position (Beltagy et al. 2020)."""

    left: int = dataclasses.field(metadata=STATIC)
    right: int = dataclasses.field(metadata=STATIC)
    positional = True

    def __post_init__(self) -> None:
        check_window((self.left, self.right))

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        ahead = grid.ahead()
        return (-min(self.left, _FARTHEST) <= ahead) & (ahead <= min(self.right, _FARTHEST))

    def cut(self, block: Block) -> "Window":
        return self

    def span(self, first, last, keys):
        # the bounds of what is there first, for int32 has an end
        begin = 0 if self.left >= keys else jnp.minimum(first, 2 * keys) - self.left
        end = keys if self.right >= keys else jnp.minimum(jnp.minimum(last, keys) + self.right + 1, keys)
        return begin, end


@value
class Prefix(Mask):
    """The first `length` keys, which may differ by row: `Causal() | Prefix(n)` is a prefix language model."""

    length: Offset
    positional = True

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        length = jnp.asarray(self.length)
        batch = grid.shape[:-3]
        if not jnp.issubdtype(length.dtype, jnp.integer) or length.shape not in ((), batch):
            raise ValueError(
                f"a prefix has an integer length, one or of the batch shape {batch}, got {length.dtype} {length.shape}"
            )
        return grid.keys() < length.astype(jnp.int32).reshape(*(length.shape or (1,) * len(batch)), 1, 1, 1)

    def cut(self, block: Block) -> "Prefix":
        return Prefix(block.cut(jnp.asarray(self.length), "").astype(jnp.int32) - block.keys[0])

    def span(self, first, last, keys):
        return 0, jnp.max(jnp.asarray(self.length)).astype(jnp.int32)


@value
class Padding(Mask):
    """The real keys of each row, `real [*B, S]`, True at real tokens."""

    real: Bool[Array, "*B S"]

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        _check_bool("a padding mask", self.real, "use tokens != pad_id")
        _check_shape("a padding mask", self.real.shape, (*grid.shape[:-3], grid.shape[-1]), "[*B, S]")
        return self.real[..., None, None, :]

    def cut(self, block: Block) -> "Padding":
        return Padding(block.cut(self.real, "S"))


@value
class Segments(Mask):
    """Keys of the query's own segment: several sequences packed into one row, told apart by integer ids."""

    queries: Integer[Array, "*B T"]
    keys: Integer[Array, "*B S"] | None = None  # None: those of the queries

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        keys, batch = self.queries if self.keys is None else self.keys, grid.shape[:-3]
        for ids in (self.queries, keys):
            if not jnp.issubdtype(ids.dtype, jnp.integer):
                raise TypeError(f"segment ids must be integers, got {ids.dtype}")
        _check_shape("segment ids of queries", self.queries.shape, (*batch, grid.shape[-2]), "[*B, T]")
        _check_shape("segment ids of keys", keys.shape, (*batch, grid.shape[-1]), "[*B, S]")
        return self.queries[..., None, :, None] == keys[..., None, None, :]

    def cut(self, block: Block) -> "Segments":
        keys = self.queries if self.keys is None else self.keys
        return Segments(block.cut(self.queries, "T"), block.cut(keys, "S"))


@value
class Dense(Mask):
    """A bool array of the logits' rank, 1 where it broadcasts."""

    array: Bool[Array, "..."]

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        _check_bool("mask", self.array, "an additive mask goes into bias=, a 0/1 mask through .astype(bool)")
        check_broadcasts("mask", self.array.shape, grid.shape)
        return self.array

    def cut(self, block: Block) -> "Dense":
        return Dense(block.cut(self.array, "NTS"))


@value
class All(Mask):
    """What every one of several masks allows: `a & b`."""

    masks: tuple[Mask, ...]

    @property
    def positional(self) -> bool:
        return any(mask.positional for mask in self.masks)

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        return functools.reduce(jnp.logical_and, [mask.cells(grid) for mask in self.masks])

    def cut(self, block: Block) -> "All":
        return All(tuple(mask.cut(block) for mask in self.masks))

    def span(self, first, last, keys):
        begins, ends = zip(*(mask.span(first, last, keys) for mask in self.masks), strict=True)
        return functools.reduce(jnp.maximum, begins), functools.reduce(jnp.minimum, ends)


@value
class Either(Mask):
    """What at least one of several masks allows: `a | b`."""

    masks: tuple[Mask, ...]

    @property
    def positional(self) -> bool:
        return all(mask.positional for mask in self.masks)

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        return functools.reduce(jnp.logical_or, [mask.cells(grid) for mask in self.masks])

    def cut(self, block: Block) -> "Either":
        return Either(tuple(mask.cut(block) for mask in self.masks))

    def span(self, first, last, keys):
        begins, ends = zip(*(mask.span(first, last, keys) for mask in self.masks), strict=True)
        return functools.reduce(jnp.minimum, begins), functools.reduce(jnp.maximum, ends)


@value
class Not(Mask):
    """What a mask forbids: `~a`."""

    mask: Mask

    def cells(self, grid: Grid) -> Bool[Array, "..."]:
        return ~self.mask.cells(grid)

    def cut(self, block: Block) -> "Not":
        return Not(self.mask.cut(block))


def as_mask(mask: Mask | Bool[Array, "..."]) -> Mask:
    """A mask as it is, an array as `Dense`."""
    if not isinstance(mask, Mask | jax.Array | np.ndarray):
        raise TypeError(f"a mask must be one of core.masks or a bool array, got {mask!r}; None goes with & alone")
    return mask if isinstance(mask, Mask) else Dense(mask)


def combine(*masks: Mask | Bool[Array, "..."] | None) -> Mask | None:
    """What all of them allow; None where none is given."""
    given = [as_mask(mask) for mask in masks if mask is not None]
    return functools.reduce(lambda a, b: a & b, given) if given else None


def causal_or_prefix(prefix: Offset | None) -> Mask:
    """`Causal()`, whose first `prefix` keys every query may see too."""
    return Causal() if prefix is None else Causal() | Prefix(prefix)


def padding(real: Bool[Array, "*B S"] | None, shape: tuple[int, ...]) -> Padding | None:
    """`Padding` of tokens of that shape; None: all are real."""
    if real is None:
        return None
    _check_bool("a padding mask", real, "use tokens != pad_id")
    _check_shape("a padding mask", real.shape, shape, "the shape of its tokens")
    return Padding(real)


def segments(ids: Integer[Array, "*B T"] | None, shape: tuple[int, ...]) -> Segments | None:
    """`Segments` of tokens of that shape; None: one segment a row."""
    if ids is None:
        return None
    _check_shape("segment ids", ids.shape, shape, "the shape of their tokens")
    return Segments(ids)


def pair_segments(queries: Integer[Array, "*B T"] | None, keys: Integer[Array, "*B S"] | None) -> Segments | None:
    """`Segments` of two packed sides, by equal ids; None: neither is packed."""
    if (queries is None) != (keys is None):
        raise ValueError("segment ids go with both source and target or with neither")
    return None if queries is None else Segments(queries, keys)


def segment_positions(ids: Integer[Array, "*B T"]) -> Integer[Array, "*B T"]:
    """Each token's position in its own segment, for absolute encodings of packed rows; equal ids stand together.

    >>> segment_positions(jnp.array([7, 7, 7, 2, 2])).tolist()
    [0, 1, 2, 0, 1]
    """
    index = jax.lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    first = jnp.ones((*ids.shape[:-1], min(1, ids.shape[-1])), bool)
    begins = jnp.concatenate([first, ids[..., 1:] != ids[..., :-1]], axis=-1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=ids.ndim - 1)


def check_broadcasts(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """ValueError unless an array of shape `got` broadcasts to the logits without gaining an axis."""
    if len(got) != len(wanted) or any(g not in (1, w) for g, w in zip(got, wanted, strict=True)):
        raise ValueError(
            f"{name} must broadcast to the logits [*B, N, T, S] = {tuple(wanted)}, with 1 where it does, "
            f"got {tuple(got)}; core.masks.Padding takes [*B, S]"
        )


def _check_bool(name: str, array: Array, remedy: str) -> None:
    if array.dtype != jnp.bool_:
        raise TypeError(f"{name} must be bool, True where a query may attend, got {array.dtype}; {remedy}")


def _check_shape(name: str, got: tuple[int, ...], wanted: tuple[int, ...], axes: str) -> None:
    if got != tuple(wanted):
        raise ValueError(f"{name} must have {axes}, here {tuple(wanted)}, got {got}")
