"""Relative positions, as values that attention adds to its logits: ALiBi, T5, Shaw, Transformer-XL.

All go by how far a key's position lies from the query's own, never by an index that moves with the length. What is
learned for each distance is laid out from the farthest key behind to the farthest ahead, `[..., T + S - 1, ...]`:
column c belongs to the key T - 1 - c + q_offset positions behind the query, and `rel_shift` brings it to its key.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from core.layers import check_floating, linear
from core.masks import Grid
from core.positions import sinusoidal
from core.values import STATIC, value


class Relative:
    """What relative encodings have in common."""

    def logits(
        self, q: Float[Array, "*B T N H"], k: Float[Array, "*B S K H"], grid: Grid, *, scale: float
    ) -> Float[Array, "..."]:
        """What is added to the scaled logits, `[*B, N, T, S]` with 1 where it broadcasts, in q's dtype."""
        raise NotImplementedError

    def values(self, weights: Float[Array, "*B N T S"], grid: Grid, width: int) -> Float[Array, "*B T N Hv"] | None:
        """What is added to the attended values, which are `width` wide; None: nothing."""
        return None


@value
class ALiBi(Relative):
    """-slope * distance, with a slope for each head (Press et al. 2022); nothing is learned."""

    def logits(self, q, k, grid, *, scale):
        slopes = jnp.asarray(alibi_slopes(q.shape[-2]), q.dtype).reshape((1,) * (q.ndim - 3) + (-1, 1, 1))
        return -slopes * jnp.abs(grid.ahead()).astype(q.dtype)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """2^(-8 (n + 1) / N) for a power of two; else those of the next lower power, then every other one of the next.

    >>> alibi_slopes(3)
    (0.0625, 0.00390625, 0.25)
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    lower = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (n + 1) / lower) for n in range(lower)]
    between = [2.0 ** (-8 * (n + 1) / (2 * lower)) for n in range(0, 2 * lower, 2)]
    return tuple(slopes + between[: num_heads - lower])


@value
class T5(Relative):
    """A learned logit for each head and bucket of distances (Raffel et al. 2020); `embedding [buckets, N]`."""

    embedding: Float[Array, "R N"]
    bidirectional: bool = dataclasses.field(default=True, metadata=STATIC)
    max_distance: int = dataclasses.field(default=128, metadata=STATIC)

    def logits(self, q, k, grid, *, scale):
        _check_fits("the embedding of T5", self.embedding, (self.embedding.shape[0], q.shape[-2]), "[buckets, N]")
        table = t5_buckets(self.embedding.shape[0], self.max_distance, bidirectional=self.bidirectional)
        behind = jnp.clip(_behind(grid), -self.max_distance, self.max_distance)
        buckets = jnp.asarray(table)[behind + self.max_distance]
        rows = self.embedding.astype(q.dtype)[buckets].swapaxes(-1, -2)[..., None, :]  # [*B, N, 1, T + S - 1]
        return rel_shift(jnp.broadcast_to(rows, (*rows.shape[:-2], grid.shape[-2], rows.shape[-1])), grid.shape[-1])


@functools.cache
def t5_buckets(num_buckets: int, max_distance: int, *, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance from -max_distance (the key ahead) to max_distance (behind); beyond, the ends'.

    Half of the buckets are one distance each, the others grow as a logarithm; in integers, for logarithms of 16 or
    32 bits put some distances into the wrong bucket. Bidirectional: one half for each side.

    >>> t5_buckets(4, 8, bidirectional=False)[8:].tolist()
    [0, 1, 2, 2, 3, 3, 3, 3, 3]
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    if exact < 1 or (bidirectional and num_buckets % 2) or max_distance <= exact:
        raise ValueError(
            "T5 needs at least 2 buckets for each side it looks at and max_distance above half of them, "
            f"got num_buckets={num_buckets}, max_distance={max_distance}, bidirectional={bidirectional}"
        )
    growing = side - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        # floor(growing * log(distance / exact) / log(max_distance / exact)), without logarithms
        steps = sum(
            distance**growing * exact**step >= max_distance**step * exact**growing for step in range(1, growing)
        )
        return exact + steps

    behind = [bucket(distance) for distance in range(max_distance + 1)]
    ahead = [side + b if bidirectional else 0 for b in behind[1:]]
    table = np.array(ahead[::-1] + behind, np.int32)
    table.setflags(write=False)  # whoever asks again gets the same
    return table


@value
class Shaw(Relative):
    """A learned key, and value, for each distance up to a limit, beyond it the limit's (Shaw et al. 2018).

    `key_embedding [2 limit + 1, H]` and `value_embedding [2 limit + 1, Hv]`, from a key `limit` behind the query to
    one `limit` ahead; the heads share them.
    """

    key_embedding: Float[Array, "R H"]
    value_embedding: Float[Array, "R Hv"] | None = None

    def logits(self, q, k, grid, *, scale):
        _check_fits("key_embedding", self.key_embedding, (self.key_embedding.shape[0], q.shape[-1]), "[distances, H]")
        rows = self._rows(self.key_embedding, grid).astype(q.dtype)
        return rel_shift(jnp.einsum("...tnh,...ch->...ntc", q * scale, rows), grid.shape[-1])

    def values(self, weights, grid, width):
        if self.value_embedding is None:
            return None
        rows = self.key_embedding.shape[0]
        _check_fits("value_embedding", self.value_embedding, (rows, width), "[distances, Hv], as many as keys have")
        rows = self._rows(self.value_embedding, grid).astype(weights.dtype)
        return jnp.einsum("...ntc,...ch->...tnh", rel_unshift(weights), rows)

    def _rows(self, table: Array, grid: Grid) -> Array:
        limit = table.shape[0] // 2
        if table.shape[0] != 2 * limit + 1:
            raise ValueError(f"a table of distances has 2 limit + 1 rows, an odd number, got {table.shape[0]}")
        return table[limit - jnp.clip(_behind(grid), -limit, limit)]


@value
class TransformerXL(Relative):
    """(q + u) k^T + (q + v) R^T, where R projects the sinusoid of the distance (Dai et al. 2019, section 3.3).

    `content_bias [N, H]` is the paper's u, `position_bias [N, H]` its v, `kernel [D, N * H]` its W_(k,R).
    """

    content_bias: Float[Array, "N H"]
    kernel: Float[Array, "D O"]
    position_bias: Float[Array, "N H"]

    def logits(self, q, k, grid, *, scale):
        dtype, (heads, width) = q.dtype, q.shape[-2:]
        _check_fits("content_bias", self.content_bias, (heads, width), "[N, H]")
        _check_fits("position_bias", self.position_bias, (heads, width), "[N, H]")
        _check_fits("the kernel", self.kernel, (self.kernel.shape[0], heads * width), "[D, N * H]")
        # products of whole heads, `@` and not einsum: under vmap the same bits
        q, k = q.swapaxes(-2, -3), (k * scale).swapaxes(-2, -3)
        biases = self.content_bias.astype(dtype).reshape(k.shape[-3], -1, width)
        content = (biases @ k.swapaxes(-1, -2)).reshape(*k.shape[:-3], heads, 1, k.shape[-2])
        rows = linear(sinusoidal(_behind(grid), self.kernel.shape[0], dtype), self.kernel)
        rows = rows.reshape(*rows.shape[:-1], heads, width).swapaxes(-2, -3)
        biases = self.position_bias.astype(dtype).reshape(*(1,) * (q.ndim - 3), heads, 1, width)
        position = (q + biases) * scale @ rows.swapaxes(-1, -2)
        return content + rel_shift(position, grid.shape[-1])


def rel_shift(x: Float[Array, "*B T C"], keys: int) -> Float[Array, "*B T S"]:
    """out[t, s] = x[t, T - 1 - t + s], with C = T + S - 1: from distances to keys, by reshapes alone.

    >>> rel_shift(jnp.arange(8.0).reshape(2, 4), 3).tolist()
    [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    """
    *batch, queries, columns = x.shape
    if not queries:
        return jnp.zeros((*batch, queries, keys), x.dtype)
    if columns != queries + keys - 1:
        raise ValueError(f"rel_shift needs C = T + S - 1 columns, got C={columns}, T={queries}, S={keys}")
    # with one more column a row is one longer than the step from row to row, which makes the shift
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*batch, queries * (columns + 1))
    shifted = padded[..., queries - 1 : queries - 1 + queries * columns]
    return shifted.reshape(*batch, queries, columns)[..., :keys]


def rel_unshift(x: Float[Array, "*B T S"]) -> Float[Array, "*B T C"]:
    """The transpose of `rel_shift`: out[t, T - 1 - t + s] = x[t, s], and 0 elsewhere.

    >>> rel_unshift(jnp.arange(1.0, 7.0).reshape(2, 3)).tolist()
    [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 0.0]]
    """
    *batch, queries, keys = x.shape
    columns = max(queries + keys - 1, 0)
    if not queries:
        return jnp.zeros((*batch, queries, columns), x.dtype)
    widened = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, queries - 1)]).reshape(*batch, queries * columns)
    shifted = jnp.pad(widened, [(0, 0)] * len(batch) + [(queries - 1, 1)])
    return shifted.reshape(*batch, queries, columns + 1)[..., :columns]


def extend_history(history: Float[Array, "*B M D"], x: Float[Array, "*B T D"], length: int) -> Float[Array, "*B L D"]:
    """The last `length` vectors of a segment and those before it, cut off from gradients (Dai et al. 2019, 3.2)."""
    if length < 0:
        raise ValueError(f"the length of a history must be at least 0, got {length}")
    if (*history.shape[:-2], history.shape[-1], history.dtype) != (*x.shape[:-2], x.shape[-1], x.dtype):
        raise ValueError(
            "a history must fit the segment behind it in all but its length, "
            f"got {history.dtype}{list(history.shape)} for {x.dtype}{list(x.shape)}"
        )
    both = jax.lax.stop_gradient(jnp.concatenate([history, x], axis=-2))
    return both[..., max(both.shape[-2] - length, 0) :, :]


def _behind(grid: Grid) -> Int[Array, "*B C"]:
    """How many positions each column's key lies behind the query, descending from T - 1 + q_offset."""
    offset: Integer[Array, "..."] = grid.offset()[..., 0, 0]  # [*B, 1]
    columns = max(grid.shape[-2] + grid.shape[-1] - 1, 0)
    farthest = offset + (grid.shape[-2] - 1)
    return farthest - jax.lax.broadcasted_iota(jnp.int32, (1,) * (offset.ndim - 1) + (columns,), offset.ndim - 1)


def _check_fits(name: str, array: Array, wanted: tuple[int, ...], axes: str) -> None:
    check_floating(name, array)
    if array.shape != wanted:
        raise ValueError(f"{name} must be {axes}, here {wanted}, got {array.shape}")
