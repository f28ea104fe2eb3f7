"""Laws of rotary positions: both layouts, some features or all, and every way to stretch them."""

import functools
import math
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from core.config import RotaryScaling, TransformerConfig
from core.positions import inverse_frequencies
from core.rotary import (
    linear_scaling,
    llama3_scaling,
    ntk_scaling,
    rotary,
    rotary_settings,
    yarn_magnitude,
    yarn_scaling,
)
from tests.strategies import LAST, far_and_near, ids_up_to, seeds
from tests.test_positions import exact_sin_cos

turned = jax.jit(rotary, static_argnames=("theta", "frequencies", "layout", "magnitude"))
exactly = functools.partial(np.testing.assert_array_equal, strict=True)


class Turn(NamedTuple):
    """Sizes and settings of one rotation; `pairs` of H features are turned."""

    batch: tuple[int, ...]
    T: int
    N: int
    H: int
    pairs: int
    theta: float
    layout: str
    magnitude: float = 1.0

    @property
    def settings(self):
        """With frequencies that are none of theta's own: stretched by a third, not all alike."""
        frequencies = [self.theta ** (-i / self.pairs) / (1 + i / 3) for i in range(self.pairs)]
        return {"frequencies": tuple(frequencies), "layout": self.layout, "magnitude": self.magnitude}

    @property
    def feature(self):
        """[pairs, 2]: which features stand in a pair."""
        half = self.layout == "half"
        return np.array([(i, i + self.pairs) if half else (2 * i, 2 * i + 1) for i in range(self.pairs)])

    def draw(self, seed, dtype="float32"):
        shape = (*self.batch, self.T, self.N, self.H)
        return np.random.default_rng(seed).standard_normal(shape).astype(dtype)

    def ids(self, seed, last=2**20):
        return ids_up_to(last, (*self.batch, self.T), seed)


TURNS = [
    Turn((2,), 4, 3, 4, 2, 1e4, "half"),
    Turn((), 5, 1, 2, 1, 5e5, "interleaved"),
    Turn((2, 1, 2), 3, 2, 10, 3, 1e4, "half", 1.25),
    Turn((3,), 2, 4, 7, 2, 3.0, "interleaved"),
    Turn((2,), 3, 2, 6, 3, 1e4, "interleaved", 0.75),
    Turn((), 1, 2, 5, 2, 1e2, "half"),
]
turns = st.sampled_from(TURNS)
whole_turns = st.sampled_from([turn for turn in TURNS if 2 * turn.pairs == turn.H])
plain_turns = st.sampled_from([turn for turn in TURNS if turn.magnitude == 1])


def turned_by_the_formula(turn, x, ids):
    """(a cos - b sin, b cos + a sin) of each pair, and |a| + |b|, in float64."""
    out, size = x.astype("float64"), np.zeros(x.shape)
    settings, x = turn.settings, x.astype("float64")
    for *b, t in np.ndindex(ids.shape):
        for (i, j), frequency in zip(turn.feature, settings["frequencies"], strict=True):
            sin, cos = exact_sin_cos(ids[*b, t], frequency)
            first, second = x[*b, t, :, i], x[*b, t, :, j]
            out[*b, t, :, i] = turn.magnitude * (first * cos - second * sin)
            out[*b, t, :, j] = turn.magnitude * (second * cos + first * sin)
            size[*b, t, :, i] = size[*b, t, :, j] = turn.magnitude * (abs(first) + abs(second))
    return out, size


@given(turns, far_and_near, seeds)
def test_each_pair_turns_by_its_position_times_its_frequency(turn, last, seed):
    """T1: sin and cos within 2^-23, and the roundings of two products, their sum and the magnitude."""
    x, ids = turn.draw(seed), turn.ids(seed, last)
    wanted, size = turned_by_the_formula(turn, x, ids)
    got = turned(x, ids, **turn.settings)
    assert got.dtype == jnp.float32
    assert got.shape == x.shape
    assert (np.abs(got - wanted) <= 1.25 * 2.0**-22 * size).all()


@given(turns, far_and_near, seeds)
def test_each_pair_turns_as_exactly_in_float64(turn, last, seed):
    with jax.enable_x64(True):
        x, ids = turn.draw(seed, "float64"), turn.ids(seed, last)
        wanted, size = turned_by_the_formula(turn, x, ids)
        got = turned(x, ids, **turn.settings)
        assert got.dtype == jnp.float64
        assert (np.abs(got - wanted) <= 1e-12 * size).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(turn=turns, last=far_and_near, seed=seeds)
