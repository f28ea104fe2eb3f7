"""Attention block by block, in O(T + S) memory: the materialised one without ever holding its T x S weights.

A running softmax goes along the keys (Milakov and Gimelshein 2018); the gradient computes each block anew, from the
logarithm of the softmax's denominator (Rabe and Staats 2021; Dao et al. 2022). The gradient rule is of first order:
derivatives of derivatives, and forward mode, need the materialised form.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, Shaped

from core.config import check_rate
from core.grid import Block, Grid, Offset
from core.layers import dropout, wide_dtype, wider_dtype
from core.logits import (
    Rules,
    allowed_keys,
    attention_logits,
    check_queries,
    check_values,
    completed_logits,
    given_mask,
    head_products,
    logits_grid,
    logits_scale,
    sink_logits,
    weighted_values,
)
from core.masks import Mask
from core.relative import Relative


def blockwise_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    block: tuple[int, int] | None = None,
    **rules: Unpack[Rules],
) -> Float[Array, "*B T N Hv"]:
    """`core.attention.dot_product_attention` by blocks of (queries, keys), of a size that proved fast unless given.

    Dropout draws other bits than the materialised form does, of the same distribution.
    """
    check_queries(q, k)
    check_values(k, v)
    check_rate("the dropout rate", dropout_rate)
    jax.eval_shape(functools.partial(_whole, q, k, rules))  # so that whatever is wrong is said of the whole
    if 0 in (*q.shape[:-1], k.shape[-3], v.shape[-1]):
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)
    mask, relative = given_mask(rules), rules.get("relative")
    # in leaves, for JAX makes masks of placeholders where it says that something has no gradient
    inputs, inputs_tree = jax.tree.flatten(_Inputs(q, k, v, rules.get("bias"), relative, rules.get("sinks")))
    fixed, fixed_tree = jax.tree.flatten(_Fixed(mask, rules.get("q_offset"), dropout_key))
    block = _block(mask) if block is None else block
    static = _Static(
        trees=(inputs_tree, fixed_tree),
        heads=_heads(q, k, block) if relative is None else q.shape[-2],  # relative encodings are of all heads
        block=block,
        scale=logits_scale(q, rules),
        soft_cap=rules.get("soft_cap"),
        dropout_rate=dropout_rate,
    )
    return _compiled(static, inputs, fixed)


def _block(mask: Mask | None) -> tuple[int, int]:
    """What proved fast: wide ones, but narrow ones where blocks can be skipped by position."""
    return (512, 512) if _goes_by_position(mask) else (512, 2048)


def _goes_by_position(mask: Mask | None) -> TypeGuard[Mask]:
    return mask is not None and mask.positional


def _heads(q: Array, k: Array, block: tuple[int, int]) -> int:
    """How many at a time: one, for plain matrix products are the fastest, but two where the blocks are small."""
    cells = min(block[0], q.shape[-3]) * min(block[1], k.shape[-3])
    return 2 if cells <= 512 * 512 and q.shape[-2] == k.shape[-2] and q.shape[-2] % 2 == 0 else 1


class _Inputs(NamedTuple):
    """What has gradients."""

    q: Array
    k: Array
    v: Array
    bias: Array | None
    relative: Relative | None
    sinks: Array | None

    @property
    def dtype(self) -> jnp.dtype:
        """In which everything is computed."""
        return wider_dtype(wide_dtype(self.q), self.v.dtype)


class _Fixed(NamedTuple):
    """What has none."""

    mask: Mask | None
    q_offset: Offset | None
    dropout_key: Array | None


class _Static(NamedTuple):
    """What shapes the program."""

    trees: tuple[Any, Any]  # pytree definitions of the inputs and of the fixed
    heads: int
    block: tuple[int, int]
    scale: float
    soft_cap: float | None
    dropout_rate: float


class _Running(NamedTuple):
    """The softmax of some queries over the keys so far."""

    values: Float[Array, "T N Hv"]  # the sum of exponentials times values
    highest: Float[Array, "N T"]
    total: Float[Array, "N T"]  # the sum of exponentials
    spoiled: Bool[Array, "N T"]  # met a value that is not finite


class _Sums(NamedTuple):
    """Gradients so far; those of one block of keys and values apart, whose keys are last, for the products' sake."""

    gradients: _Inputs
    k: Float[Array, "K H S"]
    v: Float[Array, "K Hv S"]


