"""Laws of drawing tokens: what is kept, how often each comes, and by whose key."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.decoding import sample
from core.sampling import Sampling, check_sampling, draw, kept_tokens, likeliest, row_keys
from tests.strategies import seeds

V = 7
batches = st.sampled_from([(3,), (), (2, 2)])
kept = jax.jit(kept_tokens)
drawn = jax.jit(draw)


def logits_of(batch, seed, *, tied=False):
    x = 2 * np.random.default_rng(seed).standard_normal((*batch, V))
    return (np.round(x) if tied else x).astype("float32")


def by_rank(row):
    """Tokens from the likeliest on, of equals the lowest first."""
    return sorted(range(V), key=lambda token: (-row[token], token))


def softmax(row, tokens):
    x = np.full(V, -np.inf)
    x[list(tokens)] = np.float64(row)[list(tokens)]
    e = np.exp(x - x.max())
    return e / e.sum()


def expected(row, *, top_k=None, top_p=None, min_p=None):
    """The rules one after the other, each on what the ones before have left."""
    order = by_rank(row)[: top_k or V]
    if top_p is not None and top_p < 1:
        mass, order_left, p = 0.0, [], softmax(row, order)
        for token in order:
            if mass >= top_p:
                break
            order_left.append(token)
            mass += p[token]
        order = order_left
    if min_p is not None:
        order = [token for token in order if np.exp(row[token] - max(row)) >= min_p]
    return set(order)


def test_nothing_is_changed_unless_asked_for():
    rules = Sampling()
    assert (rules.temperature, rules.top_k, rules.top_p, rules.min_p) == (1.0, None, None, None)


@given(batches, seeds)
def test_the_likeliest_token_is_the_first_of_the_highest(batch, seed):
    logits = logits_of(batch, seed, tied=True)
    logits[np.random.default_rng(seed).random(logits.shape) < 0.3] = -np.inf
    np.testing.assert_array_equal(jax.jit(likeliest)(logits), np.argmax(logits, -1).astype("int32"), strict=True)


def test_the_likeliest_of_nothing_is_the_first_and_of_nan_none():
    logits = np.stack([np.full(V, -np.inf), np.where(np.arange(V) == 3, np.nan, 1.0)]).astype("float32")
    assert likeliest(jnp.asarray(logits)).tolist() == [0, V]


RULES = [
    {"top_k": 1}, {"top_k": 3}, {"top_k": V}, {"top_k": 99}, {"top_p": 0.01}, {"top_p": 0.5}, {"top_p": 0.93},
    {"top_p": 1.0}, {"min_p": 0.2}, {"min_p": 1.0}, {"min_p": 0.0}, {"top_k": 4, "top_p": 0.8, "min_p": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("rules", RULES, ids=str)
@given(batch=batches, seed=seeds, tied=st.booleans())
def test_what_is_kept_is_what_the_rules_say(rules, batch, seed, tied):
    """Exactly k, of equals the lowest ids; the fewest with the mass, the one that crosses it too; all for 1."""
    logits = logits_of(batch, seed, tied=tied)
    found = np.asarray(kept(jnp.asarray(logits), Sampling(**rules)))
    for row in np.ndindex(batch):
        assert set(np.flatnonzero(found[row])) == expected(logits[row], **rules)


@given(seeds)
def test_a_token_that_may_not_come_is_not_kept(seed):
    logits = logits_of((), seed)
    logits[::2] = -np.inf
    for rules in ({}, {"top_k": V}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert not np.asarray(kept(jnp.asarray(logits), Sampling(**rules)))[::2].any()


def test_the_mass_is_met_exactly_and_for_one_the_unlikeliest_stay():
    logits = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [-60.0, 0.0, -70.0, -np.inf]])
    assert kept(logits, Sampling(top_p=0.5)).tolist() == [[True, True, False, False], [False, True, False, False]]
    assert kept(logits, Sampling(top_p=1.0)).tolist() == [[True] * 4, [True, True, True, False]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rules", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}], ids=str)
def test_tokens_come_as_often_as_the_law_says(rules, temperature):
    """Within 6 deviations, of 20 000 draws; first comes the temperature."""
    logits, number = logits_of((), 5), 20_000
    warm = logits / temperature
    p = softmax(warm, expected(warm, **rules))
    keys = jax.random.split(jax.random.key(0), number)
    rows = jnp.broadcast_to(jnp.asarray(logits), (number, V))
    counts = np.bincount(drawn(rows, keys, Sampling(temperature=temperature, **rules)), minlength=V)
    assert (np.abs(counts - number * p) <= 6 * np.sqrt(number * p * (1 - p))).all()


@given(batches, seeds)
def test_the_coldest_and_the_narrowest_draw_the_likeliest(batch, seed):
    logits = logits_of(batch, seed, tied=True)
    keys = row_keys(jax.random.key(seed), batch)
    likeliest = np.argmax(logits, axis=-1)
    for sampling in (Sampling(temperature=0.0), Sampling(top_k=1), Sampling(min_p=1.0, top_k=1), Sampling(top_p=1e-9)):
        np.testing.assert_array_equal(drawn(jnp.asarray(logits), keys, sampling), likeliest)


def test_the_coldest_divides_nothing_by_zero():
    """NaN would come of a logit of 0, unseen but where NaN is looked for."""
    with jax.debug_nans(True):
        assert int(draw(jnp.zeros(V), jax.random.key(0), Sampling(temperature=0.0))) == 0


@given(batches, seeds)
def test_tokens_are_int32_with_wide_types_too(batch, seed):
    rules = Sampling(temperature=0.7, top_k=4, top_p=0.9, min_p=0.05)
    with jax.enable_x64(True):
        logits = jnp.asarray(logits_of(batch, seed), jnp.float64)
        found = drawn(logits, row_keys(jax.random.key(seed), batch), rules)
        assert found.dtype == jnp.int32
        allowed = np.take_along_axis(np.asarray(kept(logits / 0.7, rules)), np.asarray(found)[..., None], axis=-1)
    assert allowed.all()


def test_temperature_and_thresholds_change_without_compiling_anew():
    traces = []

    @jax.jit
    def draw_once(logits, key, sampling):
        traces.append(1)
        return draw(logits, key, sampling)

    logits = jnp.asarray(logits_of((), 0))
    for i in range(4):
        numbers = [jnp.float32(x) for x in (0.5 + i, 0.9 - 0.1 * i, 0.01 * i)]
        draw_once(logits, jax.random.key(i), Sampling(numbers[0], 3, numbers[1], numbers[2]))
    assert len(traces) == 1


# keys


def step(tokens, cache):
    """Logits of the next token by the last one, a table for each row."""
    look_up = functools.reduce(lambda f, _: jax.vmap(f), tokens.shape[:-1], lambda table, token: table[token])
    return look_up(cache, tokens[..., 0])[..., None, :], cache


def tables(batch, seed):
    return jnp.asarray(logits_of((*batch, V), seed))


def generated(tables, first, keys, sampling=Sampling(), *, max_length=6):  # noqa: B008  a frozen value
    options = {"sampling": sampling, "max_length": max_length, "eos_id": -7}
    return sample(step, first, tables, keys=keys, **options)


@given(seeds)
def test_a_row_depends_on_its_own_key_alone(seed):
    key, several = jax.random.key(seed), tables((3,), seed)
    first = jnp.asarray([1, 2, 3], jnp.int32)
    together = generated(several, first, row_keys(key, (3,)))
    fewer = generated(several[:2], first[:2], row_keys(key, (2,)))
    np.testing.assert_array_equal(together[:2], fewer)
    for i in range(3):
        alone = generated(several[i], first[i], jax.random.fold_in(key, i))
        np.testing.assert_array_equal(together[i], alone)


def test_the_same_key_draws_the_same_and_every_token_by_another():
    table, first = jnp.zeros((40, V, V)), jnp.zeros(40, jnp.int32)
    once, again = (np.asarray(generated(table, first, row_keys(jax.random.key(1), (40,)))) for _ in range(2))
    other = np.asarray(generated(table, first, row_keys(jax.random.key(2), (40,))))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()
    columns = {tuple(column) for column in once.T}
    assert len(columns) == 6  # 40 rows: no two places drew alike
    assert len({tuple(row) for row in once}) > 30


@given(batches, seeds)
def test_given_keys_are_used_as_they_are(batch, seed):
    keys = jax.random.split(jax.random.key(seed), (*batch, 1))[..., 0]
    same = row_keys(keys, batch)
    assert (jax.random.key_data(same) == jax.random.key_data(keys)).all() or batch == ()


def test_keys_of_another_shape_are_refused(untyped):
    with pytest.raises(ValueError, match=r"one key or one for each row, \(3,\), got keys of shape \(2,\)"):
        row_keys(jax.random.split(jax.random.key(0), 2), (3,))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_each_row_is_drawn_by_a_key_of_its_own(shape, untyped):
    """One for all would draw, too, but a row would depend on how many there are."""
    keys = jax.random.split(jax.random.key(0), shape)
    message = re.escape(f"each row needs a key, (2,), got keys of shape {shape}; row_keys makes them of one")
    with pytest.raises(ValueError, match=message):
        draw(jnp.zeros((2, V)), keys, Sampling())
    with pytest.raises(ValueError, match=message):
        generated(tables((2,), 0), jnp.zeros(2, jnp.int32), keys)


def test_keys_that_are_plain_numbers_are_refused(untyped):
    """Those of jax.random.PRNGKey: one of them is as long as two rows."""
    legacy = jax.random.key_data(jax.random.key(0))
    message = r"keys must be typed, as jax.random.key makes them, got uint32 of shape \(2,\); jax.random.wrap_key"
    for use in (
        lambda: row_keys(legacy, (2,)),
        lambda: draw(jnp.zeros((2, V)), legacy, Sampling()),
        lambda: generated(tables((2,), 0), jnp.zeros(2, jnp.int32), legacy),
    ):
        with pytest.raises(TypeError, match=message):
            use()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0 and finite, got inf"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 2.0}, "top_k must be an integer of at least 1, got 2.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
        ({"min_p": -0.1}, "min_p must be at least 0 and at most 1, got -0.1"),
        ({"min_p": 1.5}, "min_p must be at least 0 and at most 1, got 1.5"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(sampling, message, untyped):
    logits, rules, keys = jnp.asarray(logits_of((2,), 0)), Sampling(**sampling), row_keys(jax.random.key(0), (2,))
    for use in (
        lambda: check_sampling(rules),
        lambda: kept_tokens(logits, rules),
        lambda: draw(logits, keys, rules),
        lambda: generated(tables((2,), 0), jnp.zeros(2, jnp.int32), keys, rules),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0}, {"top_k": 1}, {"top_p": 1.0}, {"min_p": 1.0}, {"min_p": 0.5}, {"min_p": 0.0}]
)
def test_the_last_value_that_can_be_is_taken(sampling):
    check_sampling(Sampling(**sampling))


def test_numbers_that_are_not_known_yet_are_taken():
    jax.eval_shape(lambda x: check_sampling(Sampling(temperature=x, top_p=x, min_p=x)), jnp.float32(0.5))


def test_arrays_that_are_known_inside_of_jit_are_looked_at():
    one, two = jnp.float32(1), jnp.float32(2)
    jax.eval_shape(lambda: check_sampling(Sampling(temperature=two, top_p=one, min_p=one)))
    with pytest.raises(ValueError, match=r"top_p must be above 0 and at most 1, got 2\.0"):
        jax.eval_shape(lambda: check_sampling(Sampling(top_p=two)))
