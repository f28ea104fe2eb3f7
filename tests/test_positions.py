"""Laws of positions: where a token stands, exact up to the last int32."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.positions import (
    add_positions,
    inverse_frequencies,
    learned,
    position_ids,
    rotary,
    sin_cos,
    sinusoidal,
    sinusoidal_table,
)
from tests.strategies import seeds

TWO_PI = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
LAST = 2**31 - 1
EDGES = [0, 1, 2, 1023, 1024, 4097, 2**16 + 1, 2**20 - 1, 2**20, 2**24 + 1, 2**30 + 3, LAST - 1, LAST]
positions = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**20), st.integers(0, LAST))
eight = st.lists(positions, min_size=8, max_size=8).map(lambda p: np.array(p, "int32").reshape(2, 4))
many = st.builds(
    lambda seed, last: np.append(np.random.default_rng(seed).integers(-last, last, 87), EDGES).reshape(2, 50),
    seeds,
    st.sampled_from([2**20, LAST]),
).map(lambda ids: ids.astype("int32"))
widths = st.sampled_from([8, 2, 1, 7])
head_widths = st.sampled_from([4, 2, 10])
thetas = st.sampled_from([10_000.0, 500_000.0, 3.0])
sinusoids = jax.jit(sinusoidal, static_argnums=1)
turned = jax.jit(rotary, static_argnames="theta")


def exact_sin_cos(position, frequency):
    """The angle as a fraction, whole turns taken off, then float64."""
    angle = float(Fraction(int(position)) * Fraction(frequency) % TWO_PI)
    return math.sin(angle), math.cos(angle)


def exact_sinusoid(position, width):
    """The formula of 2017, columns one by one."""
    pairs = [exact_sin_cos(position, math.exp(-2 * i / (width + width % 2) * math.log(1e4))) for i in range(width)]
    return np.array([x for pair in pairs for x in pair])[:width]


def heads(shape, seed):
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("position", [3, 1000, 2**20, LAST])
def test_sinusoids_asked_for_in_sixteen_bits_are_the_rounded_ones(dtype, position):
    ids = jnp.asarray([[position]], jnp.int32)
    wide = np.asarray(sinusoidal(ids, 8), "float32")
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(sinusoidal(ids, 8, dtype), "float32"), wide, rtol=0, atol=step)


@given(eight, head_widths, thetas, seeds)
def test_rotary_turns_pairs_half_a_head_apart(ids, width, theta, seed):
    x = heads((2, 4, 3, width), seed)
    got = np.asarray(turned(x, ids, theta=theta))
    half = width // 2
    for row, t, n, i in np.ndindex(2, 4, 3, half):
        sin, cos = exact_sin_cos(ids[row, t], theta ** (-2 * i / width))
        a, b = float(x[row, t, n, i]), float(x[row, t, n, i + half])
        slack = (abs(a) + abs(b)) * 2.0**-22
        assert abs(got[row, t, n, i] - (a * cos - b * sin)) <= slack
        assert abs(got[row, t, n, i + half] - (b * cos + a * sin)) <= slack


@given(eight, head_widths, seeds)
def test_rotary_keeps_lengths(ids, width, seed):
    x = heads((2, 4, 3, width), seed)
    before, after = (np.linalg.norm(np.asarray(y, "float64"), axis=-1) for y in (x, turned(x, ids)))
    assert (np.abs(after - before) <= 8 * 2.0**-24 * before).all()


@given(seeds, head_widths)
def test_rotary_at_position_zero_is_the_identity(seed, width):
    x = heads((2, 4, 3, width), seed)
    np.testing.assert_array_equal(turned(x, np.zeros((2, 4), "int32")), x, strict=True)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 10**6), seeds)
def test_rotary_products_depend_on_distance_alone(m, n, shift, seed):
    x = heads((2, 2, 3, 8), seed)
    products = []
    for c in (0, shift):
        q, k = np.moveaxis(np.asarray(turned(x, np.array([[m + c, n + c]] * 2, "int32")), "float64"), 1, 0)
        products.append((q * k).sum(-1))
    lengths = np.linalg.norm(x, axis=-1).prod(axis=1)
    assert (np.abs(products[1] - products[0]) <= 2.0**-20 * lengths).all()


@given(st.integers(0, 2**20), st.integers(0, 2**20), seeds)
def test_rotations_add_up(p, r, seed):
    x = heads((2, 1, 3, 8), seed)
    at = lambda y, position: np.asarray(turned(y, np.full((2, 1), position, "int32")))
    np.testing.assert_allclose(at(at(x, p), r), at(x, p + r), rtol=0, atol=1e-5)
    np.testing.assert_allclose(at(at(x, p), -p), x, rtol=0, atol=1e-5)


@given(st.integers(0, LAST - 8), seeds)
def test_rotary_rows_do_not_depend_on_where_the_chunk_starts(offset, seed):
    x = heads((2, 8, 3, 4), seed)
    ids = np.broadcast_to(offset + np.arange(8), (2, 8)).astype("int32")
    whole = np.asarray(turned(x, ids))
    np.testing.assert_array_equal(turned(x[:, 3:], ids[:, 3:]), whole[:, 3:], strict=True)


@given(seeds)
def test_two_thetas_in_one_process_keep_their_own_tables(seed):
    x, ids = heads((2, 4, 3, 8), seed), np.broadcast_to(np.arange(4), (2, 4)).astype("int32")
    first = [np.asarray(turned(x, ids, theta=theta)) for theta in (10_000.0, 100.0)]
    again = [np.asarray(rotary(jnp.asarray(x), jnp.asarray(ids), theta=theta)) for theta in (100.0, 10_000.0)]
    assert (first[0] != first[1]).any()
    np.testing.assert_allclose(again[::-1], first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_heads_are_turned_in_float32(dtype):
    x = jnp.asarray(heads((2, 3, 2, 8), 0), dtype)
    ids = jnp.asarray([[5, 2**20 + 1, LAST]] * 2, jnp.int32)
    wanted = turned(x.astype(jnp.float32), ids).astype(dtype)
    np.testing.assert_array_equal(turned(x, ids), wanted, strict=True)


def test_rotary_refuses_an_odd_head_width(untyped):
    with pytest.raises(ValueError, match="even head width, got H=5"):
        rotary(jnp.ones((2, 3, 1, 5)), jnp.zeros((2, 3), jnp.int32))


@given(st.sampled_from([(), (2,), (2, 3)]), seeds)
def test_position_ids_count_from_the_offset_of_each_row(batch, seed):
    x = jnp.zeros((*batch, 4, 2))
    offset = np.random.default_rng(seed).integers(0, 100, batch).astype("int32")
    ids = np.asarray(position_ids(x, jnp.asarray(offset)))
    np.testing.assert_array_equal(ids, offset[..., None] + np.arange(4, dtype="int32"), strict=True)
    unshifted = np.asarray(position_ids(x))
    np.testing.assert_array_equal(np.broadcast_to(unshifted, (*batch, 4)), ids - offset[..., None])


@pytest.mark.parametrize("batch", [(2,), (), (2, 3)])
@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_add_positions_adds_the_rows_at_the_offset(batch, kind):
    x, table = jnp.asarray(heads((*batch, 4, 6), 0)), jnp.asarray(heads((12, 6), 1))
    encoding = np.asarray(table if kind == "learned" else sinusoidal_table(12, 6))
    offset = np.random.default_rng(2).integers(0, 9, batch).astype("int32")
    got = add_positions(x, kind=kind, embedding=table, offset=jnp.asarray(offset))
    np.testing.assert_allclose(got, x + encoding[offset[..., None] + np.arange(4)], rtol=0, atol=1e-6)
    unshifted = add_positions(x, kind=kind, embedding=table)
    np.testing.assert_allclose(unshifted, x + np.broadcast_to(encoding[:4], x.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rotary", "none"])
def test_other_kinds_leave_x_as_it_is(kind):
    x = jnp.asarray(heads((2, 3, 4), 0))
    np.testing.assert_array_equal(add_positions(x, kind=kind), x, strict=True)


def test_learned_positions_need_their_table():
    with pytest.raises(ValueError, match="learned positions need their embedding table, got none"):
        add_positions(jnp.ones((2, 3, 4)), kind="learned")


@pytest.mark.parametrize("bad", [[[0, 12]], [[-1, 3]], [[LAST, 0]]])
def test_a_position_beyond_the_learned_table_raises_and_gives_nan_under_jit(bad):
    table, ids = jnp.asarray(heads((12, 6), 0)), jnp.asarray(bad, jnp.int32)
    with pytest.raises(ValueError, match=r"must lie in \[0, 12\)|no position"):
        learned(ids, table)
    rows = np.asarray(jax.jit(learned)(ids, table))
    inside = (np.array(bad) >= 0) & (np.array(bad) < 12)
    assert np.isnan(rows[~inside]).all()
    np.testing.assert_array_equal(rows[inside], np.asarray(table)[np.array(bad)[inside]])


def test_a_chunk_that_leaves_the_learned_table_raises_and_gives_nan_under_jit():
    x, table, offset = jnp.asarray(heads((2, 4, 6), 0)), jnp.asarray(heads((12, 6), 1)), jnp.asarray([8, 9], jnp.int32)
    with pytest.raises(ValueError, match=r"\[0, 12\)"):
        add_positions(x, kind="learned", embedding=table, offset=offset)
    out = np.asarray(jax.jit(add_positions, static_argnames="kind")(x, kind="learned", embedding=table, offset=offset))
    assert np.isnan(out[1, -1]).all()
    assert np.isfinite(out[0]).all()
    assert np.isfinite(out[1, :-1]).all()


def test_more_tokens_than_the_learned_table_raise_under_jit_too():
    with pytest.raises(ValueError, match="max_length=12 has no position for 13 tokens; shorten the input or raise"):
        jax.eval_shape(lambda x, table: add_positions(x, kind="learned", embedding=table), jnp.ones((2, 13, 6)), TABLE)


TABLE = jax.ShapeDtypeStruct((12, 6), jnp.float32)


def test_positions_within_the_learned_table_never_raise():
    """More of them than rows, as in packed examples that each count from 0."""
    table = jnp.asarray(heads((3, 2), 0))
    ids = np.array([[0, 1, 2, 0, 1, 2]] * 2, "int32")
    np.testing.assert_array_equal(learned(jnp.asarray(ids), table), np.asarray(table)[ids])