def test_sixteen_bit_heads_are_turned_in_float32(dtype, turn, last, seed):
    x, ids = turn.draw(seed).astype(dtype), turn.ids(seed, last)
    wanted = turned(x.astype("float32"), ids, **turn.settings).astype(dtype)
    exactly(turned(x, ids, **turn.settings), wanted)


@given(turns, seeds)
def test_features_beyond_the_frequencies_stay_as_they_are_in_bits(turn, seed):
    x, ids, width = turn.draw(seed), turn.ids(seed), 2 * turn.pairs
    x[..., width:] = np.random.default_rng(seed).choice(np.float32([np.nan, np.inf, -0.0, 3e38]), x[..., width:].shape)
    out = np.asarray(turned(x, ids, **turn.settings))
    assert out[..., width:].tobytes() == x[..., width:].tobytes()
    exactly(out[..., :width], turned(x[..., :width], ids, **turn.settings))
    assert (out[..., :width] != x[..., :width]).any()


@given(turns, far_and_near, seeds, st.sampled_from(["float32", "bfloat16"]))
def test_the_two_layouts_differ_by_the_order_of_features_alone(turn, last, seed, dtype):
    x, ids = turn.draw(seed).astype(dtype), turn.ids(seed, last)
    pairs = np.arange(2 * turn.pairs).reshape(2, -1).T.ravel()  # 0, F, 1, F + 1, ...
    order = np.concatenate([pairs, np.arange(2 * turn.pairs, turn.H)])
    half = turned(x, ids, **turn.settings | {"layout": "half"})
    interleaved = turned(x[..., order], ids, **turn.settings | {"layout": "interleaved"})
    exactly(interleaved, half[..., order])


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 3.0])
@given(turn=whole_turns, seed=seeds)
def test_pair_i_turns_by_theta_to_the_minus_two_i_over_h_unless_told_otherwise(turn, theta, seed):
    x, ids = turn.draw(seed), turn.ids(seed, 1000)
    frequencies = tuple(theta ** (-2 * i / turn.H) for i in range(turn.H // 2))
    exactly(turned(x, ids, theta=theta), turned(x, ids, frequencies=frequencies))
    exactly(turned(x, ids, theta=theta), turned(x, ids, theta=theta, layout="half", magnitude=1.0))
    exactly(turned(x, ids), turned(x, ids, theta=10_000.0))


@given(plain_turns, far_and_near, seeds)
def test_rotation_keeps_lengths(turn, last, seed):
    x, ids = turn.draw(seed), turn.ids(seed, last)
    before, after = (np.linalg.norm(np.asarray(y, "float64"), axis=-1) for y in (x, turned(x, ids, **turn.settings)))
    assert (np.abs(after - before) <= 8 * 2.0**-24 * before).all()


@given(turns, seeds)
def test_the_magnitude_multiplies_what_is_turned(turn, seed):
    """In bits, one operation after the other: of x cos - y sin a compiler may round either product first."""
    x, ids, width = turn.draw(seed), turn.ids(seed), 2 * turn.pairs
    arrays = (jnp.asarray(x), jnp.asarray(ids))
    once, twice = (np.asarray(rotary(*arrays, **turn.settings | {"magnitude": m})) for m in (1.0, 2.0))
    exactly(twice[..., :width], 2 * once[..., :width])
    exactly(twice[..., width:], once[..., width:])


@given(plain_turns, seeds)
def test_position_zero_is_the_identity(turn, seed):
    x = turn.draw(seed)
    exactly(turned(x, np.zeros((*turn.batch, turn.T), "int32"), **turn.settings), x)


@given(turns, seeds)
def test_positions_broadcast_over_the_leading_axes(turn, seed):
    x, ids = turn.draw(seed), turn.ids(seed)[(0,) * len(turn.batch)]
    one = turned(x, ids.reshape((1,) * len(turn.batch) + (turn.T,)), **turn.settings)
    exactly(one, turned(x, np.broadcast_to(ids, (*turn.batch, turn.T)), **turn.settings))


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 10**6), seeds, st.sampled_from(TURNS[::4]))
def test_products_of_turned_vectors_depend_on_distance_alone(m, n, shift, seed, turn):
    """Within 2^-20 |q| |k|."""
    q, k = turn.draw(seed), turn.draw(seed + 1)
    products = []
    for c in (0, shift):
        at = [np.full((*turn.batch, turn.T), p + c, "int32") for p in (m, n)]
        first, second = (np.asarray(turned(x, p, **turn.settings), "float64") for x, p in zip((q, k), at, strict=True))
        products.append((first * second).sum(-1))
    lengths = np.linalg.norm(q, axis=-1) * np.linalg.norm(k, axis=-1)
    assert (np.abs(products[1] - products[0]) <= 2.0**-20 * lengths).all()


