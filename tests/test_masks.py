"""Laws of masks: True where a query may attend, by absolute position; small values that compose as sets do."""

import contextlib
import dataclasses
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.attention import allowed_keys, dot_product_attention
from core.masks import (
    Causal,
    Dense,
    Grid,
    Mask,
    Padding,
    Prefix,
    Segments,
    Window,
    as_mask,
    causal_or_prefix,
    combine,
    padding,
    pair_segments,
    segment_positions,
    segments,
)
from tests.strategies import SQUARE_SHAPES, attention_shapes, floats, qkv, seeds
from tests.test_attention import attend, closely, exactly, replaced

SHAPES = [(2, 1, 3, 3), (1, 1, 1), (2, 2, 2, 2, 5), (3, 2, 5, 3), (2, 1, 3, 1)]
EMPTY = [(2, 1, 0, 3), (2, 1, 3, 0), (0, 2, 3, 3)]
LEAVES = ["causal", "window", "prefix", "padding", "segments", "dense"]


class Drawn(NamedTuple):
    """A mask and, in plain Python, whether in row b (a tuple) and head n query t may see key s."""

    mask: Mask
    sees: Callable[[tuple[int, ...], int, int, int], bool]


@st.composite
def grids(draw, shapes=SHAPES, by_row=False):
    """One offset, one for each row or, between equal lengths, none."""
    shape, rng = draw(st.sampled_from(shapes)), np.random.default_rng(draw(seeds))
    kinds = ["row"] if by_row else ["one", "row"] + ["none"] * (shape[-2] == shape[-1])
    one, each = int(rng.integers(-2, 5)), jnp.asarray(rng.integers(-2, 5, shape[:-3], "int32"))
    return Grid(shape, {"none": None, "one": one, "row": each}[draw(st.sampled_from(kinds))])


@st.composite
def leaves(draw, grid, by_row=False, kind=None):
    """One of the masks that are not made of others; with `by_row` every array has the batch axes."""
    *batch, N, T, S = grid.shape
    rng, offset = (
        np.random.default_rng(draw(seeds)),
        np.broadcast_to(0 if grid.q_offset is None else grid.q_offset, batch),
    )
    match kind or draw(st.sampled_from(LEAVES)):
        case "causal":
            return Drawn(Causal(), lambda b, n, t, s: s <= t + offset[b])
        case "window":
            left, right = draw(st.integers(0, 3)), draw(st.integers(0, 3))
            return Drawn(Window(left, right), lambda b, n, t, s: -left <= s - (t + offset[b]) <= right)
        case "prefix":
            rows = rng.integers(-1, S + 2, batch, "int32")
            if by_row or draw(st.booleans()):
                return Drawn(Prefix(jnp.asarray(rows)), lambda b, n, t, s: s < rows[b])
            length = draw(st.integers(-1, S + 1))
            return Drawn(Prefix(length), lambda b, n, t, s: s < length)
        case "padding":
            real = rng.random((*batch, S)) < 0.6
            return Drawn(Padding(jnp.asarray(real)), lambda b, n, t, s: real[*b, s])
        case "segments":
            rows, keys = rng.integers(0, 3, (*batch, T), "int32"), rng.integers(0, 3, (*batch, S), "int32")
            if T == S and draw(st.booleans()):
                return Drawn(Segments(jnp.asarray(rows)), lambda b, n, t, s: rows[*b, t] == rows[*b, s])
            mask = Segments(jnp.asarray(rows), jnp.asarray(keys))
            return Drawn(mask, lambda b, n, t, s: rows[*b, t] == keys[*b, s])
        case "dense":
            size = tuple(n if rng.random() < 0.6 else 1 for n in (N, T, S))
            size = (*(n if by_row or rng.random() < 0.6 else 1 for n in batch), *size)
            cells = rng.random(size) < 0.5
            full = np.broadcast_to(cells, grid.shape)
            return Drawn(Dense(jnp.asarray(cells)), lambda b, n, t, s: full[*b, n, t, s])


