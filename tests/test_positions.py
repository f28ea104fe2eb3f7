"""Laws of positions: where a token stands, exact up to the last int32."""

import functools
import math
from fractions import Fraction
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import equinox_impl
from core.config import Positions, TransformerConfig
from core.positions import (
    add_positions,
    inverse_frequencies,
    learned,
    position_ids,
    sin_cos,
    sinusoidal,
    sinusoidal_table,
)
from tests.frontends import random_weights
from tests.strategies import EDGES, LAST, far_and_near, positions, seeds

TWO_PI = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
eight = st.lists(positions, min_size=8, max_size=8).map(lambda p: np.array(p, "int32").reshape(2, 4))
many = st.builds(
    lambda seed, last: np.append(np.random.default_rng(seed).integers(-last, last, 87), EDGES).reshape(2, 50),
    seeds,
    st.sampled_from([2**20, LAST]),
).map(lambda ids: ids.astype("int32"))
widths = st.sampled_from([8, 2, 1, 7])
thetas = st.sampled_from([10_000.0, 500_000.0, 3.0])
sinusoids = jax.jit(sinusoidal, static_argnums=1)
added = jax.jit(add_positions, static_argnames="kind")
batches = st.sampled_from([(2,), (), (2, 3)])


def exact_sin_cos(position, frequency):
    """The angle as a fraction, whole turns taken off, then float64."""
    angle = float(Fraction(int(position)) * Fraction(frequency) % TWO_PI)
    return math.sin(angle), math.cos(angle)