@given(st.integers(0, 2**20), st.integers(0, 2**20), plain_turns, seeds)
def test_rotations_add_up(p, r, turn, seed):
    x = turn.draw(seed)
    at = lambda y, p: np.asarray(turned(y, np.full((*turn.batch, turn.T), p, "int32"), **turn.settings))
    np.testing.assert_allclose(at(at(x, p), r), at(x, p + r), rtol=0, atol=1e-5)
    np.testing.assert_allclose(at(at(x, p), -p), x, rtol=0, atol=1e-5)


@given(st.integers(0, LAST - 8), seeds)
def test_rows_do_not_depend_on_where_the_chunk_starts(offset, seed):
    x = np.random.default_rng(seed).standard_normal((2, 8, 3, 4)).astype("float32")
    ids = np.broadcast_to(offset + np.arange(8), (2, 8)).astype("int32")
    exactly(turned(x[:, 3:], ids[:, 3:]), turned(x, ids)[:, 3:])


@pytest.mark.parametrize("function", [rotary, turned], ids=["eager", "compiled"])
@given(seed=seeds, thetas=st.permutations([10_000.0, 100.0, 7.0]))
@settings(max_examples=6)
def test_thetas_in_one_process_keep_their_own_tables_in_any_order(function, seed, thetas):
    x, ids = TURNS[0].draw(seed), TURNS[0].ids(seed, 50)
    for theta in thetas:
        own = turned(x, ids, frequencies=(1.0, theta**-0.5))
        got = function(jnp.asarray(x), jnp.asarray(ids), theta=theta)
        np.testing.assert_allclose(got, own, rtol=0, atol=1e-6)


@given(turns, far_and_near, seeds)
def test_the_gradient_turns_back(turn, last, seed):
    """T4: the transpose of a rotation is the one by the opposite angle, on the same features."""
    with jax.enable_x64(True):
        x, y, ids = turn.draw(seed, "float64"), turn.draw(seed + 1, "float64"), turn.ids(seed, last)
        back = _pulled_back(x, ids, y, tuple(turn.settings.items()))
        np.testing.assert_allclose(back, turned(y, -ids, **turn.settings), rtol=1e-12, atol=1e-12)


@functools.partial(jax.jit, static_argnums=3)
def _pulled_back(x, ids, y, settings):
    return jax.vjp(lambda x: rotary(x, ids, **dict(settings)), x)[1](y)[0]


@pytest.mark.parametrize("turn", [TURNS[2], TURNS[3]])
def test_derivatives_are_those_of_finite_differences(turn, x64):
    ids = jnp.asarray(turn.ids(0))
    check_grads(lambda x: turned(x, ids, **turn.settings), (turn.draw(0, "float64"),), order=1)


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_nothing_to_turn_is_no_error(shape, layout):
    out = rotary(jnp.zeros(shape), jnp.zeros(shape[:2], jnp.int32), layout=layout)
    assert out.shape == shape


# stretched to longer texts