def trees(grid, depth=2, by_row=False):
    """How a mask is made of masks by & | ~: a leaf, or an operator and what it takes."""
    inner = leaves(grid, by_row)
    for _ in range(depth):
        inner |= st.tuples(st.just(operator.invert), inner)
        inner |= st.tuples(st.sampled_from([operator.and_, operator.or_]), inner, inner)
    return inner


def made(tree):
    """The mask of a tree, with its cells said once more in Python. Not drawn: type checks are random."""
    if isinstance(tree, Drawn):
        return tree
    op, *parts = tree[0], *map(made, tree[1:])
    a, b = parts[0].sees, parts[-1].sees
    sees = {
        operator.invert: lambda *cell: not a(*cell),
        operator.and_: lambda *cell: a(*cell) and b(*cell),
        operator.or_: lambda *cell: a(*cell) or b(*cell),
    }[op]
    return Drawn(op(*(part.mask for part in parts)), sees)


def draw_mask(data, grid, depth=1, by_row=False):
    return made(data.draw(trees(grid, depth, by_row))).mask


def full(mask, grid):
    """All cells of a mask; those it gives have the rank of the logits."""
    cells = mask.cells(grid)
    assert cells.dtype == bool
    assert len(cells.shape) == len(grid.shape)
    return np.broadcast_to(np.asarray(cells), grid.shape)


def same(grid, first, *others):
    for other in others:
        exactly(full(other, grid), full(first, grid))


def rows(cells):
    """The table [T, S] of a mask that is the same in every row and head."""
    return np.asarray(cells).reshape(cells.shape[-2:])