def exact_sinusoid(position, width):
    """The formula of 2017, pair by pair."""
    even = width + width % 2
    pairs = [exact_sin_cos(position, 10_000.0 ** (-2 * i / even)) for i in range(even // 2)]
    return np.array([x for pair in pairs for x in pair])[:width]


def vectors(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@given(many, widths, thetas)
def test_sine_and_cosine_are_exact_at_any_position(ids, width, theta):
    frequencies = inverse_frequencies(2 * width, theta)
    sin_and_cos = jax.jit(sin_cos, static_argnums=1)(ids, frequencies)
    wanted = np.moveaxis([[[exact_sin_cos(p, f) for f in frequencies] for p in row] for row in ids], -1, 0)
    np.testing.assert_allclose(np.array(sin_and_cos), wanted, rtol=0, atol=2.0**-23)


@given(eight)
def test_sine_and_cosine_are_exact_in_float64(ids):
    frequencies = inverse_frequencies(8, 10_000.0)
    with jax.enable_x64(True):
        for sign in (1, -1):
            sin, cos = sin_cos(jnp.asarray(sign * ids), frequencies, jnp.float64)
            wanted = [[exact_sin_cos(sign * p, f) for f in frequencies] for p in ids.flat]
            wanted = np.moveaxis(np.reshape(wanted, (*ids.shape, 4, 2)), -1, 0)
            np.testing.assert_allclose([sin, cos], wanted, rtol=0, atol=2.0**-45)


@given(eight, thetas)
def test_traced_positions_are_as_exact_as_known_ones(ids, theta):
    frequencies = inverse_frequencies(6, theta)
    known = sin_cos(jnp.asarray(ids), frequencies)
    traced = jax.jit(sin_cos, static_argnums=1)(ids, frequencies)
    np.testing.assert_allclose(np.array(traced), np.array(known), rtol=0, atol=2.0**-23)


@given(st.lists(st.integers(0, 2**20), min_size=4, max_size=4), widths)
def test_the_sinusoid_is_the_formula_of_the_paper(ids, width):
    got = sinusoids(np.array(ids, "int32").reshape(2, 2), width)
    wanted = np.array([exact_sinusoid(p, width) for p in ids]).reshape(2, 2, width)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2.0**-23)


@pytest.mark.parametrize(("length", "width"), [(5, 8), (3, 1), (4, 7), (0, 4), (1, 2)])
def test_the_table_has_sines_on_even_columns_and_cosines_on_odd(length, width):
    table = sinusoidal_table(length, width)
    assert table.shape == (length, width)
    for p, i in np.ndindex(length, width):
        angle = p / 10_000 ** ((i - i % 2) / (width + width % 2))
        assert abs(float(table[p, i]) - (math.cos(angle) if i % 2 else math.sin(angle))) <= 2.0**-23


@pytest.mark.parametrize("width", [1, 3, 7, 15])
def test_an_odd_width_is_the_next_even_table_without_its_last_column(width):
    np.testing.assert_array_equal(sinusoidal_table(9, width), sinusoidal_table(9, width + 1)[:, :-1], strict=True)


@given(eight)
def test_an_even_sinusoid_has_length_root_half_its_width(ids):
    squares = np.square(np.asarray(sinusoids(ids, 8), "float64")).sum(-1)
    np.testing.assert_allclose(squares, np.full(ids.shape, 4.0), rtol=1e-6)


@given(eight, far_and_near, widths)
def test_k_positions_further_each_pair_is_turned_by_k_times_its_frequency(ids, k, width):
    """PE(p + k) = R(k) PE(p), where R does not depend on p; so a linear map can look k tokens ahead."""
    ids, even = np.minimum(ids, LAST - k), width + width % 2
    pairs = lambda positions: np.asarray(sinusoids(positions.astype("int32"), even), "float64").reshape(2, 4, -1, 2)
    (sin, cos), turn = (
        np.moveaxis(pairs(ids), -1, 0),
        [exact_sin_cos(k, 10_000.0 ** (-i / even)) for i in range(0, even, 2)],
    )
    sin_k, cos_k = np.array(turn).T
    turned = np.stack([sin * cos_k + cos * sin_k, cos * cos_k - sin * sin_k], axis=-1)
    np.testing.assert_allclose(pairs(ids + k), turned, rtol=0, atol=4 * 2.0**-23)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("position", [3, 1000, 2**20, LAST])
def test_sinusoids_asked_for_in_sixteen_bits_are_the_rounded_ones(dtype, position):
    ids = jnp.asarray([[position]], jnp.int32)
    wide = np.asarray(sinusoidal(ids, 8), "float32")
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(sinusoidal(ids, 8, dtype), "float32"), wide, rtol=0, atol=step)


@given(st.sampled_from([(), (2,), (2, 3)]), seeds)
def test_position_ids_count_from_the_offset_of_each_row(batch, seed):
    x = jnp.zeros((*batch, 4, 2))
    offset = np.random.default_rng(seed).integers(0, 100, batch).astype("int32")
    ids = np.asarray(position_ids(x, jnp.asarray(offset)))
    np.testing.assert_array_equal(ids, offset[..., None] + np.arange(4, dtype="int32"), strict=True)
    unshifted = np.asarray(position_ids(x))
    np.testing.assert_array_equal(np.broadcast_to(unshifted, (*batch, 4)), ids - offset[..., None])


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@given(batch=batches, seed=seeds)
def test_add_positions_adds_the_rows_at_the_offset_of_each_row(kind, batch, seed):
    x, table = vectors((*batch, 4, 6), seed), vectors((12, 6), seed + 1)
    encoding = table if kind == "learned" else np.array([exact_sinusoid(p, 6) for p in range(12)], "float32")
    offset = np.random.default_rng(seed).integers(0, 9, batch).astype("int32")
    ids = offset[..., None] + np.arange(4, dtype="int32")
    got = added(x, ids, kind=kind, embedding=table)
    np.testing.assert_allclose(got, x + encoding[ids], rtol=0, atol=1e-6)
    same = added(x, ids[(0,) * len(batch)].reshape((1,) * len(batch) + (4,)), kind=kind, embedding=table)
    wanted = x + encoding[np.broadcast_to(ids[(0,) * len(batch)], ids.shape)]
    np.testing.assert_allclose(same, wanted, rtol=0, atol=1e-6)


@given(far_and_near, st.integers(-3, 3), seeds)
def test_a_traced_offset_loses_nothing_of_the_sinusoid(last, less, seed):
    """x + its encoding, within 2^-23 and a rounding of the sum, at 2^20 and at the end of int32."""
    x, offset = vectors((2, 4, 7), seed), np.array([last + less, last // 2], "int32")
    got = _added_from(x, offset)
    for row, t in np.ndindex(2, 4):
        wanted = x[row, t].astype("float64") + exact_sinusoid(offset[row] + t, 7)
        np.testing.assert_allclose(got[row, t], wanted, rtol=2.0**-24, atol=2.0**-23)


@jax.jit
def _added_from(x, offset):
    return add_positions(x, position_ids(x, offset), kind="sinusoidal")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_encodings_come_in_the_dtype_of_x(kind, dtype, x64):
    x, table = jnp.asarray(vectors((2, 4, 6), 0), dtype), jnp.asarray(vectors((12, 6), 1))
    ids = jnp.asarray([[0, 3, 2, 11]] * 2, jnp.int32)
    rows = (
        np.asarray(table)[np.asarray(ids)]
        if kind == "learned"
        else [[exact_sinusoid(p, 6) for p in r] for r in np.asarray(ids)]
    )
    got = add_positions(x, ids, kind=kind, embedding=table)
    assert got.dtype == x.dtype
    step = 2.0**-42 if dtype == "float64" else float(jnp.finfo(dtype).eps)
    size = np.abs(np.asarray(x, "float64")) + np.abs(rows)
    assert (np.abs(np.asarray(got, "float64") - np.asarray(x, "float64") - rows) <= step * size + step / 4).all()


@pytest.mark.parametrize("kind", sorted(set(get_args(Positions)) - {"sinusoidal", "learned"}))
def test_other_kinds_leave_x_as_it_is(kind):
    x, ids = jnp.asarray(vectors((2, 3, 4), 0)), jnp.arange(3, dtype=jnp.int32)[None]
    for unseen in (ids, jnp.zeros((9, 9), jnp.int32)):
        np.testing.assert_array_equal(add_positions(x, unseen, kind=kind), x, strict=True)


def test_learned_positions_need_their_table():
    with pytest.raises(ValueError, match="learned positions need their embedding table, got none"):
        add_positions(jnp.ones((2, 3, 4)), jnp.zeros((1, 3), jnp.int32), kind="learned")


@pytest.mark.parametrize("bad", [[[0, 12]], [[-1, 3]], [[LAST, 0]]])
def test_a_position_beyond_the_learned_table_raises_and_gives_nan_under_jit(bad):
    table, ids = jnp.asarray(vectors((12, 6), 0)), jnp.asarray(bad, jnp.int32)
    with pytest.raises(ValueError, match=r"must lie in \[0, 12\)|no position"):
        learned(ids, table)
    rows = np.asarray(jax.jit(learned)(ids, table))
    inside = (np.array(bad) >= 0) & (np.array(bad) < 12)
    assert np.isnan(rows[~inside]).all()
    np.testing.assert_array_equal(rows[inside], np.asarray(table)[np.array(bad)[inside]])


def test_a_chunk_that_leaves_the_learned_table_raises_and_gives_nan_under_jit():
    x, table, offset = (
        jnp.asarray(vectors((2, 4, 6), 0)),
        jnp.asarray(vectors((12, 6), 1)),
        jnp.asarray([8, 9], jnp.int32),
    )
    with pytest.raises(ValueError, match=r"\[0, 12\)"):
        add_positions(x, position_ids(x, offset), kind="learned", embedding=table)
    out = np.asarray(added(x, position_ids(x, offset), kind="learned", embedding=table))
    assert np.isnan(out[1, -1]).all()
    assert np.isfinite(out[0]).all()
    assert np.isfinite(out[1, :-1]).all()


def test_more_tokens_than_the_learned_table_raise_under_jit_too():
    def lengthened(x, table):
        return add_positions(x, position_ids(x), kind="learned", embedding=table)

    with pytest.raises(ValueError, match="max_length=12 has no position for 13 tokens; shorten the input or raise"):
        jax.eval_shape(lengthened, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(2, 13, 6), (12, 6)]))


def test_positions_within_the_learned_table_never_raise():
    """More of them than rows, as in packed examples that each count from 0."""
    table = jnp.asarray(vectors((3, 2), 0))
    ids = np.array([[0, 1, 2, 0, 1, 2]] * 2, "int32")
    np.testing.assert_array_equal(learned(jnp.asarray(ids), table), np.asarray(table)[ids])


@pytest.mark.parametrize("length", [3, 5])
def test_a_learned_table_holds_as_many_tokens_as_it_has_rows(length):
    x, table = jnp.asarray(vectors((2, length, 4), 0)), jnp.asarray(vectors((length, 4), 1))
    got = added(x, position_ids(x), kind="learned", embedding=table)
    np.testing.assert_array_equal(got, np.asarray(x) + np.asarray(table))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int64"])
def test_positions_of_any_integer_type_are_those_of_int32(dtype, x64):
    ids = np.array([[0, 3, 100], [7, 8, 9]])
    for positioned in (
        lambda ids: sinusoidal(ids, 6),
        lambda ids: position_ids(jnp.zeros((2, 4, 2), jnp.float32), ids[:, 0]),
    ):
        got, wanted = positioned(jnp.asarray(ids, dtype)), positioned(jnp.asarray(ids, "int32"))
        np.testing.assert_array_equal(got, wanted, strict=True)


@pytest.mark.parametrize("offset", [3, -3])
def test_an_offset_may_be_a_number(offset):
    got = position_ids(jnp.ones((2, 3, 4)), offset)
    np.testing.assert_array_equal(got, np.array([[0, 1, 2]], "int32") + np.int32(offset), strict=True)


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
def test_positions_that_int32_cannot_hold_are_refused_by_dtype_traced_or_not(dtype, x64, untyped):
    ids, x = jnp.zeros((1, 3), dtype), jnp.ones((1, 3, 4), jnp.float32)
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(TypeError, match=f"positions must be integers that int32 holds, got {dtype}; cast it with"):
            transform(lambda ids: sinusoidal(ids, 4))(ids)
        with pytest.raises(TypeError, match=f"offsets must be integers that int32 holds, got {dtype}; cast it with"):
            transform(lambda offset: position_ids(x, offset))(ids[0, :1])


def test_all_positions_that_int32_holds_may_come_wide_and_none_at_all(x64):
    ends = np.array([[-(2**31), -(2**30) - 1, 2**31 - 1]])
    np.testing.assert_array_equal(sinusoidal(jnp.asarray(ends), 4), sinusoidal(jnp.asarray(ends, "int32"), 4))
    assert sinusoidal(jnp.zeros((0, 3), "int64"), 4).shape == (0, 3, 4)


def test_an_offset_too_large_to_be_an_integer_is_no_integer(untyped):
    with pytest.raises(TypeError, match="an offset must be an integer or an array of them, got float32"):
        position_ids(jnp.ones((2, 3, 4)), jnp.float32(1e30))


@pytest.mark.parametrize("bad", [2**31, -(2**31) - 1, 2**32])
def test_known_positions_beyond_int32_raise(bad, x64, untyped):
    low, high = min(bad, 7), max(bad, 7)
    with pytest.raises(ValueError, match=rf"positions must lie in \[-2\^31, 2\^31\), got values from {low} to {high}"):
        sinusoidal(jnp.asarray([7, bad]), 4)


@pytest.mark.parametrize(
    "offset", [2**31 - 2, 2**31, -(2**31) - 1, np.int64(2**32), np.array([0, 2**31 - 2]), jnp.array([0, 2**31 - 2])],
    ids=repr,
)  # fmt: skip
def test_a_known_offset_from_which_positions_leave_int32_raises(offset, untyped):
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"positions must lie in \[-2\^31, 2\^31\), got values from -?\d+ to -?\d+"):
        position_ids(x, offset)
    last = position_ids(x, 2**31 - 3)
    np.testing.assert_array_equal(last, np.array([[2**31 - 3, 2**31 - 2, 2**31 - 1]], "int32"), strict=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_sine_and_cosine_of_other_types_are_refused(dtype, untyped):
    with pytest.raises(TypeError, match=f"dtype must be float32 or float64, got {dtype}; cast what comes out"):
        sin_cos(jnp.arange(3), (1.0,), jnp.dtype(dtype))


def test_float64_where_it_is_switched_off_is_refused(untyped):
    with pytest.raises(ValueError, match=r"float64 needs .*jax_enable_x64"):
        sin_cos(jnp.arange(3), (1.0,), jnp.float64)


def test_sinusoids_that_are_not_floating_are_refused(untyped):
    with pytest.raises(TypeError, match="sinusoids must be floating point, got dtype=int32"):
        sinusoidal(jnp.arange(3), 4, "int32")


@pytest.mark.parametrize(
    ("frequencies", "error", "message"),
    [
        ([1.0, 0.5], TypeError, "frequencies must be a tuple of floats, got list"),
        (np.array([1.0, 0.5]), TypeError, "frequencies must be a tuple of floats, got ndarray"),
        ((1.0, math.nan), ValueError, r"frequencies must be finite, got \(1.0, nan\)"),
        ((math.inf,), ValueError, r"frequencies must be finite, got \(inf,\)"),
    ],
    ids=str,
)
def test_frequencies_of_another_kind_are_refused(frequencies, error, message, untyped):
    with pytest.raises(error, match=message):
        sin_cos(jnp.arange(3), frequencies)


@pytest.mark.parametrize("theta", [0.0, -5.0, math.nan, math.inf])
def test_a_theta_that_is_not_above_zero_raises(theta, untyped):
    with pytest.raises(ValueError, match=f"theta must be above 0 and finite, got {theta}"):
        inverse_frequencies(4, theta)


TABLE = jnp.ones((9, 6))
UNFIT = {
    "an unknown kind": ({"kind": "sinusoid"}, ValueError, r"kind must be one of \('sinusoidal', .*, got 'sinusoid'"),
    "integers, learned": ({"x": jnp.ones((2, 4, 6), jnp.int32)}, TypeError, "x must be floating point, got int32"),
    "integers, sinusoidal": (
        {"x": jnp.ones((2, 4, 6), jnp.int32), "kind": "sinusoidal"}, TypeError, "x must be floating point, got int32"
    ),
    "one vector": ({"x": jnp.ones(6)}, ValueError, r"x must be \[\*B, T, D\], got \(6,\)"),
    "a table of width 1": (
        {"embedding": TABLE[:, :1]}, ValueError, r"x must be as wide as embedding \(9, 1\), got \(2, 4, 6\)"
    ),
    "a table of another width": (
        {"embedding": TABLE[:, :5]}, ValueError, r"x must be as wide as embedding \(9, 5\), got \(2, 4, 6\)"
    ),
    "one row": ({"embedding": TABLE[0]}, ValueError, r"embedding must be \[L, D\], got \(6,\)"),
    "an integer table": (
        {"embedding": TABLE.astype(jnp.int32)}, TypeError, "embedding must be floating point, got int32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_positions_cannot_be_added_to_or_from_is_refused(name, untyped):
    changes, error, message = UNFIT[name]
    given = {"x": jnp.ones((2, 4, 6)), "kind": "learned", "embedding": TABLE} | changes
    with pytest.raises(error, match=message):
        add_positions(given.pop("x"), jnp.zeros((2, 4), jnp.int32), **given)


def test_positions_of_what_has_no_positions_are_refused(untyped):
    with pytest.raises(ValueError, match=r"x must be \[\*B, T, D\], got \(6,\)"):
        position_ids(jnp.ones(6))


@pytest.mark.parametrize("offset", [1.5, np.float32([1, 2])])
def test_an_offset_that_is_no_integer_raises(offset, untyped):
    with pytest.raises(TypeError, match="an offset must be an integer or an array of them, got float32"):
        position_ids(jnp.ones((2, 3, 4)), offset)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1)])