class Stretch(NamedTuple):
    """One choice of all that scaling goes by."""

    width: int
    theta: float
    factor: float
    length: int

    @property
    def plain(self):
        return tuple(self.theta ** (-2 * i / self.width) for i in range(self.width // 2))

    @property
    def periods(self):
        """How many whole turns each pair makes in the original length."""
        return [self.length * frequency / (2 * math.pi) for frequency in self.plain]


stretches = st.builds(
    Stretch,
    st.sampled_from([8, 2, 4, 64, 128]),
    st.sampled_from([10_000.0, 500_000.0, 3.0]),
    st.one_of(st.sampled_from([1.0, 2.0, 8.0, 40.0]), st.floats(1, 100)),
    st.one_of(st.sampled_from([2048, 8192]), st.integers(1, 10**5)),
)


def linear(stretch):
    return linear_scaling(inverse_frequencies(stretch.width, stretch.theta), stretch.factor)


def ntk(stretch):
    return ntk_scaling(stretch.width, stretch.theta, stretch.factor)


def yarn(stretch, **limits):
    return yarn_scaling(*stretch, **limits)


def llama3(stretch, **limits):
    return llama3_scaling(inverse_frequencies(stretch.width, stretch.theta), stretch.factor, stretch.length, **limits)


SCALINGS = {"linear": linear, "ntk": ntk, "yarn": yarn, "llama3": llama3}
closely = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=0)


def pair_with(turns, stretch):
    """The pair, a real number, that makes so many turns in the original length; by bisection."""
    low, high = -8.0 * stretch.width, 8.0 * stretch.width
    for _ in range(100):
        middle = (low + high) / 2
        more = math.log(stretch.length) - 2 * middle / stretch.width * math.log(stretch.theta)
        low, high = (middle, high) if more > math.log(2 * math.pi * turns) else (low, middle)
    return low


def ramp(stretch, fast, slow):
    """The first and the last pair of YaRN's ramp; a text so short that none turns has none."""
    last = min(math.ceil(pair_with(slow, stretch)), stretch.width - 1)
    return max(math.floor(pair_with(fast, stretch)), 0), last


def yarn_reference(stretch, fast, slow):
    """The released code's: interpolation and extrapolation mixed by a ramp over the pairs."""
    first, last = ramp(stretch, fast, slow)
    frequencies = []
    for i, frequency in enumerate(stretch.plain):
        extrapolated = 1.0 if i <= first else 1 - min((i - first) / (last - first or 0.001), 1)
        frequencies.append(extrapolated * frequency + (1 - extrapolated) * frequency / stretch.factor)
    return frequencies


def llama3_reference(stretch, low, high):
    """By wave lengths, as Meta released it."""
    frequencies = []
    for frequency in stretch.plain:
        wave = 2 * math.pi / frequency
        if wave < stretch.length / high:
            frequencies.append(frequency)
        elif wave > stretch.length / low:
            frequencies.append(frequency / stretch.factor)
        else:
            smooth = (stretch.length / wave - low) / (high - low)
            frequencies.append((1 - smooth) * frequency / stretch.factor + smooth * frequency)
    return frequencies


@given(stretches)
def test_linear_scaling_divides_every_frequency(stretch):
    closely(linear(stretch), np.array(stretch.plain) / stretch.factor)


@given(stretches.filter(lambda s: s.width > 2))
def test_ntk_scaling_lets_theta_grow(stretch):
    """theta' = theta s^(W / (W - 2)), and so pair i of F is divided by s^(i / (F - 1))."""
    last = stretch.width // 2 - 1
    closely(ntk(stretch), [f / stretch.factor ** (i / last) for i, f in enumerate(stretch.plain)])


@pytest.mark.parametrize("theta", [3.0, 10_000.0])
@pytest.mark.parametrize("width", [8, 128])
def test_the_ramp_of_yarn_begins_and_ends_at_whole_pairs_for_any_length(width, theta):
    """Among them those at which the first or the last pair of the ramp is another one."""
    for length in [6, *range(40, 440, 3), 1000, 2048, 8192, 65_536, 10**7]:
        stretch = Stretch(width, theta, 8.0, length)
        first, last = ramp(stretch, 32.0, 1.0)
        if first <= last:
            closely(yarn(stretch), yarn_reference(stretch, 32.0, 1.0), rtol=1e-9)


@pytest.mark.parametrize("length", [*range(40, 440, 7), 2048, 65_536])
def test_yarn_goes_by_the_original_length_of_the_configuration(length):
    config = TransformerConfig(
        d_model=128, num_heads=1, positions="rotary", rotary_scaling="yarn", rotary_factor=8.0,
        rotary_original_length=length,
    )  # fmt: skip
    closely(rotary_settings(config)["frequencies"], yarn(Stretch(128, 10_000.0, 8.0, length)))


@given(stretches, st.sampled_from([(32.0, 1.0), (64.0, 2.0)]))
def test_yarn_scaling_is_that_of_its_released_code(stretch, limits):
    fast, slow = limits
    first, last = ramp(stretch, fast, slow)
    assume(first <= last)
    closely(yarn(stretch, fast=fast, slow=slow), yarn_reference(stretch, fast, slow))


@given(stretches, st.sampled_from([(1.0, 4.0), (2.0, 16.0)]))
def test_llama3_scaling_is_that_of_its_released_code(stretch, limits):
    low, high = limits
    closely(llama3(stretch, low=low, high=high), llama3_reference(stretch, low, high))


@given(stretches)
def test_the_published_limits_are_the_usual_ones(stretch):
    assert yarn(stretch) == yarn(stretch, fast=32.0, slow=1.0)
    assert llama3(stretch) == llama3(stretch, low=1.0, high=4.0)


@pytest.mark.parametrize("name", SCALINGS)
@given(stretch=stretches)
def test_a_factor_of_one_changes_nothing(name, stretch):
    closely(SCALINGS[name](stretch._replace(factor=1.0)), stretch.plain)


@pytest.mark.parametrize("name", SCALINGS)
@given(stretch=stretches)
def test_scaling_slows_each_pair_down_by_no_more_than_the_factor(name, stretch):
    """The lower its frequency the more; and so the pairs keep their order."""
    got, plain = np.array(SCALINGS[name](stretch)), np.array(stretch.plain)
    slowed = plain / got
    assert got.shape == plain.shape
    assert (slowed >= 1 - 1e-12).all()
    assert (slowed <= stretch.factor * (1 + 1e-12)).all()
    assert (np.diff(slowed) >= -1e-12 * stretch.factor).all()
    assert (np.diff(got) < 0).all()


@pytest.mark.parametrize("name", ["ntk", "yarn", "llama3"])
@given(stretch=stretches.filter(lambda s: s.periods[0] > 32))
def test_the_highest_frequency_is_kept(name, stretch):
    assert SCALINGS[name](stretch)[0] == 1.0


@pytest.mark.parametrize("name", SCALINGS)
@given(stretch=stretches.filter(lambda s: s.width > 4 and s.periods[-2] < 1))
def test_the_lowest_frequency_is_divided_by_the_factor(name, stretch):
    closely(SCALINGS[name](stretch)[-1], stretch.plain[-1] / stretch.factor)


@given(st.floats(1, 1e6))
def test_the_magnitude_of_yarn_is_a_tenth_of_the_logarithm_more_than_one(factor):
    closely(math.exp(10 * (yarn_magnitude(factor) - 1)), factor, rtol=1e-9)
    assert yarn_magnitude(1.0) == 1.0


@given(seeds, st.integers(0, 2**16))
def test_linear_scaling_puts_position_p_where_a_factor_earlier_one_stood(seed, last):
    turn = TURNS[0]
    x, ids = turn.draw(seed), turn.ids(seed, last)
    near = turned(x, ids, frequencies=(1.0, 0.01))
    far = turned(x, 4 * ids, frequencies=linear_scaling((1.0, 0.01), 4.0))
    np.testing.assert_allclose(far, near, rtol=0, atol=2.0**-21 * (1 + np.abs(x).max()))


@pytest.mark.parametrize("scaling", get_args(RotaryScaling))
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [None, 6])
def test_the_settings_are_those_of_the_configuration(scaling, layout, rotary_dim):
    config = TransformerConfig(
        d_model=64, num_heads=4, positions="rotary", rotary_theta=5000.0, rotary_layout=layout, rotary_dim=rotary_dim,
        rotary_scaling=scaling, rotary_factor=1.0 if scaling == "none" else 8.0, rotary_original_length=300,
    )  # fmt: skip
    settings, stretch = rotary_settings(config), Stretch(rotary_dim or 16, 5000.0, 8.0, 300)
    wanted = stretch.plain if scaling == "none" else SCALINGS[scaling](stretch)
    closely(settings["frequencies"], wanted)
    assert settings["layout"] == layout
    closely(settings["magnitude"], 1 + math.log(8) / 10 if scaling == "yarn" else 1.0)
    assert rotary_settings(config.replace(rotary_theta=77.0))["frequencies"] != settings["frequencies"]


