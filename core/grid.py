"""The cells of the logits `[*B, N, T, S]`, and blocks of them; query t stands at `q_offset + t`, key s at s."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Shaped

Offset = int | Integer[Array, "..."]


class Grid(NamedTuple):
    """The cells of the logits `[*B, N, T, S]`, and where their queries stand; an offset may differ by row."""

    shape: tuple[int, ...]
    q_offset: Offset | None = None

    def offset(self) -> Integer[Array, "..."]:
        """The first query's position, `[*B, 1, 1, 1]` with 1 where it broadcasts."""
        *batch, _, queries, keys = self.shape
        if self.q_offset is None and queries != keys:
            raise ValueError(
                f"what goes by position needs q_offset where T={queries} queries meet S={keys} keys: "
                f"0 aligns the first query with the first key, S - T = {keys - queries} the last with the last"
            )
        offset = jnp.asarray(0 if self.q_offset is None else self.q_offset)
        if not jnp.issubdtype(offset.dtype, jnp.integer):
            raise TypeError(f"q_offset must be an integer or an array of them, got {offset.dtype}")
        if offset.shape not in ((), tuple(batch)):
            raise ValueError(f"q_offset must be one integer or have the batch shape {tuple(batch)}, got {offset.shape}")
        return offset.astype(jnp.int32).reshape(*(offset.shape or (1,) * len(batch)), 1, 1, 1)

    def keys(self) -> Integer[Array, "..."]:
        """The keys' positions, rank of the logits."""
        rank = len(self.shape)
        return jax.lax.broadcasted_iota(jnp.int32, (1,) * (rank - 1) + self.shape[-1:], rank - 1)

    def queries(self) -> Integer[Array, "..."]:
        """The queries' positions, rank of the logits."""
        rank = len(self.shape)
        return self.offset() + jax.lax.broadcasted_iota(jnp.int32, (1,) * (rank - 2) + (self.shape[-2], 1), rank - 2)

    def ahead(self) -> Integer[Array, "..."]:
        """How far each key's position lies ahead of each query's, rank of the logits."""
        return self.keys() - self.queries()


class Block(NamedTuple):
    """A rectangle of the logits of one row of the batch: where it begins and how long it is, along each axis."""

    row: tuple[Integer[Array, ""], ...]  # the index along each axis of *B
    heads: tuple[Integer[Array, ""], int]
    queries: tuple[Integer[Array, ""], int]
    keys: tuple[Integer[Array, ""], int]

    def cut(self, x: Shaped[Array, "..."], axes: str) -> Shaped[Array, "..."]:
        """What of `x [*B, *axes]` lies in the block, without *B; axes of length 1 broadcast and stay."""
        starts, lengths = self._place(x.shape, axes)
        part = jax.lax.dynamic_slice(x, starts, lengths, allow_negative_indices=False)
        return part.reshape(lengths[x.ndim - len(axes) :])

    def put(self, x: Shaped[Array, "..."], part: Shaped[Array, "..."], axes: str) -> Shaped[Array, "..."]:
        """`x [*B, *axes]` with `part` in the place of the block."""
        starts, lengths = self._place(x.shape, axes)
        return jax.lax.dynamic_update_slice(
            x, part.astype(x.dtype).reshape(lengths), starts, allow_negative_indices=False
        )

    def add(self, x: Shaped[Array, "..."], part: Shaped[Array, "..."], axes: str) -> Shaped[Array, "..."]:
        """`x [*B, *axes]` with `part` added in the place of the block."""
        return self.put(x, self.cut(x, axes) + part, axes)

    def grid(self, whole: Grid) -> Grid:
        """The block's own cells, with positions counted from its first key."""
        offset = 0 if whole.q_offset is None else self.cut(whole.offset().squeeze((-3, -2, -1)), "")
        return Grid((self.heads[1], self.queries[1], self.keys[1]), offset + self.queries[0] - self.keys[0])

    def _place(self, shape: tuple[int, ...], axes: str) -> tuple[list[Array], list[int]]:
        places = {"N": self.heads, "T": self.queries, "S": self.keys}
        batch, rest = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
        rows = [(index, 1) for index in self.row[: len(batch)]]  # clamped to the only row where the length is 1
        cells = [
            (0, length) if length == 1 or axis not in places else places[axis]
            for axis, length in zip(axes, rest, strict=True)
        ]
        return [jnp.int32(start) for start, _ in rows + cells], [length for _, length in rows + cells]
