"""Laws of relative positions: each kind against a loop over queries and keys, and the shift against a gather."""

import bisect
import functools
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from core.attention import IMPLEMENTATIONS, attention_with_weights, dot_product_attention
from core.masks import Grid
from core.relative import (
    T5,
    ALiBi,
    Relative,
    Shaw,
    TransformerXL,
    alibi_slopes,
    extend_history,
    rel_shift,
    rel_unshift,
    t5_buckets,
)
from tests.reference import attention_scores, softmax
from tests.strategies import RECTANGULAR_SHAPES, SQUARE_SHAPES, AttentionShape, bool_mask, qkv, seeds
from tests.test_positions import exact_sinusoid

U = 2.0**-24
SHAPES = [SQUARE_SHAPES[0], *RECTANGULAR_SHAPES, SQUARE_SHAPES[3]]  # T = S, T < S, T > S, T = 1, grouped heads
shapes = st.sampled_from(SHAPES)
SMALL = AttentionShape((2,), 3, 4, 4, 2, 3, 2)
KINDS = ["alibi", "t5", "t5 of the past", "shaw", "shaw of keys", "transformer_xl"]
LEARNED = KINDS[1:]
exactly = functools.partial(np.testing.assert_array_equal, strict=True)


def normals(seed, *shape):
    return np.random.default_rng([seed, 5]).standard_normal(shape)


def relative_of(kind, shape, seed, dtype="float32"):
    """A value of that kind that fits the shape; tables so short that distances reach beyond them."""
    N, H, draw = shape.N, shape.H, lambda i, *size: jnp.asarray(normals(seed + i, *size), dtype)
    match kind:
        case "alibi":
            return ALiBi()
        case "t5":
            return T5(draw(0, 8, N), max_distance=5)
        case "t5 of the past":
            return T5(draw(0, 5, N), bidirectional=False, max_distance=6)
        case "shaw":
            return Shaw(draw(0, 5, H), draw(1, 5, shape.Hv))
        case "shaw of keys":
            return Shaw(draw(0, 3, H))
        case "transformer_xl":
            return TransformerXL(draw(0, N, H), draw(1, 6, N * H), draw(2, N, H))


def offsets(shape, seed, far=2**20):
    """Where the first query of each row stands: before the keys, among them, behind them, far behind."""
    rng = np.random.default_rng([seed, 6])
    near = rng.integers(-2, shape.S + 3, shape.batch)
    return np.where(rng.random(shape.batch) < 0.2, far + near, near).astype("int32")


def grid_of(q, k, offset):
    return Grid((*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3]), offset)


@functools.partial(jax.jit, static_argnames="scale")
def logits(relative, q, k, offset, *, scale):
    return relative.logits(q, k, grid_of(q, k, offset), scale=scale)


attend = jax.jit(attention_with_weights, static_argnames=("causal", "scale", "dropout_rate", "window"))


# the oracle: float64, one cell at a time


class Cells(NamedTuple):
    """What is added to the logits, `[*B, N, T, S]`, and how large the terms of its sums are, in all."""

    value: np.ndarray
    size: np.ndarray
    steps: int  # roundings on the way to it