# bad input


@pytest.mark.parametrize("width", [5, 1])
def test_an_odd_head_width_without_frequencies_raises(width, untyped):
    with pytest.raises(ValueError, match=f"even head width, got H={width}; or give frequencies"):
        rotary(jnp.ones((2, 3, 1, width)), jnp.zeros((2, 3), jnp.int32))


@pytest.mark.parametrize("width", [5, 4])
def test_more_frequencies_than_pairs_raise(width, untyped):
    with pytest.raises(ValueError, match=f"3 frequencies turn 6 features, got H={width}"):
        rotary(jnp.ones((2, 3, 1, width)), jnp.zeros((2, 3), jnp.int32), frequencies=(1.0, 0.5, 0.1))


def test_an_unknown_layout_raises(untyped):
    with pytest.raises(ValueError, match=r"layout must be one of \('half', 'interleaved'\), got 'neox'"):
        rotary(jnp.ones((2, 3, 1, 4)), jnp.zeros((2, 3), jnp.int32), layout="neox")


def test_positions_that_are_no_integers_raise(untyped):
    with pytest.raises(TypeError, match="positions must be integers, got float32"):
        rotary(jnp.ones((2, 3, 1, 4)), jnp.full((2, 3), 0.5))


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (3,), (2,), (2, 3, 1)])
def test_positions_of_another_shape_than_the_tokens_raise(shape, untyped):
    message = rf"positions must be \[\*B, T\], here \(2, 3\), 1 where they broadcast, got \({shape[0]},"
    with pytest.raises(ValueError, match=message):
        rotary(jnp.ones((2, 3, 1, 4)), jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        *[({"theta": value}, ValueError, f"theta must be above 0 and finite, got {value}")
          for value in (0, -5, math.nan, math.inf)],
        *[({"magnitude": value}, ValueError, f"magnitude must be above 0 and finite, got {value}")
          for value in (0.0, -1.0, math.nan, math.inf)],
        ({"frequencies": [1.0, 0.5]}, TypeError, "frequencies must be a tuple of floats, got list"),
        ({"frequencies": (1.0, math.nan)}, ValueError, r"frequencies must be finite, got \(1.0, nan\)"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, error, message, untyped):
    with pytest.raises(error, match=message):
        rotary(jnp.ones((2, 3, 1, 4)), jnp.zeros((2, 3), jnp.int32), **settings)


def test_vectors_that_are_not_floating_are_refused(untyped):
    with pytest.raises(TypeError, match="x must be floating point, got int32; cast it to float32"):
        rotary(jnp.ones((2, 3, 1, 4), jnp.int32), jnp.zeros((2, 3), jnp.int32))


@pytest.mark.parametrize("theta", [1.0, 0.5, 0.0, -3.0, math.nan, math.inf])
def test_yarn_needs_a_theta_above_one(theta, untyped):
    with pytest.raises(ValueError, match=f"the theta of YaRN must be above 1 and finite, got {theta}"):
        yarn(Stretch(8, theta, 2.0, 2048))


@pytest.mark.parametrize("length", [0, -5, math.nan, math.inf])
@pytest.mark.parametrize("scaling", [yarn, llama3])
def test_an_original_length_below_one_or_without_end_is_refused(scaling, length, untyped):
    with pytest.raises(ValueError, match=f"original_length must be at least 1 and finite, got {length}"):
        scaling(Stretch(8, 1e4, 2.0, length))


@pytest.mark.parametrize(("few", "many"), [(2.0, 2.0), (4.0, 1.0), (0.0, 2.0), (math.nan, 2.0), (1.0, math.inf)])
@pytest.mark.parametrize(("scaling", "lower", "higher"), [(yarn, "slow", "fast"), (llama3, "low", "high")])
def test_limits_in_another_order_are_refused(scaling, lower, higher, few, many, untyped):
    message = f"{lower} must be above 0 and below {higher}, both finite, got {lower}={few}, {higher}={many}"
    with pytest.raises(ValueError, match=message):
        scaling(Stretch(8, 1e4, 2.0, 2048), **{lower: few, higher: many})


@pytest.mark.parametrize("factor", [0.5, 0.0, -2.0, math.inf, math.nan])
@pytest.mark.parametrize("name", [*SCALINGS, "magnitude"])
def test_a_factor_below_one_or_without_end_raises(name, factor):
    with pytest.raises(ValueError, match=f"scaling factor must be at least 1 and finite, got {factor}"):
        yarn_magnitude(factor) if name == "magnitude" else SCALINGS[name](Stretch(8, 1e4, factor, 2048))