@contextlib.contextmanager
def untyped_here():
    """As the fixture `untyped`, for one block: signatures name JAX arrays, and NumPy's do as well."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# each mask, cell by cell


def says(grid, mask, sees):
    wanted = np.zeros(grid.shape, bool)
    for *b, n, t, s in np.ndindex(grid.shape):
        wanted[*b, n, t, s] = sees(tuple(b), n, t, s)
    exactly(full(mask, grid), wanted)


@pytest.mark.parametrize("kind", LEAVES)
@given(data=st.data())
def test_a_mask_shows_the_cells_that_it_says(kind, data):
    grid = data.draw(grids())
    says(grid, *data.draw(leaves(grid, kind=kind)))


@given(st.data())
def test_masks_made_of_masks_show_the_cells_that_they_say(data):
    grid = data.draw(grids())
    says(grid, *made(data.draw(trees(grid))))


@given(st.sampled_from(EMPTY), st.data())
def test_a_mask_of_nothing_is_empty(shape, data):
    grid = data.draw(grids([shape]))
    assert full(draw_mask(data, grid), grid).size == 0


def test_the_grid_stands_where_its_offset_says():
    grid = Grid((2, 3, 2, 4), jnp.asarray([0, 7]))
    assert grid.offset().shape == (2, 1, 1, 1)
    assert grid.queries().tolist() == [[[[0], [1]]], [[[7], [8]]]]
    assert grid.keys().tolist() == [[[[0, 1, 2, 3]]]]
    assert grid.ahead()[:, 0, :, 0].tolist() == [[0, -1], [-7, -8]]
    assert {x.dtype.name for x in (grid.offset(), grid.queries(), grid.keys(), grid.ahead())} == {"int32"}


@pytest.mark.parametrize("length", [1, 4])
def test_equal_lengths_need_no_offset(length):
    exactly(full(Causal(), Grid((1, length, length))), full(Causal(), Grid((1, length, length), 0)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint32"])
def test_offsets_of_any_integer_type_count_in_int32(dtype, x64):
    grid = Grid((2, 3, 2, 4), jnp.asarray([0, 7], dtype))
    assert grid.ahead().dtype == jnp.int32
    assert grid.ahead()[:, 0, :, 0].tolist() == [[0, -1], [-7, -8]]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint32"])
def test_prefixes_of_any_integer_type_count_in_int32(dtype, x64):
    exactly(full(Prefix(jnp.asarray([0, 2], dtype)), Grid((2, 1, 3, 3)))[:, 0, 0].sum(-1), np.array([0, 2]))


def test_a_mask_does_not_change_and_is_itself_alone():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(1, 2).left = 3
    mask = Padding(jnp.ones((2, 3), bool))
    assert {mask: 1}[mask] == 1
    assert mask != Padding(mask.real)


@pytest.mark.parametrize(("queries", "keys"), [(2, 5), (5, 2), (1, 3)])
@pytest.mark.parametrize("mask", [Causal(), Window(1, 1), Causal() | Prefix(1), ~Causal()])
def test_other_lengths_need_an_offset_and_both_alignments_are_named(queries, keys, mask):
    message = f"T={queries} queries meet S={keys} keys: 0 aligns the first .*S - T = {keys - queries} the last"
    with pytest.raises(ValueError, match=message):
        mask.cells(Grid((2, 1, queries, keys)))


@given(attention_shapes, st.integers(-1, 4), st.sampled_from([None, (1, 0), (0, 2)]))
def test_the_causal_flag_and_window_of_attention_are_those_masks(shape, offset, window):
    q, k, _ = map(jnp.asarray, qkv(shape, 0))
    flags = allowed_keys(q, k, causal=True, window=window, q_offset=offset)
    mask = combine(Causal(), None if window is None else Window(*window))
    exactly(np.asarray(flags), np.asarray(allowed_keys(q, k, mask=mask, q_offset=offset)))


@given(attention_shapes, st.data())
def test_allowed_keys_are_the_cells_of_a_mask(shape, data):
    q, k, _ = map(jnp.asarray, qkv(shape, 0))
    grid = data.draw(grids([(*shape.batch, shape.N, shape.T, shape.S)]))
    mask = draw_mask(data, grid)
    exactly(np.asarray(allowed_keys(q, k, mask=mask, q_offset=grid.q_offset)), np.asarray(mask.cells(grid)))


# the algebra: & and | of masks are those of sets


@given(st.data())
def test_and_and_or_are_associative_commutative_and_idempotent(data):
    grid = data.draw(grids())
    a, b, c = (draw_mask(data, grid) for _ in range(3))
    for op in (operator.and_, operator.or_):
        same(grid, op(op(a, b), c), op(a, op(b, c)))
        same(grid, op(a, b), op(b, a))
        same(grid, op(a, a), a)


@given(st.data())
def test_and_and_or_absorb_and_distribute(data):
    grid = data.draw(grids())
    a, b, c = (draw_mask(data, grid) for _ in range(3))
    same(grid, a & (a | b), a | (a & b), a)
    same(grid, a & (b | c), (a & b) | (a & c))
    same(grid, a | (b & c), (a | b) & (a | c))


@given(st.data())
def test_not_is_the_complement(data):
    grid = data.draw(grids())
    a, b = (draw_mask(data, grid) for _ in range(2))
    same(grid, ~~a, a)
    same(grid, ~(a & b), ~a | ~b)
    same(grid, ~(a | b), ~a & ~b)
    assert not full(a & ~a, grid).any()
    assert full(a | ~a, grid).all()


@given(st.data())
def test_none_is_the_mask_that_allows_everything(data):
    grid = data.draw(grids())
    a, b = (draw_mask(data, grid) for _ in range(2))
    everything = Dense(jnp.ones((1,) * len(grid.shape), bool))
    same(grid, a, a & None, None & a, combine(a), combine(None, a, None), a & everything)
    same(grid, a & b, combine(a, b), combine(a, None, b))
    assert combine() is None
    assert combine(None, None) is None


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@given(data=st.data())
def test_arrays_are_masks_on_either_side(make, data):
    grid = data.draw(grids())
    a, b = draw_mask(data, grid), draw_mask(data, grid)
    array = make(b.cells(grid))
    with untyped_here():
        same(grid, a & b, a & array, array & a, combine(a, array), combine(array, a))
        same(grid, a | b, a | array, array | a)
        same(grid, b, as_mask(array), combine(array), Dense(array), ~~as_mask(array))
    assert as_mask(a) is a


# masks are pytrees


@given(st.data())
def test_masks_pass_through_jit_and_its_flattening(data):
    grid = data.draw(grids(SHAPES[:3:2]))
    mask = draw_mask(data, grid)
    parts, structure = jax.tree.flatten(mask)
    exactly(full(jax.tree.unflatten(structure, parts), grid), full(mask, grid))
    arrays = jax.tree.map(jnp.asarray, mask)
    assert all(isinstance(part, jax.Array) for part in jax.tree.leaves(arrays))
    exactly(np.asarray(jax.jit(lambda mask: mask.cells(grid))(mask)), np.asarray(mask.cells(grid)))


@given(st.data())
def test_vmapped_masks_are_the_batched_ones_and_scanned_ones_each_their_own(data):
    grid = data.draw(grids([(2, 1, 3, 3), (3, 2, 5, 3)], by_row=True))
    mask = draw_mask(data, grid, by_row=True)
    one = lambda mask, offset: mask.cells(Grid(grid.shape[1:], offset))
    batched = np.broadcast_to(mask.cells(grid), (grid.shape[0], *mask.cells(grid).shape[1:]))
    exactly(np.asarray(jax.vmap(one)(mask, grid.q_offset)), batched)
    assert jax.tree.structure(mask) == jax.tree.structure(jax.tree.map(lambda x: x[0], mask))

    def step(carried, row):
        return carried, (one(*row), carried.cells(grid))

    carried, (scanned, whole) = jax.lax.scan(step, mask, (mask, grid.q_offset))
    exactly(np.asarray(scanned), batched)
    same(grid, mask, carried)
    exactly(np.asarray(whole[0]), np.asarray(mask.cells(grid)))


def test_the_size_of_a_window_is_part_of_its_structure():
    assert jax.tree.leaves(Window(1, 2)) == jax.tree.leaves(Causal()) == []
    assert jax.tree.structure(Window(1, 2)) != jax.tree.structure(Window(2, 2))


@given(st.sampled_from(SQUARE_SHAPES[::2]), seeds)
def test_a_mask_said_as_a_value_or_as_an_array_gives_the_same_bits(shape, seed):
    """Also under vmap over the rows of the batch."""
    rng, q_k_v = np.random.default_rng(seed), qkv(shape, seed)
    grid = Grid((*shape.batch, shape.N, shape.T, shape.S))
    real, ids = rng.random((*shape.batch, shape.S)) < 0.7, rng.integers(0, 2, (*shape.batch, shape.S))
    mask = Causal() & Padding(jnp.asarray(real)) | Segments(jnp.asarray(ids)) & ~Window(1, 1)
    out = attend(*q_k_v, mask=mask)
    exactly(attend(*q_k_v, mask=full(mask, grid)), out)
    exactly(attend(*q_k_v, mask=mask & Dense(jnp.ones((1,) * len(grid.shape), bool))), out)
    one_row = jax.jit(jax.vmap(lambda q, k, v, mask: dot_product_attention(q, k, v, mask=mask)))
    exactly(np.asarray(one_row(*q_k_v, mask)), out)


# windows, prefixes, segments and padding


@given(st.sampled_from([1, 2, 5, 7]), st.integers(0, 9), st.integers(0, 9))
def test_a_window_shows_so_many_keys_and_no_more(length, left, right):
    grid, i = Grid((1, length, length)), np.arange(length)
    seen = rows(Window(left, right).cells(grid)).sum(-1)
    exactly(seen, np.minimum(i, left) + 1 + np.minimum(length - 1 - i, right))
    causal = rows((Causal() & Window(left, right)).cells(grid))
    exactly(causal.sum(-1), np.minimum(i + 1, left + 1))
    assert not (causal & ~np.tri(length, dtype=bool)).any()
    exactly(rows(Window(0, 0).cells(grid)), np.eye(length, dtype=bool))
    exactly(rows(Window(length - 1 + left, 0).cells(grid)), np.tri(length, dtype=bool))
    exactly(rows((Causal() & Window(2**40, right)).cells(grid)), np.tri(length, dtype=bool))


@pytest.mark.parametrize("offset", [0, 2**20, 2**31 - 1])
def test_a_window_wider_than_all_positions_shows_every_key(offset):
    assert full(Window(2**31, 2**31), Grid((1, 1, 3), offset)).all()
    assert full(Window(offset, 0), Grid((1, 1, 1), offset)).all()
    assert not full(Window(max(offset - 1, 0), 0), Grid((1, 1, 1), max(offset, 1))).any()


@given(st.data(), st.integers(0, 3))
def test_at_an_offset_stand_those_rows_of_the_whole(data, offset):
    whole, part = Grid((1, 7, 7)), Grid((1, 4, 7), offset)
    mask = data.draw(st.sampled_from([Causal(), Window(2, 1), Prefix(3), Causal() | Prefix(3), ~Window(1, 0)]))
    exactly(full(mask, part), full(mask, whole)[:, offset : offset + 4])


@given(st.sampled_from([1, 2, 5]), st.integers(-1, 7))
def test_the_keys_of_a_prefix_are_seen_by_all_and_the_rest_is_causal(length, prefix):
    cells = rows(causal_or_prefix(prefix).cells(Grid((1, length, length))))
    exactly(cells, np.tri(length, dtype=bool) | (np.arange(length) < prefix))
    causal = rows(causal_or_prefix(None).cells(Grid((1, length, length))))
    exactly(causal, np.tri(length, dtype=bool))
    if prefix <= 1:
        exactly(cells, causal)
    if prefix >= length:
        assert cells.all()


@given(st.sampled_from(SQUARE_SHAPES[::2]), seeds, floats)
def test_packed_segments_are_separate_runs_and_do_not_touch(shape, seed, dtype):
    q, k, v = qkv(shape, seed, dtype)
    ids = np.broadcast_to([5, 5, 0, 0, 0, 2, 2][: shape.T], (*shape.batch, shape.T))
    how = {"mask": Segments(jnp.asarray(ids)), "causal": True}
    packed = attend(q, k, v, **how)
    for name in np.unique(ids):
        mine = np.flatnonzero(ids[(0,) * len(shape.batch)] == name)
        alone = attend(*(x[..., mine, :, :] for x in (q, k, v)), causal=True)
        closely(packed[..., mine, :, :], alone, q, k, v)
        elsewhere = np.broadcast_to((ids != name)[..., None], k.shape[:-1])
        q_elsewhere = np.broadcast_to((ids != name)[..., None], q.shape[:-1])
        for new in (np.float32(1e3), np.float32(np.nan)):
            foul = [replaced(q, q_elsewhere, new), replaced(k, elsewhere, new), replaced(v, elsewhere, new)]
            exactly(attend(*foul, **how)[..., mine, :, :], packed[..., mine, :, :])


@given(st.sampled_from([(), (2,), (2, 1)]), st.lists(st.integers(1, 4), max_size=4), seeds)
def test_segment_positions_count_from_zero_in_each_segment(batch, lengths, seed):
    names = np.random.default_rng(seed).permutation(9)
    ids = np.concatenate([np.full(n, names[i]) for i, n in enumerate(lengths)] + [np.zeros(0, int)])
    wanted = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(0, int)]).astype("int32")
    got = segment_positions(jnp.asarray(np.broadcast_to(ids, (*batch, len(ids)))))
    exactly(np.asarray(got), np.broadcast_to(wanted, got.shape))
    assert got.shape == (*batch, len(ids))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_tokens_have_no_segment_positions(shape):
    assert segment_positions(jnp.zeros(shape, jnp.int32)).shape == shape


def test_segment_positions_are_each_rows_own():
    exactly(np.asarray(segment_positions(jnp.asarray([[1, 1, 2], [3, 4, 4]]))), np.int32([[0, 1, 0], [0, 0, 1]]))


@pytest.mark.parametrize("side", ["right", "left"])
@given(shape=st.sampled_from(SQUARE_SHAPES[2:]), seed=seeds, dtype=floats)
def test_padding_on_either_side_changes_no_real_row(side, shape, seed, dtype):
    q, k, v = qkv(shape, seed, dtype)
    half = (shape.S + 1) // 2
    kept = slice(None, half) if side == "right" else slice(shape.S - half, None)
    real = np.zeros((*shape.batch, shape.S), bool)
    real[..., kept] = True
    padded = attend(q, k, v, mask=Padding(jnp.asarray(real)), causal=True)[..., kept, :, :]
    closely(padded, attend(*(x[..., kept, :, :] for x in (q, k, v)), causal=True), q, k, v)
    outside = np.broadcast_to(~real[..., None], k.shape[:-1])
    foul = [replaced(x, outside, np.float32(np.nan)) for x in (k, v)]
    exactly(attend(q, *foul, mask=Padding(jnp.asarray(real)), causal=True)[..., kept, :, :], padded)


@given(st.sampled_from(SQUARE_SHAPES[::2]), seeds, floats)
def test_padding_on_the_query_axis_makes_dead_rows_and_no_other_change(shape, seed, dtype):
    q, k, v = qkv(shape, seed, dtype)
    real = np.random.default_rng(seed).random((*shape.batch, shape.T)) < 0.6
    out = attend(q, k, v, mask=Padding(jnp.asarray(real)))
    dead = attend(q, k, v, mask=Padding(jnp.asarray(real)) & jnp.asarray(real[..., None, :, None]))
    exactly(dead, np.where(real[..., None, None], out, out.dtype.type(0)))


@given(st.sampled_from([(4,), (2, 4), (3, 2, 1), (0, 4), (2, 0)]), seeds)
def test_padding_is_hidden_from_every_query_of_its_row_alone(size, seed):
    real = jnp.asarray(np.random.default_rng(seed).random(size) < 0.5)
    cells = padding(real, size).cells(Grid((*size[:-1], 2, 3, size[-1])))
    exactly(np.asarray(cells[..., 0, 0, :]), np.asarray(real))
    assert cells.shape == (*size[:-1], 1, 1, size[-1])
    assert padding(None, size) is None


def test_segments_of_one_or_two_sides():
    ids = jnp.asarray([[1, 1, 2]])
    assert segments(None, (1, 3)) is None
    assert pair_segments(None, None) is None
    assert segments(ids, (1, 3)).queries is ids
    pair = pair_segments(ids, ids[:, :2])
    exactly(rows(pair.cells(Grid((1, 1, 3, 2), 0))), np.array([[1, 1], [1, 1], [0, 0]], bool))
    exactly(rows(segments(ids, (1, 3)).cells(Grid((1, 1, 3, 3)))), np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool))


# bad input

GRID = Grid((2, 1, 3, 3))
TRUE = jnp.ones((2, 3), bool)
IDS = jnp.ones((2, 3), jnp.int32)
BAD = {
    "float padding": (
        lambda: Padding(IDS.astype(float)).cells(GRID),
        TypeError,
        "bool, True where.*got float32.*!= pad_id",
    ),
    "integer padding": (lambda: Padding(IDS).cells(GRID), TypeError, "a padding mask must be bool.*got int32"),
    "padding of one row": (
        lambda: Padding(TRUE[0]).cells(GRID),
        ValueError,
        r"\[\*B, S\], here \(2, 3\), got \(3,\)",
    ),
    "padding of other keys": (
        lambda: Padding(TRUE).cells(Grid((2, 1, 3, 4), 0)),
        ValueError,
        r"\[\*B, S\], here \(2, 4\), got \(2, 3\)",
    ),
    "integer padding of tokens": (lambda: padding(IDS, (2, 3)), TypeError, "a padding mask must be bool.*got int32"),
    "padding of other tokens": (
        lambda: padding(TRUE, (2, 4)),
        ValueError,
        r"a padding mask must have the shape of its tokens, here \(2, 4\), got \(2, 3\)",
    ),
    "segments of other tokens": (
        lambda: segments(IDS, (2, 4)),
        ValueError,
        r"segment ids must have the shape of their tokens, here \(2, 4\), got \(2, 3\)",
    ),
    "one packed side": (lambda: pair_segments(IDS, None), ValueError, "both source and target or with neither"),
    "the other side": (lambda: pair_segments(None, IDS), ValueError, "both source and target or with neither"),
    "float segments": (
        lambda: Segments(IDS.astype(float)).cells(GRID),
        TypeError,
        "segment ids must be integers, got float32",
    ),
    "float keys": (lambda: Segments(IDS, IDS.astype(float)).cells(GRID), TypeError, "must be integers, got float32"),
    "bool segments": (lambda: Segments(TRUE).cells(GRID), TypeError, "segment ids must be integers, got bool"),
    "segments of queries": (
        lambda: Segments(IDS[:, :2], IDS).cells(GRID),
        ValueError,
        r"of queries must have \[\*B, T\], here \(2, 3\), got \(2, 2\)",
    ),
    "segments of keys": (
        lambda: Segments(IDS, IDS[:1]).cells(GRID),
        ValueError,
        r"of keys must have \[\*B, S\], here \(2, 3\), got \(1, 3\)",
    ),
    "segments of other keys": (
        lambda: Segments(IDS).cells(Grid((2, 1, 3, 4))),
        ValueError,
        r"of keys must have \[\*B, S\], here \(2, 4\), got \(2, 3\)",
    ),
    "float prefix": (lambda: Prefix(1.5).cells(GRID), ValueError, "prefix has an integer length.*got float32"),
    "bool prefix": (lambda: Prefix(True).cells(GRID), ValueError, "prefix has an integer length.*got bool"),
    "prefix of other rows": (lambda: Prefix(IDS[0]).cells(GRID), ValueError, r"batch shape \(2,\), got int32 \(3,\)"),
    "window < 0": (lambda: Window(-1, 0), ValueError, r"a window must be \(left, right\).*got \(-1, 0\).*causal=True"),
    "float window": (lambda: Window(1, 0.5), ValueError, r"a window must be .*got \(1, 0.5\)"),
    "float mask": (lambda: Dense(jnp.zeros((2, 1, 3, 3))).cells(GRID), TypeError, "mask must be bool.*float32.*bias="),
    "0/1 mask": (lambda: (Causal() & IDS[:, None, None]).cells(GRID), TypeError, r"bool.*int32.*astype\(bool\)"),
    "[B, S]": (
        lambda: (Causal() | TRUE).cells(GRID),
        ValueError,
        r"\[\*B, N, T, S\] = \(2, 1, 3, 3\).*got \(2, 3\).*Padding",
    ),
    "too few axes": (lambda: Dense(TRUE[:, :1]).cells(GRID), ValueError, r"3, 3\), with 1 where it does, got \(2, 1\)"),
    "too many axes": (lambda: Dense(TRUE[None, None, None]).cells(GRID), ValueError, r"got \(1, 1, 1, 2, 3\)"),
    "a larger axis": (lambda: Dense(TRUE[:, None, None].repeat(2, 1)).cells(GRID), ValueError, r"got \(2, 2, 1, 3\)"),
    "a smaller axis": (lambda: Dense(TRUE[:, None, None, :2]).cells(GRID), ValueError, r"got \(2, 1, 1, 2\)"),
    "a list": (lambda: Causal() & [[True]], TypeError, r"one of core.masks or a bool array, got \[\[True\]\]"),
    "a number": (lambda: combine(None, 5), TypeError, "one of core.masks or a bool array, got 5"),
    "or None": (lambda: Causal() | None, TypeError, "got None; None goes with & alone"),
    "float offset": (lambda: Causal().cells(Grid((1, 3, 3), 1.5)), TypeError, "q_offset must be an integer.*float32"),
    "offset of other rows": (
        lambda: Causal().cells(Grid((2, 1, 3, 3), IDS[0])),
        ValueError,
        r"q_offset must be one integer or have the batch shape \(2,\), got \(3,\)",
    ),
    "offset with an axis too many": (
        lambda: Causal().cells(Grid((1, 3, 3), jnp.zeros(1, jnp.int32))),
        ValueError,
        r"batch shape \(\), got \(1,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_named_with_rule_and_remedy(name, untyped):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_a_mask_alone_does_not_know_its_cells():
    with pytest.raises(NotImplementedError):
        Mask().cells(GRID)
