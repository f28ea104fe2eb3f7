"""Laws of what a generation may say, in every way of decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.beam_search import beam_search
from core.constraints import FREE, Constraints, check_id, check_ids, forbid, penalised
from core.decoding import EOS, PAD, greedy, sample
from core.sampling import Sampling, row_keys
from tests.strategies import seeds

V, L = 6, 8
batches = st.sampled_from([(3,), (), (2, 2)])


def scores_of(batch, seed):
    return np.random.default_rng(seed).standard_normal((*batch, V)).astype("float32")


def sequences(batch, seed):
    return np.random.default_rng([seed, 1]).integers(0, V, (*batch, L)).astype("int32")


@functools.partial(jax.jit, static_argnames=("rules", "eos_id"))
def forbidden(scores, tokens, position, rules, forced=None, eos_id=EOS):
    return forbid(scores, tokens, position, rules, eos_id=eos_id, forced=forced) == -jnp.inf


lowered = jax.jit(penalised, static_argnums=3)


def test_ids_are_those_of_the_vocabulary():
    for token in (0, V - 1):
        check_id("eos_id", token, V)
    for token in (-1, V):
        with pytest.raises(ValueError, match=rf"eos_id must lie in the target vocabulary \[0, {V}\), got {token}"):
            check_id("eos_id", token, V)


def test_no_token_need_be_forced():
    check_ids(FREE, jnp.zeros((2, 0), jnp.int32), V)


def repeats(came, token, n):
    """Whether that token would complete n tokens that are there already."""
    whole = [*came, token]
    grams = [tuple(whole[i : i + n]) for i in range(len(whole) - n + 1)]
    return len(grams) > 0 and grams[-1] in grams[:-1]


@pytest.mark.parametrize("n", [1, 2, 3, L, L + 1, 99])
@given(batch=batches, seed=seeds, position=st.integers(0, L - 1))
def test_no_n_tokens_come_twice_in_the_same_order(n, batch, seed, position):
    tokens = sequences(batch, seed) % 3  # few of them, so that they repeat
    found = np.asarray(forbidden(scores_of(batch, seed), tokens, position, Constraints(no_repeat_ngram=n)))
    for row in np.ndindex(batch):
        wanted = [repeats(tokens[row][:position].tolist(), token, n) for token in range(V)]
        assert found[row].tolist() == wanted


@given(batches, seeds, st.integers(0, L - 1), st.sampled_from([0.5, 1.0, 2.0]))
def test_tokens_that_came_lose_by_the_penalty(batch, seed, position, penalty):
    """Positive logits are divided by it, negative ones multiplied."""
    logits, tokens = scores_of(batch, seed), sequences(batch, seed)
    rules = Constraints(repetition_penalty=penalty)
    found = lowered(logits, tokens, position, rules)
    for row in np.ndindex(batch):
        came = set(tokens[row][:position].tolist())
        wanted = [
            x if token not in came else x / penalty if x > 0 else x * penalty for token, x in enumerate(logits[row])
        ]
        np.testing.assert_allclose(np.asarray(found)[row], wanted, rtol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_the_end_waits_for_the_least_length(position):
    found = np.asarray(forbidden(scores_of((2,), 0), sequences((2,), 0), position, Constraints(min_length=2)))
    assert (found == ((np.arange(V) == EOS) & (position < 2))).all()


def test_banned_tokens_never_come():
    found = np.asarray(forbidden(scores_of((2, 2), 0), sequences((2, 2), 0), 3, Constraints(banned=(0, 5))))
    assert (found == np.isin(np.arange(V), [0, 5])).all()


@pytest.mark.parametrize("banned", [(), (0, 1)])
@given(batches, seeds, st.booleans())
def test_what_is_forced_comes_whatever_the_rules_say_and_minus_one_leaves_it_free(banned, batch, seed, one_for_all):
    forced = np.random.default_rng(seed).integers(-1, V, () if one_for_all else batch)[..., None].astype("int32")
    forced = np.concatenate([np.full_like(forced, -1), forced], axis=-1)
    rules = Constraints(banned=banned)
    for position in range(3):
        found = np.asarray(forbidden(scores_of(batch, seed), sequences(batch, seed), position, rules, forced))
        for row in np.ndindex(batch):
            token = -1 if position != 1 else int(forced[1] if one_for_all else forced[row][1])
            wanted = np.arange(V) != token if token >= 0 else np.isin(np.arange(V), banned)
            assert found[row].tolist() == wanted.tolist()


def test_forced_tokens_may_be_none_and_of_any_integer_type():
    scores, tokens = scores_of((2,), 0), sequences((2,), 0)
    assert not np.asarray(forbidden(scores, tokens, 0, FREE, np.zeros((2, 0), "int32"))).any()
    for dtype in ("int8", "uint8", "uint32"):
        for position, wanted in enumerate([np.arange(V) != 4, np.zeros(V, bool)]):
            found = np.asarray(forbidden(scores, tokens, position, FREE, np.full((2, 1), 4, dtype)))
            assert (found == wanted).all()


def test_where_nothing_is_left_the_row_ends_and_no_other():
    tokens = np.stack([np.arange(L), np.arange(L) % 2]).astype("int32")
    found = np.asarray(forbidden(scores_of((2,), 0), tokens, V, Constraints(no_repeat_ngram=1)))
    assert (found == [np.arange(V) != EOS, np.arange(V) < 2]).all()
    found = np.asarray(forbidden(scores_of((2,), 0), tokens, 0, Constraints(banned=tuple(range(V)))))
    assert (found == (np.arange(V) != EOS)).all()


@given(batches, seeds, st.integers(0, L - 1))
def test_rules_say_the_same_with_wide_types(batch, seed, position):
    rules = Constraints(repetition_penalty=1.5, no_repeat_ngram=2, min_length=3, banned=(5,))
    scores, tokens, forced = scores_of(batch, seed), sequences(batch, seed) % 3, np.int32([-1, 4, -1])
    found = [np.asarray(forbidden(scores, tokens, np.int32(position), rules, forced))]
    found.append(np.asarray(lowered(scores, tokens, np.int32(position), rules)))
    with jax.enable_x64(True):
        scores = scores.astype("float64")
        assert (forbidden(scores, tokens, np.int32(position), rules, forced.astype("int64")) == found[0]).all()
        wide = lowered(scores, tokens, np.int32(position), rules)
        np.testing.assert_allclose(wide, found[1], rtol=1e-6)


def test_without_rules_nothing_is_forbidden_and_nothing_computed():
    scores = jnp.asarray(scores_of((2,), 0))
    assert forbid(scores, jnp.asarray(sequences((2,), 0)), jnp.int32(1), FREE, eos_id=EOS) is scores
    assert penalised(scores, jnp.asarray(sequences((2,), 0)), jnp.int32(1), FREE) is scores


# in the ways of decoding


def step(tokens, cache):
    look_up = functools.reduce(lambda f, _: jax.vmap(f), tokens.shape[:-1], lambda table, token: table[token])
    return look_up(cache, tokens[..., 0])[..., None, :], cache


@pytest.mark.parametrize("drawn", [False, True])
@given(batch=batches, seed=seeds, n=st.sampled_from([1, 2, 3]))
def test_they_hold_in_greedy_decoding_and_in_sampling(drawn, batch, seed, n):
    table = jnp.asarray(np.random.default_rng(seed).standard_normal((*batch, V, V)), jnp.float32)
    first, forced = jnp.zeros(batch, jnp.int32), jnp.asarray([-1, 3], jnp.int32)
    rules = Constraints(no_repeat_ngram=n, min_length=4, banned=(5,), repetition_penalty=1.3)
    out = np.asarray(run(table, first, row_keys(jax.random.key(seed), batch), forced, rules=rules, drawn=drawn))
    for row in np.ndindex(batch):
        said = out[row].tolist()
        said = said[: said.index(EOS)] if EOS in said else said
        assert len(said) >= 4 or n == 1  # with n = 1 tokens run out
        assert said[1] == 3
        assert 5 not in said
        grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
        free = [gram for i, gram in enumerate(grams) if i + n - 1 != 1]  # what is forced may repeat
        assert len(set(free)) == len(free)
        assert set(out[row][len(said) + 1 :].tolist()) <= {PAD}


@functools.partial(jax.jit, static_argnames=("rules", "drawn"))
def run(table, first, keys, forced, *, rules, drawn):
    options = {"max_length": L, "constraints": rules, "forced": forced}
    if drawn:
        return sample(step, first, table, keys=keys, sampling=Sampling(), **options)
    return greedy(step, first, table, **options)


def test_a_forced_end_ends():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((2, V, V)), jnp.float32)
    forced = jnp.asarray([[3, EOS, 4], [3, 4, EOS]], jnp.int32)
    out = greedy(step, jnp.zeros(2, jnp.int32), table, max_length=4, forced=forced)
    assert out.tolist() == [[3, EOS, PAD, PAD], [3, 4, EOS, PAD]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite, got 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be above 0 and finite, got nan"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be above 0 and finite, got inf"),
        ({"repetition_penalty": -1.5}, "repetition_penalty must be above 0 and finite, got -1.5"),
        ({"min_length": -1}, "min_length must be an integer of at least 0, got -1"),
        ({"no_repeat_ngram": 2.0}, "no_repeat_ngram must be an integer of at least 0, got 2.0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be an integer of at least 0, got -1"),
        ({"min_length": 1.5}, "min_length must be an integer of at least 0, got 1.5"),
        ({"banned": [3]}, r"banned must be a tuple of token ids, integers of at least 0, got \[3\]"),
        ({"banned": (3.0,)}, r"banned must be a tuple of token ids, integers of at least 0, got \(3.0,\)"),
        ({"banned": (3, -3)}, r"banned must be a tuple of token ids, integers of at least 0, got \(3, -3\)"),
    ],
)
def test_rules_that_cannot_be_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        Constraints(**fields)


def drawn(step, first, cache, **options):
    keys = jax.random.split(jax.random.key(0), first.shape)
    return sample(step, first, cache, keys=keys, sampling=Sampling(), **options)


every_way = pytest.mark.parametrize("decode", [greedy, drawn, beam_search])


def decoded(decode, first=(0, 1), **options):
    """Two rows; the step of zeros knows V alone."""
    free = lambda tokens, cache: (jnp.zeros((*tokens.shape, V)), cache)
    return decode(free, jnp.asarray(first), jnp.zeros(2), **{"max_length": 3, **options})


@every_way
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"forced": [1.9]}, TypeError, "forced must be token ids, -1 for any token, got float32"),
        ({"forced": [1, V]}, ValueError, rf"vocabulary \[0, {V}\), or -1 for any token, got 1 to {V}"),
        ({"forced": [[-1, -2], [1, 1]]}, ValueError, "or -1 for any token, got -2 to 1"),
        ({"forced": [1] * 4}, ValueError, r"\(2, 'P'\) or \('P',\), P at most max_length 3, got \(4,\)"),
        ({"forced": [[1]] * 3}, ValueError, r"\(2, 'P'\) or \('P',\), P at most max_length 3, got \(3, 1\)"),
        ({"constraints": Constraints(banned=(99,))}, ValueError, rf"banned .* vocabulary \[0, {V}\), got 99"),
        ({"constraints": Constraints(min_length=4)}, ValueError, "min_length must be at most max_length 3, got 4"),
        ({"first": [1.9, 0]}, TypeError, "tokens must be integers, got float32"),
        ({"max_length": 2.7}, TypeError, "max_length must be an integer, got 2.7"),
    ],
)
def test_what_cannot_be_is_refused_in_every_way_of_decoding(decode, bad, error, message, untyped):
    with pytest.raises(error, match=message):
        decoded(decode, **{name: jnp.asarray(x) if name == "forced" else x for name, x in bad.items()})


@every_way
def test_the_last_that_can_be_is_taken_and_so_is_what_is_not_known(decode):
    """All ids of the vocabulary, as many as there are tokens; any others where only the program is made."""
    out = decoded(decode, forced=jnp.asarray([-1, 0, V - 1]), constraints=Constraints(banned=(V - 1,), min_length=3))
    assert jnp.ravel(out if decode is not beam_search else out.tokens).tolist()[1::3] == [0, 0]
    jax.eval_shape(lambda forced: decoded(decode, forced=forced), jnp.asarray([V, -2]))


def test_rules_are_given_by_name():
    with pytest.raises(TypeError):
        Constraints(1.5)