def _whole(q: Array, k: Array, rules: Rules) -> Any:
    """All that checks its input."""
    cells, sinks = allowed_keys(q, k, **rules), rules.get("sinks")
    logits = attention_logits(q, k, logits_grid(q, k, rules), rules)
    return cells, None if sinks is None else sink_logits(sinks, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, inputs: list[Array], fixed: list[Any]) -> Array:
    return _forward(static, inputs, fixed)[0]


def _forward(static: _Static, inputs: list[Array], fixed: list[Any]) -> tuple[Array, tuple]:
    task = _Task(static, *map(jax.tree.unflatten, static.trees, (inputs, fixed)))
    q, v = task.inputs.q, task.inputs.v

    def attend(index, results):
        unit, i = index // task.rows, index % task.rows
        block = task.block(unit, i, 0)
        gather = lambda j, running: task.gather(running, unit, i, j)
        running = _loop(*task.columns_of(unit, i), gather, task.start(block))
        total = jnp.where(running.total == 0, 1.0, running.total)
        out = jnp.where(_beside(running.spoiled), jnp.nan, running.values / _beside(total))
        normaliser = jnp.where(running.total == 0, jnp.inf, running.highest + jnp.log(total))
        return block.put(results[0], out, "TNH"), block.put(results[1], normaliser, "NT")

    empty = jnp.empty((*q.shape[:-1], v.shape[-1]), v.dtype), jnp.empty(task.whole.shape[:-1], task.inputs.dtype)
    out, normalisers = _loop(0, task.units * task.rows, attend, empty)
    return out, (inputs, fixed, out, normalisers)


def _backward(static: _Static, saved: tuple, cotangent: Array) -> tuple[list[Array], None]:
    *leaves, out, normalisers = saved
    given, fixed = map(jax.tree.unflatten, static.trees, leaves)
    inputs, cotangent, out = jax.tree.map(lambda x: x.astype(given.dtype), (given, cotangent, out))
    if fixed.mask is not None or inputs.bias is not None:
        # what is hidden may be NaN, and 0 * NaN is NaN; where it is seen, the normaliser is NaN
        inputs = inputs._replace(q=_finite(inputs.q), k=_finite(inputs.k), v=_finite(inputs.v))
        without = jnp.isnan(out).any(-1, keepdims=True) | (normalisers == jnp.inf).swapaxes(-1, -2)[..., None]
        out, cotangent = jnp.where(without, 0.0, out), jnp.where(without, 0.0, cotangent)
    task = _Task(static, inputs, fixed)
    means = (cotangent * out).sum(-1).swapaxes(-1, -2)

    def column(index, gradients):
        unit, j = index // task.columns, index % task.columns
        keys = task.key_block(task.block(unit, 0, j))
        pull = lambda i, sums: task.pull(sums, unit, i, j, normalisers, means, cotangent)
        nothing = (jnp.zeros_like(_last(keys.cut(x, "SNH"))) for x in (inputs.k, inputs.v))
        gradients, k, v = _loop(*task.rows_of(unit, j), pull, _Sums(gradients, *nothing))
        k, v = (keys.add(x, jnp.moveaxis(y, -1, 0), "SNH") for x, y in ((gradients.k, k), (gradients.v, v)))
        return gradients._replace(k=k, v=v)

    gradients = _loop(0, task.units * task.columns, column, jax.tree.map(jnp.zeros_like, inputs))
    if inputs.sinks is not None:
        shares = jnp.exp(sink_logits(inputs.sinks, normalisers[..., None]).squeeze(-1) - normalisers) * means
        gradients = gradients._replace(sinks=-shares.reshape(-1, *shares.shape[-2:]).sum((0, 2)))
    return jax.tree.leaves(jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, given)), None