def test_an_offset_of_another_shape_than_the_batch_raises(shape, untyped):
    with pytest.raises(ValueError, match=r"one integer or have the batch shape \(2,\), got"):
        position_ids(jnp.ones((2, 3, 4)), jnp.zeros(shape, jnp.int32))


def test_positions_that_are_no_integers_raise(untyped):
    ids = jnp.asarray([[0.0, 1.5]])
    with pytest.raises(TypeError, match="positions must be integers, got float32"):
        sinusoidal(ids, 4)
    with pytest.raises(TypeError, match="positions must be integers, got float32"):
        learned(ids, jnp.ones((3, 4)))


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3), (4,), (2,), (1, 2, 4), (2, 5)])
def test_positions_of_another_shape_than_the_tokens_raise(kind, shape, untyped):
    """Three rows of them would make three rows of one."""
    x, ids = jnp.ones((1 if shape == (3, 4) else 2, 4, 6)), jnp.zeros(shape, jnp.int32)
    message = rf"positions must be \[\*B, T\], here \({len(x)}, 4\), 1 where they broadcast, got \({shape[0]},"
    with pytest.raises(ValueError, match=message):
        add_positions(x, ids, kind=kind, embedding=jnp.ones((9, 6)))


# what positions are for


KINDS = sorted(get_args(Positions), key=lambda kind: kind != "none")