def exact_slope(head, heads):
    """Press et al. 2022: a geometric sequence; heads beyond a power of two take the odd members of twice as long."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    if head < power:
        return (2.0 ** (-8.0 / power)) ** (head + 1)
    return (2.0 ** (-4.0 / power)) ** (2 * (head - power) + 1)


def bucket_starts(buckets, furthest):
    """The least distance of each bucket of one side, as the smallest whole number above an exact power."""
    exact = buckets // 2
    starts = list(range(exact))
    for step in range(buckets - exact):
        ratio = Fraction(furthest, exact) ** step
        starts.append(next(d for d in range(exact, furthest + 2) if Fraction(d, exact) ** (buckets - exact) >= ratio))
    return starts


def exact_bucket(behind, buckets, furthest, bidirectional):
    """Raffel et al. 2020: keys ahead of the query have the second half of the buckets, or share the first one."""
    side = buckets // 2 if bidirectional else buckets
    distance = abs(behind) if bidirectional else max(behind, 0)
    found = bisect.bisect_right(bucket_starts(side, furthest), min(distance, furthest)) - 1
    return found + side * (bidirectional and behind < 0)


def cells(relative, q, k, offset, scale):
    """The formula of each paper."""
    *batch, T, N, H = q.shape
    S, group = k.shape[-3], N // k.shape[-2]
    value, size, steps = np.zeros((*batch, N, T, S)), np.zeros((*batch, N, T, S)), 0
    q, k = q.astype("float64"), k.astype("float64")
    learned = {name: np.asarray(x, "float64") for name, x in vars(relative).items() if hasattr(x, "shape")}
    find_sinusoid, find_bucket = functools.cache(exact_sinusoid), functools.cache(exact_bucket)
    for *b, n, t, s in np.ndindex(*value.shape):
        behind = t + int(offset[*b]) - s
        match relative:
            case ALiBi():
                terms, steps = [-exact_slope(n, N) * abs(behind)], 2
            case T5():
                table = learned["embedding"]
                terms = [table[find_bucket(behind, len(table), relative.max_distance, relative.bidirectional), n]]
            case Shaw():
                terms, steps = scale * q[*b, t, n] * shaw_row(learned["key_embedding"], behind), H + 2
            case TransformerXL():
                row = find_sinusoid(behind, len(learned["kernel"])) @ learned["kernel"][:, n * H : (n + 1) * H]
                content = scale * learned["content_bias"][n] * k[*b, s, n // group]
                position = scale * (q[*b, t, n] + learned["position_bias"][n]) * row
                terms, steps = np.concatenate([content, position]), H + len(learned["kernel"]) + 8
                reach = abs(q[*b, t, n]) + abs(learned["position_bias"][n])
                reach = reach * abs(learned["kernel"][:, n * H : (n + 1) * H]).sum(0)
                size[*b, n, t, s] = scale * reach.sum()
        value[*b, n, t, s] = np.sum(terms)
        size[*b, n, t, s] += np.abs(terms).sum()
    return Cells(value, size, steps)


def shaw_row(table, behind):
    """Row 0 is of the key furthest behind, the last of the one furthest ahead, the middle one of the query itself."""
    middle = (len(table) - 1) // 2
    return table[middle + max(-middle, min(middle, -behind))]


def value_table(relative):
    table = getattr(relative, "value_embedding", None)
    return None if table is None else np.asarray(table, "float64")


class Attended(NamedTuple):
    """Attention in float64, and by how much float32 may differ (T1)."""

    out: np.ndarray
    weights: np.ndarray
    bound: np.ndarray


def attended(relative, q, k, v, offset, *, scale=None, **rules):
    """softmax(scale q k^T + relative) (v + row), and T1 with the errors of the relative logits added to its own."""
    *batch, T, N, H = q.shape
    S, group, scale = k.shape[-3], N // k.shape[-2], scale or 1 / math.sqrt(H)
    q, k, v = (x.astype("float64") for x in (q, k, v))
    added = cells(relative, q, k, offset, scale)
    scores = attention_scores(q, k, bias=added.value, q_offset=offset, scale=scale, **rules)
    errors = added.steps * added.size + 2 * np.abs(added.value)
    errors += (H + 4) * attention_scores(np.abs(q), np.abs(k), scale=scale)
    table = value_table(relative)
    out, bound = np.zeros((*batch, T, N, v.shape[-1])), np.zeros((*batch, T, N, v.shape[-1]))
    weights = np.zeros(scores.shape)
    for *b, n, t in np.ndindex(*scores.shape[:-1]):
        weights[*b, n, t] = w = softmax(scores[*b, n, t])
        worst = errors[*b, n, t][w > 0].max(initial=0)
        gap = np.where(w > 0, scores[*b, n, t].max(initial=-np.inf) - np.where(w > 0, scores[*b, n, t], 0), 0)
        for s in np.flatnonzero(w > 0):
            rows = [v[*b, s, n // group]]
            if table is not None:
                rows.append(shaw_row(table, t + int(offset[*b]) - s))
            out[*b, t, n] += w[s] * sum(rows)
            bound[*b, t, n] += U * (2 * worst + w @ gap + gap[s] + 2 * S + 8) * w[s] * sum(map(abs, rows))
    return Attended(out, weights, bound + 2 * S * 2.0**-126)


# each kind is its formula


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes, seed=seeds)
def test_the_logits_are_those_of_a_loop_over_queries_and_keys(kind, shape, seed):
    """T1: T = S, T < S, T > S, an offset for each row, grouped heads."""
    q, k, _ = qkv(shape, seed)
    relative, offset = relative_of(kind, shape, seed), offsets(shape, seed)
    got = logits(relative, q, k, offset, scale=0.7)
    wanted = cells(relative, q, k, offset, 0.7)
    assert got.dtype == jnp.float32
    assert (np.abs(got - wanted.value) <= U * wanted.steps * wanted.size).all()


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes, seed=seeds, rules=st.sampled_from(["", "causal", "mask"]))
def test_attention_with_relative_positions_is_that_of_the_papers_in_float64(kind, shape, seed, rules):
    """T3."""
    with jax.enable_x64(True):
        q, k, v = qkv(shape, seed, "float64")
        relative, offset = relative_of(kind, shape, seed, "float64"), offsets(shape, seed)
        full = (*shape.batch, shape.N, shape.T, shape.S)
        given = {"mask": np.broadcast_to(bool_mask(shape, seed), full)} if rules == "mask" else {}
        given |= {"causal": True} if rules == "causal" else {}
        out, weights = attend(q, k, v, relative=relative, q_offset=offset, **given)
        wanted = attended(relative, q, k, v, offset, **given)
        np.testing.assert_allclose(weights, wanted.weights, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(out, wanted.out, rtol=0, atol=1e-12 * (1 + np.abs(wanted.out).max(initial=0)))


@pytest.mark.parametrize("kind", KINDS)
@given(shape=st.sampled_from([SMALL, RECTANGULAR_SHAPES[1]]), seed=seeds)
def test_attention_with_relative_positions_is_as_exact_as_float32_allows(kind, shape, seed):
    """T1."""
    q, k, v = qkv(shape, seed)
    relative, offset = relative_of(kind, shape, seed), offsets(shape, seed)
    out = attend(q, k, v, relative=relative, q_offset=offset)[0]
    wanted = attended(relative, q, k, v, offset)
    assert (np.abs(out - wanted.out) <= wanted.bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_sixteen_bits_lose_no_more_than_twice_what_plain_sixteen_bit_sums_do(kind, dtype, seed):
    """T2."""
    q, k, v = qkv(SMALL, seed, dtype)
    relative, offset = relative_of(kind, SMALL, seed, dtype), offsets(SMALL, seed, far=200)
    out, weights = map(np.asarray, attend(q, k, v, relative=relative, q_offset=offset))
    assert out.dtype == dtype
    assert weights.dtype == np.float32
    wanted, rounded = attended(relative, q, k, v, offset).out, lambda x: x.astype(dtype).astype("float64")
    scores = attention_scores(*(x.astype("float64") for x in (q, k)))
    plain = rounded(rounded(scores) + rounded(cells(relative, q, k, offset, SMALL.H**-0.5).value))
    plain = rounded(np.exp(plain - plain.max(-1, keepdims=True)))
    plain = rounded(plain / rounded(plain.sum(-1, keepdims=True)))
    table, values, naive = value_table(relative), v.astype("float64"), np.zeros_like(wanted)
    for *b, n, t, s in np.ndindex(*scores.shape):
        row = 0 if table is None else shaw_row(table, t + int(offset[*b]) - s)
        naive[*b, t, n] += plain[*b, n, t, s] * (values[*b, s, n // 2] + row)
    floor = 2 * np.abs(rounded(wanted + 0.3) - 0.3 - wanted).max()
    assert np.abs(out.astype("float64") - wanted).max() <= 2 * np.abs(rounded(naive) - wanted).max() + floor


# a distance is a distance


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, shift=st.integers(0, 2**20))
def test_what_two_tokens_are_to_each_other_does_not_move_with_the_length(kind, seed, shift):
    """T3: more tokens behind them, more before them, or the same keys seen from a chunk that starts later."""
    shape = AttentionShape((2,), 7, 7, 4, 2, 4, 4)
    with jax.enable_x64(True):
        q, k, _ = qkv(shape, seed, "float64")
        relative = relative_of(kind, shape, seed, "float64")
        zero = np.zeros(2, "int32")
        whole = np.asarray(logits(relative, q, k, zero, scale=0.5))
        near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12 * (1 + np.abs(whole).max()))
        whole = np.broadcast_to(whole, (2, 4, 7, 7))
        near(np.broadcast_to(logits(relative, q[:, :3], k[:, :3], zero, scale=0.5), (2, 4, 3, 3)), whole[..., :3, :3])
        near(np.broadcast_to(logits(relative, q[:, 4:], k[:, 4:], zero, scale=0.5), (2, 4, 3, 3)), whole[..., 4:, 4:])
        near(np.broadcast_to(logits(relative, q[:, 4:], k, zero + 4, scale=0.5), (2, 4, 3, 7)), whole[..., 4:, :])
        later = np.array([-shift, shift], "int32")
        near(logits(relative, q[:, 4:], k, later, scale=0.5)[1, :, 0], cells_of_row(relative, q, k, shift)[:, 0])


def cells_of_row(relative, q, k, offset):
    return cells(relative, q[1:, 4:], k[1:], np.array([offset]), 0.5).value[0]


@pytest.mark.parametrize("shape", [AttentionShape((3, 2), 3, 4, 4, 2, 3, 2), AttentionShape((3,), 9, 9, 4, 4, 8, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_one_by_one_give_the_same_bits(kind, shape):
    """T0, with an offset for each row or one for all, which are the same too."""
    q, k, v = qkv(shape, 1)
    relative, each = relative_of(kind, shape, 2), offsets(shape, 3)

    @functools.partial(jax.jit, static_argnums=0)
    def run(by_row, q, k, v, offset):
        def one(q, k, v, offset):
            return dot_product_attention(q, k, v, relative=relative, q_offset=offset if by_row else 1)

        mapped = functools.reduce(lambda f, _: jax.vmap(f), shape.batch, one)
        return mapped(q, k, v, offset), one(q, k, v, offset)

    exactly(*run(True, q, k, v, each))
    together = run(False, q, k, v, each)
    exactly(*together)
    np.testing.assert_allclose(run(True, q, k, v, np.ones_like(each))[1], together[1], rtol=0, atol=4e-6)


@pytest.mark.parametrize("shape", [SMALL._replace(T=T, S=S) for T, S in [(0, 3), (3, 0), (0, 0), (1, 1)]])
@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_or_no_keys_are_no_error(kind, shape):
    q, k, v = qkv(shape, 1)
    out, weights = attend(q, k, v, relative=relative_of(kind, shape, 2), q_offset=np.zeros(2, "int32"))
    assert out.shape == (2, shape.T, 4, 2)
    assert weights.shape == (2, 4, shape.T, shape.S)
    assert (out != 0).all() if shape.S else (out == 0).all()
    relative_of(kind, shape, 2).values(jnp.asarray(weights), Grid(weights.shape, jnp.zeros(2, jnp.int32)), shape.Hv)


# ALiBi


@pytest.mark.parametrize("heads", [*range(1, 34), 48, 64, 112])
def test_slopes_of_alibi_are_those_of_the_paper_for_any_number_of_heads(heads):
    slopes = alibi_slopes(heads)
    assert len(slopes) == heads
    np.testing.assert_allclose(slopes, [exact_slope(n, heads) for n in range(heads)], rtol=1e-12)
    assert len(set(slopes)) == heads


@pytest.mark.parametrize(("heads", "step"), [(1, 8), (2, 4), (4, 2), (8, 1), (16, 0.5)])
def test_slopes_of_a_power_of_two_are_a_geometric_sequence_in_bits(heads, step):
    assert alibi_slopes(heads) == tuple(2.0 ** -(step * (n + 1)) for n in range(heads))


def test_known_slopes_of_alibi():
    """Of the released code for 12 heads: those of 8, then every other one of 16."""
    wanted = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(alibi_slopes(12), wanted, rtol=1e-15)


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12])
@given(seed=seeds, ahead=st.integers(-(2**20), 2**20))
@settings(max_examples=5)
def test_alibi_depends_on_the_distance_alone_and_is_the_same_on_both_sides(heads, seed, ahead):
    """T0, for any queries and keys."""
    shape = AttentionShape((2,), 5, 5, heads, 1, 2, 2)
    q, k, _ = qkv(shape, seed)
    near, far = (np.asarray(logits(ALiBi(), q, k, np.full(2, o, "int32"), scale=1.0))[0] for o in (0, ahead))
    exactly(near, near.swapaxes(-1, -2))
    for array in (near, far):
        for diagonal in range(-4, 5):
            assert all(np.unique(np.diagonal(head, diagonal)).size == 1 for head in array)
    assert (np.diagonal(near, axis1=-2, axis2=-1) == 0).all()
    assert (near[:, 0, 1:] < near[:, 0, :-1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["alibi", "t5", "t5 of the past"])
def test_in_sixteen_bit_models_distances_are_counted_and_weighed_in_float32(kind, dtype):
    """600 keys: bfloat16 knows no odd number above 256; a slope in 16 bits would show in the weights."""
    shape = AttentionShape((1,), 1, 600, 6, 1, 2, 2)
    q, k = np.zeros((1, 1, 6, 2), dtype), np.zeros((1, 600, 1, 2), dtype)
    relative = relative_of(kind, shape, 4)
    weights = np.asarray(attend(q, k, k, relative=relative, q_offset=np.array([599], "int32"))[1])
    scores = cells(relative, q, k, np.array([599]), 1.0).value
    wanted = np.array([softmax(row[0]) for row in scores[0]])
    assert weights.dtype == np.float32
    assert (np.abs(weights[0, :, 0] - wanted) <= U * (1210 + 4 * np.abs(scores[0, :, 0])) * wanted + 1e-37).all()


# T5


bucketings = st.one_of(
    st.sampled_from([(32, 128, True), (32, 128, False), (4, 3, True), (2, 2, False), (12, 162, True), (6, 162, False)]),
    st.tuples(st.integers(2, 24).map(lambda n: 2 * n), st.integers(30, 200), st.booleans()),
    st.tuples(st.integers(2, 40), st.integers(30, 200), st.just(False)),
)


@given(bucketings)
def test_t5_buckets_are_those_of_exact_arithmetic(bucketing):
    """T0, for every distance."""
    buckets, furthest, both = bucketing
    table, starts = t5_buckets(buckets, furthest, bidirectional=both), None
    side = buckets // 2 if both else buckets
    starts = bucket_starts(side, furthest)
    assert table.dtype == np.int32
    behind = [bisect.bisect_right(starts, distance) - 1 for distance in range(furthest + 1)]
    exactly(table[furthest:], np.array(behind, "int32"))
    ahead = np.array(behind[1:], "int32") + side if both else np.zeros(furthest, "int32")
    exactly(table[:furthest][::-1], ahead.astype("int32"))


@given(bucketings)
def test_t5_buckets_grow_with_the_distance_and_are_all_used(bucketing):
    buckets, furthest, both = bucketing
    table = t5_buckets(buckets, furthest, bidirectional=both)
    side = buckets // 2 if both else buckets
    behind = table[furthest:]
    assert (np.diff(behind) >= 0).all()
    exactly(behind[: side // 2], np.arange(side // 2, dtype="int32"))
    assert behind[-1] == side - 1
    if both:
        exactly(table[:furthest][::-1], behind[1:] + np.int32(side))


def published_bucket(relative_position, *, bidirectional, num_buckets, max_distance):
    """`_relative_position_bucket` of the T5 paper's code, key minus query, in NumPy float64."""
    bucket, n = np.zeros(relative_position.shape, int), -relative_position
    if bidirectional:
        num_buckets //= 2
        bucket, n = bucket + (n < 0) * num_buckets, np.abs(n)
    else:
        n = np.maximum(n, 0)
    exact = num_buckets // 2
    with np.errstate(divide="ignore"):
        large = np.log(n / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    large = np.minimum(exact + np.where(n > 0, large, 0).astype(int), num_buckets - 1)
    return bucket + np.where(n < exact, n, large)


@pytest.mark.parametrize("both", [True, False])
def test_t5_buckets_of_the_paper_are_those_of_its_code(both):
    ahead = np.arange(128, -129, -1)
    wanted = published_bucket(ahead, bidirectional=both, num_buckets=32, max_distance=128)
    exactly(t5_buckets(32, 128, bidirectional=both), wanted.astype("int32"))


def test_known_t5_buckets():
    """Where each bucket of the paper's 32 up to 128 begins."""
    behind = t5_buckets(32, 128, bidirectional=True)[128:]
    assert [int(np.argmax(behind == b)) for b in range(16)] == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    behind = t5_buckets(32, 128, bidirectional=False)[128:]
    starts = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert [int(np.argmax(behind == b)) for b in range(32)] == [*range(16), *starts]


@pytest.mark.parametrize("how", [jax.jit, lambda f: f], ids=["compiled", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("both", [True, False])
def test_t5_buckets_are_the_same_compiled_or_not_and_in_any_dtype(both, dtype, how):
    """T0: a table that holds its own row numbers gives the bucket of each distance, from -200 to 200."""
    relative = T5(jnp.arange(32, dtype=dtype)[:, None], bidirectional=both)
    q, k = jnp.zeros((1, 1, 2), dtype), jnp.zeros((401, 1, 2), dtype)
    got = how(lambda q, k: relative.logits(q, k, Grid((1, 1, 401), 200), scale=1.0))(q, k)
    wanted = [exact_bucket(200 - s, 32, 128, both) for s in range(0, 401, 10)]
    assert got.dtype == dtype
    exactly(np.asarray(got, "int32")[0, 0, ::10], np.array(wanted, "int32"))


def test_t5_is_bidirectional_up_to_128_unless_told_otherwise():
    relative = T5(jnp.ones((32, 1)))
    assert (relative.bidirectional, relative.max_distance) == (True, 128)


# the shift


SIZES = [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (1, 1), (0, 4), (4, 0), (0, 0)]
sizes = st.sampled_from(SIZES)
leading = st.sampled_from([(2,), (), (2, 3)])
shifted = jax.jit(rel_shift, static_argnums=1)
unshifted = jax.jit(rel_unshift)


def columns_of(queries, keys):
    return max(queries + keys - 1, 0)


@given(sizes, leading, seeds, st.sampled_from(["float32", "bfloat16"]))
def test_the_shift_brings_each_distance_to_its_key(size, batch, seed, dtype):
    """T0: out[t, s] = x[t, T - 1 - t + s]."""
    T, S = size
    x = normals(seed, *batch, T, columns_of(T, S)).astype(dtype)
    wanted = np.zeros((*batch, T, S), dtype)
    for t, s in np.ndindex(T, S):
        wanted[..., t, s] = x[..., t, T - 1 - t + s]
    exactly(shifted(x, S), wanted)


@given(sizes, leading, seeds)
def test_the_shift_back_puts_each_key_at_its_distance_and_zero_elsewhere(size, batch, seed):
    """T0: out[t, T - 1 - t + s] = x[t, s]; and the shift undoes it."""
    T, S = size
    x = normals(seed, *batch, T, S).astype("float32")
    wanted = np.zeros((*batch, T, columns_of(T, S)), "float32")
    for t, s in np.ndindex(T, S):
        wanted[..., t, T - 1 - t + s] = x[..., t, s]
    exactly(unshifted(x), wanted)
    exactly(shifted(unshifted(x), S), x)


@given(sizes, leading, seeds)
def test_the_two_shifts_are_each_others_transpose(size, batch, seed):
    """T0: of whole numbers <shift x, y> = <x, unshift y>, and the gradient of each is the other."""
    T, S = size
    rng = np.random.default_rng(seed)
    x = rng.integers(-99, 99, (*batch, T, columns_of(T, S))).astype("float32")
    y = rng.integers(-99, 99, (*batch, T, S)).astype("float32")
    assert np.sum(np.asarray(shifted(x, S)) * y) == np.sum(x * np.asarray(unshifted(y)))
    exactly(_pulled_shift(x, y), unshifted(y))
    exactly(_pulled_unshift(y, x), shifted(x, S))


@jax.jit
def _pulled_shift(x, y):
    return jax.vjp(lambda x: rel_shift(x, y.shape[-1]), x)[1](y)[0]


@jax.jit
def _pulled_unshift(y, x):
    return jax.vjp(rel_unshift, y)[1](x)[0]


@given(st.sampled_from(SIZES[:6]), leading, seeds, st.data())
def test_no_row_leaks_into_another(size, batch, seed, data):
    """T0: what stands in row t, NaN even, changes row t alone."""
    T, S = size
    t = data.draw(st.integers(0, T - 1))
    for f, width in ((lambda x: shifted(x, S), columns_of(T, S)), (unshifted, S)):
        x = normals(seed, *batch, T, width).astype("float32")
        foul = x.copy()
        foul[..., t, :] = np.nan
        clean, out = np.asarray(f(x)), np.asarray(f(foul))
        exactly(np.delete(out, t, axis=-2), np.delete(clean, t, axis=-2))
        assert np.isnan(out[..., t, :]).sum() == S * math.prod(batch)


@given(st.sampled_from([(3, 3), (3, 7), (1, 5)]), leading, seeds)
def test_the_shift_is_that_of_the_transformer_xl_code_where_causal(size, batch, seed):
    """T0: with S - T keys of memory; the published shift is wrong ahead of the query, which its mask hides."""
    T, S = size
    x = normals(seed, *batch, T, columns_of(T, S)).astype("float32")
    padded = np.concatenate([np.zeros((*batch, T, 1), "float32"), x[..., :S]], axis=-1)
    published = padded.reshape(*batch, S + 1, T)[..., 1:, :].reshape(*batch, T, S)
    seen = np.tril(np.ones((T, S), bool), S - T)
    exactly(np.asarray(shifted(x, S))[..., seen], published[..., seen])


# Transformer-XL


@given(seeds)
def test_transformer_xl_is_the_square_of_the_paper(seed):
    """T3: q k + q R + u k + v R (Dai et al. 2019, equation at the end of 3.3), expanded."""
    shape = AttentionShape((2,), 4, 6, 3, 3, 4, 4)
    with jax.enable_x64(True):
        q, k, v = qkv(shape, seed, "float64")
        xl = relative_of("transformer_xl", shape, seed, "float64")
        weights = np.asarray(attend(q, k, v, relative=xl, q_offset=np.array([2, 2], "int32"), scale=1.0)[1])
        for b, n, t in np.ndindex(2, 3, 4):
            scores = []
            for s in range(6):
                r = exact_sinusoid(t + 2 - s, 6) @ xl.kernel.reshape(6, 3, 4)[:, n]
                key = k[b, s, n]
                scores.append(q[b, t, n] @ key + q[b, t, n] @ r + xl.content_bias[n] @ key + xl.position_bias[n] @ r)
            np.testing.assert_allclose(weights[b, n, t], softmax(np.array(scores)), rtol=1e-10, atol=1e-13)


def two_layers(weights, x, histories, relative):
    """Causal self-attention, twice, with what each layer read before; and what each reads now."""
    read = []
    for w, history in zip(weights, histories, strict=True):
        keys = x if history is None else jnp.concatenate([history, x], axis=-2)
        read.append(x)
        q, k, v = (jnp.einsum("...td,dnh->...tnh", y, w[i]) for i, y in enumerate((x, keys, keys)))
        before = 0 if history is None else history.shape[-2]
        out = dot_product_attention(q, k, v, relative=relative, causal=True, q_offset=before)
        x = x + out.reshape(*out.shape[:-2], -1)
    return x, read


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
@settings(max_examples=4)
def test_segments_with_a_history_are_the_whole_with_gradients_cut(kind, seed):
    """T3, in two layers: values are those of one long text, gradients stop where a segment begins."""
    with jax.enable_x64(True):
        shape = AttentionShape((2,), 4, 4, 2, 2, 3, 3)
        first, second, target = (normals(seed + i, 2, 4, 6) for i in range(3))
        weights = [normals(seed + 3 + i, 3, 6, 2, 3) for i in range(2)]
        relative = relative_of(kind, shape, seed, "float64")
        out, whole, got, wanted = _both_ways(weights, relative, first, second, target)
        np.testing.assert_allclose(out, whole, rtol=1e-12, atol=1e-12)
        assert (got[0] == 0).all()
        scale = max(np.abs(g).max() for g in jax.tree.leaves(wanted))
        for a, b in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * scale)


@jax.jit
def _both_ways(weights, relative, first, second, target):
    def by_segments(first, second, weights, relative):
        empty = [first[..., :0, :]] * 2
        read = two_layers(weights, first, empty, relative)[1]
        histories = [extend_history(e, x, 4) for e, x in zip(empty, read, strict=True)]
        out = two_layers(weights, second, histories, relative)[0]
        return (out * target).sum(), out

    def at_once(second, weights, relative):
        """The first half a constant of every layer."""
        held = [jax.lax.stop_gradient(x) for x in two_layers(weights, first, [None] * 2, relative)[1]]
        x = jnp.concatenate([first, second], axis=-2)
        for i in range(2):
            x = two_layers(weights[i : i + 1], x, [None], relative)[0]
            if i == 0:
                x = jnp.concatenate([held[1], x[..., 4:, :]], axis=-2)
        return (x[..., 4:, :] * target).sum()

    x = jnp.concatenate([first, second], axis=-2)
    whole = two_layers(weights, x, [None] * 2, relative)[0][..., 4:, :]
    got, out = jax.grad(by_segments, argnums=(0, 1, 2, 3), has_aux=True)(first, second, weights, relative)
    return out, whole, got, jax.grad(at_once, argnums=(0, 1, 2))(second, weights, relative)


@given(leading, st.integers(0, 4), st.integers(0, 4), st.integers(0, 9), seeds)
def test_a_history_is_the_last_vectors_of_all_so_far(batch, before, now, length, seed):
    """T0; an empty history, an empty segment, a length of 0 and one beyond all too."""
    history, x = normals(seed, *batch, before, 3), normals(seed + 1, *batch, now, 3)
    history, x = history.astype("float32"), x.astype("float32")
    every = [history[..., i, :] for i in range(before)] + [x[..., i, :] for i in range(now)]
    kept = every[len(every) - min(length, len(every)) :]
    got = extend_history(jnp.asarray(history), jnp.asarray(x), length)
    assert got.shape == (*batch, len(kept), 3)
    for i, vector in enumerate(kept):
        exactly(got[..., i, :], vector)


@given(seeds)
@settings(max_examples=3)
def test_no_gradient_goes_into_a_history(seed):
    history, x = (jnp.asarray(normals(seed + i, 2, 3, 4), jnp.float32) for i in range(2))
    for gradient in jax.grad(lambda h, x: jnp.square(extend_history(h, x, 5)).sum(), argnums=(0, 1))(history, x):
        assert (gradient == 0).all()


# Shaw


@pytest.mark.parametrize("dropped", [False, True])
@given(seed=seeds)
def test_values_of_shaw_are_weighed_as_the_values_are(dropped, seed):
    """T1: one row for all distances is the same as that row added to every value, with the weights dropped too."""
    q, k, v = qkv(SMALL, seed)
    row, keys = (jnp.asarray(normals(seed + i, *size), jnp.float32) for i, size in enumerate([(1, 2), (5, 3)]))
    rules = {"q_offset": np.array([0, 1], "int32")}
    if dropped:
        rules |= {"dropout_rate": 0.5, "dropout_key": jax.random.key(seed)}
    again = rules | ({"dropout_key": jax.random.clone(rules["dropout_key"])} if dropped else {})
    with_rows = attend(q, k, v, relative=Shaw(keys, row.repeat(5, axis=0)), **rules)[0]
    added = attend(q, k, v + np.asarray(row), relative=Shaw(keys), **again)[0]
    np.testing.assert_allclose(with_rows, added, rtol=0, atol=64 * U * (np.abs(v).max() + np.abs(row).max()))


# gradients


def parameters(relative):
    return jax.tree.leaves(relative)


@functools.partial(jax.jit, static_argnames="causal")
def pulled_back(relative, q, k, v, cotangent, mask, offset, causal=False):
    f = functools.partial(dot_product_attention, mask=mask, q_offset=offset, causal=causal)
    return jax.vjp(lambda r, q, k, v: f(q, k, v, relative=r), relative, q, k, v)[1](cotangent)


@pytest.mark.parametrize("kind", LEARNED)
def test_derivatives_of_what_is_learned_are_those_of_finite_differences(kind, x64, untyped):
    """T4, with a masked row."""
    q, k, v = qkv(SMALL, 3, "float64")
    mask = jnp.asarray(np.random.default_rng(4).random((2, 1, 3, 4)) < 0.7).at[0, 0, 1].set(False)
    f = lambda relative, q, k, v: dot_product_attention(q, k, v, relative=relative, mask=mask, q_offset=1)
    relative = relative_of(kind, SMALL, 5, "float64")
    check_grads(jax.jit(f), (relative, q, k, v), order=1, eps=1e-6, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", LEARNED)
def test_backward_is_the_adjoint_of_forward(kind, x64):
    """T4: <J v, u> = <v, J^T u>, the second derivative's too."""
    q, k, v = qkv(SMALL, 3, "float64")
    offset = jnp.asarray([0, 2], jnp.int32)
    f = lambda relative, q, k, v: dot_product_attention(q, k, v, relative=relative, q_offset=offset)
    inputs = (relative_of(kind, SMALL, 5, "float64"), q, k, v)
    tangents = (relative_of(kind, SMALL, 6, "float64"), *qkv(SMALL, 7, "float64"))
    cotangent = normals(8, 2, 3, 4, 2)

    @jax.jit
    def sides(inputs, tangents, cotangent):
        _, forward = jax.jvp(f, inputs, tangents)
        backward = jax.vjp(f, *inputs)[1](cotangent)
        return (forward * cotangent).sum(), sum(
            (a * b).sum() for a, b in zip(jax.tree.leaves(tangents), jax.tree.leaves(backward), strict=True)
        )

    forward, backward = sides(inputs, tangents, cotangent)
    np.testing.assert_allclose(forward, backward, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_rows_that_see_nothing_give_zero_and_no_gradient(kind, seed):
    """T0, to what is learned as to q, k and v; with NaN in a key that no query sees."""
    q, k, v = qkv(SMALL, seed)
    relative, offset = relative_of(kind, SMALL, seed), offsets(SMALL, seed)
    mask = np.random.default_rng(seed).random((2, 1, 3, 4)) < 0.8
    mask[..., 0, :], mask[..., 2] = False, False
    k[:, 2], v[:, 2] = np.nan, np.inf
    out = np.asarray(attend(q, k, v, relative=relative, mask=mask, q_offset=offset)[0])
    assert (out[:, 0] == 0).all()
    assert np.isfinite(out).all()
    cotangent = normals(seed, *out.shape).astype("float32")
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(pulled_back(relative, q, k, v, cotangent, mask, offset)))
    cotangent[:, 1:] = 0
    assert all(
        (np.asarray(g) == 0).all() for g in jax.tree.leaves(pulled_back(relative, q, k, v, cotangent, mask, offset))
    )


# bad input


def small(**changes):
    q, k, v = map(jnp.asarray, qkv(SMALL._replace(S=3), 0))
    return {"q": q, "k": k, "v": v} | changes


@pytest.mark.parametrize("kind", KINDS)
def test_other_lengths_need_an_offset_and_both_alignments_are_named(kind, untyped):
    q, k, v = map(jnp.asarray, qkv(SMALL, 0))
    with pytest.raises(ValueError, match=r"needs q_offset where T=3 queries meet S=4 keys: 0 .* S - T = 1 the last"):
        dot_product_attention(q, k, v, relative=relative_of(kind, SMALL, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_that_is_no_integer_or_of_another_shape_raises(kind, untyped):
    relative = relative_of(kind, SMALL, 0)
    for offset, error, message in [
        (jnp.asarray([0.0, 1.5]), TypeError, "q_offset must be an integer or an array of them, got float32"),
        (jnp.asarray([0, 1, 2]), ValueError, r"one integer or have the batch shape \(2,\), got \(3,\)"),
    ]:
        with pytest.raises(error, match=message):
            dot_product_attention(**small(), relative=relative, q_offset=offset)


@pytest.mark.parametrize("heads", [0, -1])
def test_alibi_without_heads_raises(heads):
    with pytest.raises(ValueError, match=f"num_heads must be at least 1, got {heads}"):
        alibi_slopes(heads)


@pytest.mark.parametrize(
    ("buckets", "furthest", "both"),
    [(2, 9, True), (7, 9, True), (1, 9, False), (0, 9, True), (8, 2, True), (8, 4, False)],
)
def test_t5_with_too_few_or_odd_buckets_or_too_near_an_end_raises(buckets, furthest, both):
    message = f"got num_buckets={buckets}, max_distance={furthest}, bidirectional={both}"
    with pytest.raises(ValueError, match=f"at least 2 buckets for each side .* max_distance above half .* {message}"):
        t5_buckets(buckets, furthest, bidirectional=both)


@pytest.mark.parametrize("rows", [0, 2, 6])
def test_a_table_of_distances_with_an_even_number_of_rows_raises(rows, untyped):
    with pytest.raises(ValueError, match=f"2 limit \\+ 1 rows, an odd number, got {rows}"):
        dot_product_attention(**small(), relative=Shaw(jnp.ones((rows, 3)), jnp.ones((rows, 2))))


MISFITS = {
    "T5's embedding": (lambda: T5(jnp.ones((8, 3)), max_distance=5), r"embedding .*\(8, 4\), got \(8, 3\)"),
    "T5's embedding, one head": (lambda: T5(jnp.ones((8, 1)), max_distance=5), r"embedding .*\(8, 4\), got \(8, 1\)"),
    "Shaw's key_embedding": (lambda: Shaw(jnp.ones((5, 2))), r"key_embedding .*\(5, 3\), got \(5, 2\)"),
    "Shaw's key_embedding, one": (lambda: Shaw(jnp.ones((5, 1))), r"key_embedding .*\(5, 3\), got \(5, 1\)"),
    "Shaw's value_embedding, rows": (
        lambda: Shaw(jnp.ones((3, 3)), jnp.ones((7, 2))),
        r"value_embedding must be \[distances, Hv\], as many as keys have, here \(3, 2\), got \(7, 2\)",
    ),
    **{
        f"Shaw's value_embedding, {width} wide": (
            lambda width=width: Shaw(jnp.ones((5, 3)), jnp.ones((5, width))),
            rf"value_embedding .*here \(5, 2\), got \(5, {width}\)",
        )
        for width in (1, 4)
    },
    "content_bias": (
        lambda: TransformerXL(jnp.ones((2, 3)), jnp.ones((6, 12)), jnp.ones((4, 3))),
        r"content_bias .*\(4, 3\).*\(2, 3\)",
    ),
    "position_bias": (
        lambda: TransformerXL(jnp.ones((4, 3)), jnp.ones((6, 12)), jnp.ones((1, 3))),
        r"position_bias .*\(4, 3\).*\(1, 3\)",
    ),
    "kernel": (
        lambda: TransformerXL(jnp.ones((4, 3)), jnp.ones((6, 11)), jnp.ones((4, 3))),
        r"kernel .*\(6, 12\), got \(6, 11\)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_the_heads_raises(name, untyped):
    relative, message = MISFITS[name]
    for implementation in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match=message):
            dot_product_attention(**small(), relative=relative(), implementation=implementation)


INTEGRAL = {
    "T5's embedding": (lambda: T5(jnp.ones((8, 4), jnp.int32), max_distance=5), "the embedding of T5"),
    "key_embedding": (lambda: Shaw(jnp.ones((5, 3), jnp.int32)), "key_embedding"),
    "value_embedding": (lambda: Shaw(jnp.ones((5, 3)), jnp.ones((5, 2), jnp.int32)), "value_embedding"),
    "content_bias": (
        lambda: TransformerXL(jnp.ones((4, 3), jnp.int32), jnp.ones((6, 12)), jnp.ones((4, 3))), "content_bias"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGRAL)
def test_what_is_learned_must_be_floating(name, untyped):
    relative, called = INTEGRAL[name]
    with pytest.raises(TypeError, match=f"{called} must be floating point, got int32"):
        dot_product_attention(**small(), relative=relative())


def test_the_buckets_that_all_share_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        t5_buckets(8, 16, bidirectional=True)[0] = 1


@pytest.mark.parametrize("columns", [3, 5, 7])
def test_a_shift_of_another_number_of_columns_raises(columns, untyped):
    with pytest.raises(ValueError, match=rf"C = T \+ S - 1 columns, got C={columns}, T=2, S=3"):
        rel_shift(jnp.ones((2, columns)), 3)


def test_a_history_that_does_not_fit_raises(untyped):
    x = jnp.ones((2, 3, 4))
    for history in (jnp.ones((2, 3, 5)), jnp.ones((1, 3, 4)), jnp.ones((3, 4)), jnp.ones((2, 3, 4), jnp.bfloat16)):
        with pytest.raises(
            ValueError, match=r"a history must fit .* in all but its length, got .* for float32\[2, 3, 4\]"
        ):
            extend_history(history, x, 2)
    with pytest.raises(ValueError, match="length of a history must be at least 0, got -1"):
        extend_history(x, x, -1)


def test_an_encoding_of_no_kind_has_no_logits():
    with pytest.raises(NotImplementedError):
        dot_product_attention(**small(), relative=Relative())