_attention.defvjp(_forward, _backward)
_compiled = jax.jit(_attention, static_argnums=0)  # so that outside of jit it is compiled once


class _Task:
    """One call cut into blocks, by unit (a row of the batch and a group of heads), row of blocks and column of blocks.

    Where the length is no multiple, the last block begins earlier, to end with the last query or key: what it shares
    with the block before, as key, belongs to that; as query, to the last, which overwrites it.
    """

    def __init__(self, static: _Static, inputs: _Inputs, fixed: _Fixed):
        self.static, self.inputs, self.fixed = static, inputs, fixed
        self.whole = logits_grid(inputs.q, inputs.k, {"q_offset": fixed.q_offset})
        *self.batch, heads, queries, keys = self.whole.shape
        self.height, self.width = min(static.block[0], queries), min(static.block[1], keys)
        self.rows, self.columns = -(-queries // self.height), -(-keys // self.width)
        self.groups = heads // static.heads
        self.units = math.prod(self.batch) * self.groups

    def block(self, unit: Array, i: ArrayLike, j: ArrayLike) -> Block:
        *_, queries, keys = self.whole.shape
        row, index = [], unit // self.groups
        for length in reversed(self.batch):
            row.insert(0, index % length)
            index = index // length
        return Block(
            tuple(row),
            (unit % self.groups * self.static.heads, self.static.heads),
            (jnp.minimum(i * self.height, queries - self.height), self.height),
            (jnp.minimum(j * self.width, keys - self.width), self.width),
        )

    def key_block(self, block: Block) -> Block:
        """The same block in the heads of the keys."""
        first, heads = block.heads
        group = self.whole.shape[-3] // self.inputs.k.shape[-2]
        return block._replace(heads=(first // group, max(1, heads // group)))

    def columns_of(self, unit: Array, i: ArrayLike) -> tuple[int | Array, int | Array]:
        """From which to which column of blocks the queries of a row of blocks see anything, as far as masks tell."""
        if not _goes_by_position(self.fixed.mask):
            return 0, self.columns
        block, keys = self.block(unit, i, 0), self.whole.shape[-1]
        first = jnp.asarray(block.grid(self.whole).q_offset) + block.keys[0]
        begin, end = self.fixed.mask.span(first, first + self.height - 1, keys)
        return jnp.maximum(begin, 0) // self.width, (jnp.minimum(end, keys) + self.width - 1) // self.width

    def rows_of(self, unit: Array, j: Array) -> tuple[int | Array, int | Array]:
        """The inverse of `columns_of`."""
        if not _goes_by_position(self.fixed.mask):
            return 0, self.rows
        begins, ends = jax.vmap(lambda i: self.columns_of(unit, i))(jax.lax.iota(jnp.int32, self.rows))
        meets = jnp.logical_and(begins <= j, j < ends)
        first, last = (jax.lax.argmax(x, 0, jnp.int32) for x in (meets, meets[::-1]))
        return first, jnp.where(meets.any(), self.rows - last, 0)

    def start(self, block: Block) -> _Running:
        """The softmax over no key, or over the sink alone."""
        shape, dtype = (self.static.heads, self.height), self.inputs.dtype
        values = jnp.zeros((self.height, self.static.heads, self.inputs.v.shape[-1]), dtype)
        # over no key as high as this, not -inf, for -inf - -inf is NaN
        highest, total = jnp.full(shape, jnp.finfo(dtype).min, dtype), jnp.zeros(shape, dtype)
        if self.inputs.sinks is not None:
            sinks = block.cut(self.inputs.sinks, "N").astype(dtype)[:, None]
            highest = jnp.maximum(highest, sinks)
            total = jnp.exp(sinks - highest)
        return _Running(values, highest, total, jnp.zeros(shape, bool))

    def gather(self, running: _Running, unit: Array, i: Array, j: Array) -> _Running:
        """The softmax that has seen one more block of keys."""
        block = self.block(unit, i, j)
        parts, grid = self.parts(block), block.grid(self.whole)
        allowed = self.allowed(block, grid, j)

        def seen():
            logits = self.completed(head_products(parts.q * self.static.scale, parts.k), parts, grid)
            if allowed is not None:
                logits = jnp.where(allowed, logits, -jnp.inf)
            highest = jnp.maximum(running.highest, logits.max(-1))
            weights, shrunk = jnp.exp(logits - highest[..., None]), jnp.exp(running.highest - highest)
            total = running.total * shrunk + weights.sum(-1)
            kept, spoiled = parts, running.spoiled
            if allowed is not None:
                kept, spoiled = parts._replace(v=_finite(parts.v)), spoiled | self.spoiled(allowed, parts.v)
            values = running.values * _beside(shrunk) + self.values(self.dropped(weights, unit, i, j), kept, grid)
            return _Running(values, highest, total, spoiled)

        return self.if_any(allowed, seen, lambda: running)

    def pull(
        self, sums: _Sums, unit: Array, i: Array, j: Array, normalisers: Array, means: Array, cotangent: Array
    ) -> _Sums:
        """The gradients with those of one more block."""
        block = self.block(unit, i, j)
        parts, grid = self.parts(block), block.grid(self.whole)
        allowed = self.allowed(block, grid, j, i)
        hide = lambda x: x if allowed is None else jnp.where(allowed, x, 0.0)

        def seen():
            scaled, by_out = parts.q * self.static.scale, block.cut(cotangent, "TNH")
            complete = lambda products, parts: self.completed(products, parts, grid)
            logits, pull_logits = jax.vjp(complete, head_products(scaled, parts.k), parts)
            weights = hide(jnp.exp(logits - block.cut(normalisers, "NT")[..., None]))
            kept, pull_dropout = jax.vjp(lambda weights: self.dropped(weights, unit, i, j), weights)
            more, pull_more = jax.vjp(lambda kept, parts: self.relative_values(kept, parts, grid), kept, parts)
            by_kept, by_parts = pull_more(None if more is None else by_out)
            by_weights = pull_dropout(by_kept + head_products(by_out, parts.v))[0]
            by_logits = hide(weights * (by_weights - block.cut(means, "NT")[..., None]))
            by_products, by_parts_too = pull_logits(by_logits)
            by_parts = jax.tree.map(jnp.add, by_parts, by_parts_too)
            q = by_parts.q + weighted_values(by_products, parts.k) * self.static.scale
            k = _last(by_parts.k) + _key_sums(by_products, scaled, parts.k.shape[-2])
            return by_parts._replace(q=q), k, _key_sums(kept, by_out, parts.k.shape[-2])

        nothing = lambda: (jax.tree.map(jnp.zeros_like, parts), jnp.zeros_like(sums.k), jnp.zeros_like(sums.v))
        part, k, v = self.if_any(allowed, seen, nothing)
        gradients = sums.gradients
        gradients = gradients._replace(
            q=block.add(gradients.q, part.q, "TNH"),
            bias=jax.tree.map(lambda x, of_block: block.add(x, of_block, "NTS"), gradients.bias, part.bias),
            relative=jax.tree.map(jnp.add, gradients.relative, part.relative),
        )
        return _Sums(gradients, sums.k + k, sums.v + v)

    def parts(self, block: Block) -> _Inputs:
        """What of the inputs lies in a block."""
        inputs, keys = self.inputs, self.key_block(block)
        parts = _Inputs(
            block.cut(inputs.q, "TNH"),
            keys.cut(inputs.k, "SNH"),
            keys.cut(inputs.v, "SNH"),
            None if inputs.bias is None else block.cut(inputs.bias, "NTS"),
            inputs.relative,
            None,
        )
        return jax.tree.map(lambda x: x.astype(inputs.dtype), parts)

    def allowed(self, block: Block, grid: Grid, j: Array, i: Array | None = None) -> Array | None:
        """Who may see whom in a block, of its rank; None: everyone. With i, a query counts in its last block only."""
        cells = []
        if self.fixed.mask is not None:
            cells.append(self.fixed.mask.cut(block).cells(grid))
        if self.inputs.bias is not None:
            cells.append(block.cut(self.inputs.bias, "NTS") != -jnp.inf)
        *_, queries, keys = self.whole.shape
        if keys % self.width:
            cells.append((block.keys[0] + jax.lax.iota(jnp.int32, self.width) >= j * self.width)[None, None])
        if i is not None and queries % self.height:
            own = (i == self.rows - 1) | (
                block.queries[0] + jax.lax.iota(jnp.int32, self.height) < queries - self.height
            )
            cells.append(own[None, :, None])
        return functools.reduce(jnp.logical_and, cells) if cells else None

    def if_any(self, allowed: Array | None, seen: Callable, unseen: Callable) -> Any:
        """`seen()`, but `unseen()` of a block that is hidden as a whole, where it takes arrays to know that."""
        if allowed is None or not jax.tree.leaves(self.fixed.mask):
            return seen()
        return jax.lax.cond(allowed.any(), seen, unseen)

    def completed(self, products: Array, parts: _Inputs, grid: Grid) -> Array:
        rules = Rules(bias=parts.bias, relative=parts.relative, scale=self.static.scale, soft_cap=self.static.soft_cap)
        return completed_logits(products, parts.q, parts.k, grid, rules)

    def dropped(self, weights: Array, unit: Array, i: Array, j: Array) -> Array:
        """The weights after dropout, whose key is the block's own."""
        key = self.fixed.dropout_key
        if key is None:
            return weights
        key = functools.reduce(jax.random.fold_in, (unit * self.rows + i, j), key)
        return dropout(weights, self.static.dropout_rate, key=key)

    def relative_values(self, weights: Array, parts: _Inputs, grid: Grid) -> Array | None:
        return None if parts.relative is None else parts.relative.values(weights, grid, parts.v.shape[-1])

    def values(self, weights: Array, parts: _Inputs, grid: Grid) -> Array:
        out, more = weighted_values(weights, parts.v), self.relative_values(weights, parts, grid)
        return out if more is None else out + more

    def spoiled(self, allowed: Array, v: Array) -> Array:
        """Which queries may see a value that is not finite; those become NaN, and no others."""
        hidden = ~jnp.isfinite(v).all(-1).swapaxes(-1, -2)  # [K, S]
        hidden = hidden.repeat(self.static.heads // hidden.shape[-2], axis=-2)[:, None]
        met = lambda: jnp.broadcast_to((allowed & hidden).any(-1), (self.static.heads, self.height))
        return jax.lax.cond(hidden.any(), met, lambda: jnp.zeros((self.static.heads, self.height), bool))


def _beside(x: Shaped[Array, "N T"]) -> Shaped[Array, "T N 1"]:
    return x.swapaxes(-1, -2)[..., None]


def _loop(begin: ArrayLike, end: ArrayLike, body: Callable, carry: Any) -> Any:
    """`fori_loop` in int32, under x64 too."""
    return jax.lax.fori_loop(jnp.int32(begin), jnp.int32(end), body, carry)


def _last(x: Float[Array, "S K H"]) -> Float[Array, "K H S"]:
    return jnp.moveaxis(x, 0, -1)


def _key_sums(weights: Float[Array, "N T S"], x: Float[Array, "T N H"], key_heads: int) -> Float[Array, "K H S"]:
    """Sum over the queries of weight times vector, and over the heads that share a key's."""
    queries, heads, width = x.shape
    first = x.reshape(queries, key_heads, heads // key_heads, width).transpose(1, 3, 2, 0)
    # laid out so, for XLA's products on CPUs are three times slower where the left one is to be transposed
    first = jax.lax.optimization_barrier(first.reshape(key_heads, width, -1))
    return first @ weights.reshape(key_heads, -1, weights.shape[-1])


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))