def of_two_layers(kind):
    return TransformerConfig(
        source_vocab_size=11, d_model=8, num_heads=2, d_ff=16, num_encoder_layers=2, max_length=8, positions=kind,
        relative_distance=3, relative_buckets=4, dropout_rate=0.0, dtype="float64", param_dtype="float64",
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def encoded(config, weights, tokens):
    return equinox_impl.evaluation(
        equinox_impl.from_weights(config, weights, model_class=equinox_impl.EncoderOnlyTransformer)
    )(tokens)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
@settings(max_examples=5)
def test_a_stack_without_an_encoding_is_permutation_equivariant_and_with_each_it_is_not(kind, seed):
    with jax.enable_x64(True):
        config, rng = of_two_layers(kind), np.random.default_rng(seed)
        weights = random_weights(config, seed, model_class="EncoderOnlyTransformer")
        tokens = np.array([rng.permutation(11)[:6] for _ in range(2)], "int32")
        order = [[1, 0, 2, 3, 4, 5], [2, 4, 0, 5, 1, 3], [5, 0, 1, 2, 3, 4]][seed % 3]  # none keeps all distances
        logits, moved = (np.asarray(encoded(config, weights, t)) for t in (tokens, tokens[:, order]))
    difference = np.abs(moved - logits[:, order]).max()
    scale = np.abs(logits).max()
    assert difference <= 1e-12 * scale if kind == "none" else difference >= 1e-6 * scale
