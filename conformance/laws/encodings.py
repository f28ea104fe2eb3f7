"""The sinusoidal table, T5's buckets, ALiBi's slopes and Transformer-XL's shift."""

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Buckets, RelativeShift, Sinusoid, Slopes
from conformance.cases import gaussian, seeds
from conformance.law import law, require, same_bits, within

# sinusoidal table


def columns(halves: bool):
    """The check of the table with sin and cos alternating, or in two halves."""

    def check(table, case) -> None:
        length, width = case
        wanted = oracle.sinusoidal(np.arange(length), width)
        if halves:
            wanted = np.concatenate([wanted[:, ::2], wanted[:, 1::2]], axis=-1)
        within(table(length=length, d_model=width), wanted, 1e-5)

    return check


SIZES = st.sampled_from([(1, 2), (2, 4), (7, 16)])


@law(Sinusoid, cases=lambda table: SIZES, conventions={"all sines stand before all cosines": columns(True)})
def sines_stand_in_even_columns_and_cosines_in_odd(table, case):
    columns(False)(table, case)


@law(Sinusoid, cases=lambda table: SIZES)
def sin_squared_plus_cos_squared_is_one(table, case):
    length, width = case
    out = np.asarray(table(length=length, d_model=width), np.float64)
    within((out**2).sum(axis=-1), np.full(length, width / 2), 1e-5 * width, "the squared length of a row")


@law(Sinusoid, cases=lambda table: st.just((4096, 8)))
def the_table_is_exact_at_four_thousand_positions(table, case):
    length, width = case
    wanted = oracle.sinusoidal(np.arange(length), width)
    in_halves = np.concatenate([wanted[:, ::2], wanted[:, 1::2]], axis=-1)
    out = table(length=length, d_model=width)
    within(out, min(wanted, in_halves, key=lambda x: np.abs(out - x).max()), 2.0**-20)


@law(Sinusoid, "odd width", cases=lambda table: st.sampled_from([(1, 1), (5, 3), (5, 7)]))
def an_odd_width_is_the_next_even_table_without_its_last_column(table, case):
    length, width = case
    wanted = oracle.sinusoidal(np.arange(length), width)
    within(table(length=length, d_model=width), wanted, 1e-5)


# T5 buckets

BUCKETS = [(32, 128), (8, 20), (12, 162), (64, 512), (320, 800)]


@st.composite
def bucket_cases(draw, adapter=None):
    """Distances on both sides of every boundary, and sizes."""
    buckets, longest = draw(st.sampled_from(BUCKETS))
    distances = np.arange(-longest - 3, longest + 4, dtype="int32")
    return distances, {"num_buckets": buckets, "max_distance": longest}


def exact_buckets(distances, **options) -> np.ndarray:
    return np.array([oracle.bucket(int(d), **options) for d in distances])


@law(Buckets, cases=bucket_cases, max_examples=8)
def every_distance_has_its_bucket_in_both_directions(buckets, case):
    """Against exact integers: a logarithm in float32 misses some boundaries, one in 16 bit most."""
    distances, options = case
    got = buckets(distances, bidirectional=True, **options)
    wanted = exact_buckets(distances, bidirectional=True, **options)
    require_equal(got, wanted, distances)


@law(Buckets, cases=bucket_cases, max_examples=8)
def every_distance_has_its_bucket_to_the_past(buckets, case):
    """Keys ahead of the query are all in bucket 0."""
    distances, options = case
    got = buckets(distances, bidirectional=False, **options)
    require_equal(got, exact_buckets(distances, bidirectional=False, **options), distances)


def require_equal(got, wanted, distances) -> None:
    wrong = np.flatnonzero(got != wanted)
    if wrong.size:
        i = wrong[np.abs(distances[wrong]).argmin()]
        require(False, f"distance {distances[i]} must be in bucket {wanted[i]}, got {got[i]} ({wrong.size} are wrong)")


@law(Buckets, cases=bucket_cases, max_examples=8)
def buckets_grow_with_the_distance(buckets, case):
    distances, options = case
    past = buckets(distances[distances <= 0][::-1], bidirectional=True, **options)
    require(np.diff(past) >= 0, "the bucket must not shrink as the distance grows")
    require((past >= 0) & (past < options["num_buckets"]), "buckets must lie in [0, num_buckets)")


@law(Buckets, "jax", cases=bucket_cases, max_examples=4)
def buckets_are_the_same_under_jit(buckets, case):
    distances, options = case
    same_bits(
        buckets.eager(distances, bidirectional=True, **options), buckets(distances, bidirectional=True, **options)
    )


# ALiBi slopes


@law(Slopes, cases=lambda slopes: st.sampled_from([1, 2, 4, 8, 16, 32]))
def the_slopes_of_a_power_of_two_are_powers_of_two(slopes, heads):
    """2^(-8h/n), h = 1..n."""
    got = slopes(num_heads=heads)
    require(got.dtype != np.float16, "slopes in 16 bit lose digits")
    within(got, oracle.slopes(heads), 1e-6 * oracle.slopes(heads), "the slope")


@law(Slopes, cases=lambda slopes: st.sampled_from([3, 5, 6, 7, 12, 20]))
def other_numbers_of_heads_interleave_the_next_power(slopes, heads):
    within(slopes(num_heads=heads), oracle.slopes(heads), 1e-6 * oracle.slopes(heads), "the slope")


# relative shift


def shift_cases(shift):
    batches = [(1,), (2, 3), ()] if "leading axes" in shift.can else [(1,), (2,)]
    build = lambda batch, sizes, seed: gaussian((*batch, sizes[0], sizes[0] + sizes[1] - 1), seed)
    return st.builds(build, st.sampled_from(batches), st.sampled_from([(2, 2), (3, 3), (2, 5), (1, 4)]), seeds)


@law(RelativeShift, cases=shift_cases)
def row_i_moves_left_by_t_minus_one_minus_i(shift, x):
    """out[i, j] = x[i, T - 1 - i + j], with memory too (S above T)."""
    same_bits(shift(x), oracle.relative_shift(x))


@law(RelativeShift, cases=shift_cases)
def rows_do_not_leak_into_each_other(shift, x):
    changed = x.copy()
    changed[..., -1, :] += 1
    before, after = shift(x), shift(changed)
    same_bits(after[..., :-1, :], before[..., :-1, :], "every row but the last")
