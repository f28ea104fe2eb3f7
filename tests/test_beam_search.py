"""Laws of beam search, with toy steps in the place of a model."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.beam_search import Beams, beam_search, check_beams, highest, penalty
from core.constraints import Constraints
from core.decoding import EOS, PAD, greedy
from tests.strategies import seeds

V, L = 4, 3
LENGTH_PENALTIES = [0.6, 0.0, 1.0, -0.5]
batches = st.sampled_from([(3,), (), (2, 2)])
few = settings(max_examples=max(5, settings.default.max_examples // 3))


def table(seed, vocab=V, length=L, *, size=2.0):
    """Logits of the next token by the last one and how many came before: [V, L, V]."""
    return (size * np.random.default_rng(seed).standard_normal((vocab, length, vocab))).astype("float32")


def table_step(tokens, cache):
    """Every row carries its own table and all that came: a beam that is not reordered with its tokens goes astray."""

    def one(last, logits, path):
        count = (path >= 0).sum(dtype=jnp.int32)
        path = path.at[count].set(last)
        came = jnp.where(path >= 0, path, 0).sum(dtype=jnp.int32)
        return logits[(last + came) % len(logits), count], (logits, path)

    logits, cache = functools.reduce(lambda f, _: jax.vmap(f), tokens.shape[:-1], one)(tokens[..., 0], *cache)
    return logits[..., None, :], cache


def start(tables, first):
    batch = np.shape(first)
    tables = jnp.broadcast_to(jnp.asarray(tables), (*batch, *np.shape(tables)[-3:]))
    return tables, jnp.full((*batch, tables.shape[-2]), -1, jnp.int32)


@functools.partial(jax.jit, static_argnames=("max_length", "beam_size", "n_best", "length_penalty", "constraints"))
def search(tables, first, forced=None, **options):
    return beam_search(table_step, jnp.asarray(first), start(tables, first), forced=forced, **options)


def log_probs(logits, first, sequence):
    """The sum over a whole sequence, by the definition."""
    total, path, last = 0.0, [], int(first)
    for n, token in enumerate(sequence):
        path.append(last)
        row = np.float64(logits[(last + sum(path)) % len(logits), n])
        total += row[token] - math.log(np.exp(row - row.max()).sum()) - row.max()
        last = int(token)
    return total


def score(logits, first, sequence, length_penalty):
    return log_probs(logits, first, sequence) / ((5 + len(sequence)) / 6) ** length_penalty


def cut(row):
    """A sequence up to and with its end."""
    row = [int(token) for token in row]
    return tuple(row[: row.index(EOS) + 1] if EOS in row else row)


def slots(logits, first, *, max_length, beam_size, n_best, length_penalty):
    """The search of the docstring in plain Python, to the last token, without stopping early."""
    beam = [(0.0, (), False)]
    for _ in range(max_length):
        ended = [hypothesis for hypothesis in beam if hypothesis[2]]
        grown = [
            (log_probs(logits, first, (*sequence, token)), (*sequence, token), token == EOS)
            for _, sequence, end in beam
            if not end
            for token in range(len(logits))
        ]
        beam = ended + sorted(grown, key=lambda hypothesis: -hypothesis[0])[: beam_size - len(ended)]
    found = [(score(logits, first, sequence, length_penalty), sequence) for _, sequence, _ in beam]
    return sorted(found, key=lambda hypothesis: -hypothesis[0])[:n_best]


def firsts(batch, seed, vocab=V):
    return np.random.default_rng([seed, 1]).integers(0, vocab, batch).astype("int32")


def same(found, wanted, row):
    for (value, sequence), tokens, got in zip(wanted, found.tokens[row], found.scores[row], strict=False):
        assert cut(tokens) == sequence
        assert (tokens[len(sequence) :] == PAD).all()
        assert abs(got - value) < 1e-5
    for tokens, got in zip(found.tokens[row][len(wanted) :], found.scores[row][len(wanted) :], strict=True):
        assert got == -np.inf
        assert (tokens == PAD).all()


def as_numpy(found):
    return type(found)(*map(np.asarray, found))


@pytest.mark.parametrize("length_penalty", LENGTH_PENALTIES)
@few
@given(batch=batches, seed=seeds)
def test_a_beam_that_holds_all_is_exhaustive(length_penalty, batch, seed):
    logits, first = table(seed), firsts(batch, seed)
    found = as_numpy(search(logits, first, max_length=L, beam_size=V**L, n_best=5, length_penalty=length_penalty))
    everything = {cut(tokens) for tokens in itertools.product(range(V), repeat=L)}
    for row in np.ndindex(batch):
        wanted = sorted(((score(logits, first[row], s, length_penalty), s) for s in everything), reverse=True)[:5]
        same(found, wanted, row)


@pytest.mark.parametrize("length_penalty", LENGTH_PENALTIES)
@few
@given(batch=batches, seed=seeds, beam_size=st.sampled_from([2, 3]))
def test_a_narrow_beam_keeps_what_has_ended_and_stops_without_a_loss(length_penalty, batch, seed, beam_size):
    """The same n best as the plain search, which never stops early; rows end at different times."""
    vocab, length = 6, 6
    logits, first = table(seed, vocab, length), firsts(batch, seed, vocab)
    options = {"max_length": length, "beam_size": beam_size, "n_best": beam_size, "length_penalty": length_penalty}
    found = as_numpy(search(logits, first, **options))
    for row in np.ndindex(batch):
        same(found, slots(logits, first[row], **options), row)
    assert (np.diff(found.scores, axis=-1) <= 0).all()


@few
@given(batch=batches, seed=seeds, length_penalty=st.sampled_from(LENGTH_PENALTIES))
def test_one_beam_is_greedy_decoding(batch, seed, length_penalty):
    logits, first = table(seed, 6, 6), firsts(batch, seed, 6)
    found = search(logits, first, max_length=6, beam_size=1, length_penalty=length_penalty)
    wanted = jax.jit(lambda first: greedy(table_step, first, start(logits, first), max_length=6))(first)
    np.testing.assert_array_equal(found.tokens[..., 0, :], wanted)


@few
@given(seeds)
def test_one_beam_is_greedy_decoding_under_constraints_too(seed):
    logits, first = table(seed, 6, 6, size=0.5), firsts((3,), seed, 6).astype("uint8")
    rules = Constraints(repetition_penalty=1.7, no_repeat_ngram=2, min_length=2)
    found = search(logits, first, max_length=6, beam_size=1, constraints=rules)
    choose = jax.jit(lambda first: greedy(table_step, first, start(logits, first), max_length=6, constraints=rules))
    np.testing.assert_array_equal(found.tokens[..., 0, :], choose(first.astype("int32")))


@few
@given(seeds)
def test_a_batch_is_its_rows_one_by_one(seed):
    tables, first = np.stack([table(seed + i, 6, 6) for i in range(3)]), firsts((3,), seed, 6)
    options = {"max_length": 6, "beam_size": 3, "n_best": 2, "length_penalty": 0.6}
    together = as_numpy(search(tables, first, **options))
    for row in range(3):
        alone = as_numpy(search(tables[row : row + 1], first[row : row + 1], **options))
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-6)


@few
@given(seeds)
def test_each_row_may_be_forced_to_tokens_of_its_own(seed):
    tables, first = np.stack([table(seed + i, 6, 6) for i in range(3)]), firsts((3,), seed, 6)
    forced = np.int32([[4, -1], [-1, 5], [3, 3]])
    options = {"max_length": 6, "beam_size": 3, "n_best": 2}
    together = as_numpy(search(tables, first, jnp.asarray(forced), **options))
    for row in range(3):
        alone = as_numpy(search(tables[row : row + 1], first[row : row + 1], jnp.asarray(forced[row]), **options))
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
    assert (together.tokens[0, :, 0] == 4).all()
    assert (together.tokens[2, :, :2] == 3).all()


def test_four_slots_are_searched_and_the_best_is_given_unless_told_otherwise():
    tables, first = np.stack([table(i, 12, 8, size=0.5) for i in range(20)]), firsts((20,), 0, 12)
    found, *others = (
        as_numpy(search(tables, first, max_length=8, **options))
        for options in ({}, {"beam_size": 4, "n_best": 1, "length_penalty": 0.6}, {"beam_size": 3}, {"beam_size": 5})
    )
    equal = [np.array_equal(found.tokens, other.tokens) for other in others]
    assert equal == [True, False, False]


@pytest.mark.parametrize(
    ("going", "length_penalty", "wins"),
    [(-1.38, 0.6, True), (-1.5, 0.6, False), (-0.84, -1.0, False), (-0.9, -1.0, False)],
)
def test_what_goes_on_is_waited_for_as_long_as_it_may_win(going, length_penalty, wins):
    """One ends at once with log P = -1 and score -1; one goes on for certain: -1.38 at 6 tokens is -0.96.

    By a penalty of -1 it is best at 2 tokens, the next length: -0.84 becomes -0.98, and -0.9 becomes -1.05.
    """
    rest = math.log((1 - math.exp(-1) - math.exp(going)) / 2)
    begins = jnp.zeros(5).at[jnp.asarray([EOS, 3, 0, 4])].set(jnp.asarray([-1, going, rest, rest]))
    begins = begins.at[1].set(-jnp.inf)
    certain = jnp.where(jnp.arange(5) == 3, 0.0, -30.0)
    step = lambda tokens, cache: (jnp.where((tokens == 1)[..., None], begins, certain), cache + 1)
    steps = []

    def counted(tokens, cache):
        jax.debug.callback(lambda: steps.append(1))
        return step(tokens, cache)

    found = beam_search(
        counted, jnp.ones(1, jnp.int32), jnp.zeros(1), max_length=6, beam_size=2, length_penalty=length_penalty
    )
    jax.effects_barrier()
    assert found.tokens.tolist() == [[[3] * 6 if wins else [EOS, *[PAD] * 5]]]
    assert len(steps) == (6 if wins else 2 if going == -0.84 else 1)


@pytest.mark.parametrize(
    ("begins", "tokens", "taken"),
    [
        ([-np.inf, 0.0, 0.0, -np.inf], [[1] * 6], 6),  # of equals that in the first slot, for which one waits
        ([-np.inf, -np.inf, 0.0, -np.inf], [[EOS, *[PAD] * 5], [PAD] * 6], 1),  # nothing else is possible
        ([np.nan, 0.0, 0.0, 0.0], [[-1] * 6], 1),  # all is lost
        ([0.0, 0.0, -np.inf, -np.inf], [[-1] * 6], 2),  # by one of two
    ],
)
def test_a_search_takes_as_many_steps_as_could_change_it(begins, tokens, taken):
    certain, steps = jnp.where(jnp.arange(4) == 1, 0.0, -300.0), []

    def step(last, cache):
        jax.debug.callback(lambda: steps.append(1))
        then = jnp.where((last == 0)[..., None], jnp.nan, certain)
        return jnp.where((last == 3)[..., None], jnp.asarray(begins), then), cache

    options = {"max_length": 6, "beam_size": 2, "n_best": len(tokens), "length_penalty": 0.0}
    found = beam_search(step, jnp.full(1, 3), jnp.zeros(1), **options)
    jax.effects_barrier()
    assert (found.tokens.tolist(), len(steps)) == ([tokens], taken)


def test_the_cache_is_spread_as_one_is_told():
    logits, first = table(3), firsts((2,), 3)
    tables, path = start(logits, first)
    spread = lambda cache, size: jax.tree.map(lambda x: jnp.repeat(x[:, None], size, axis=1), (-cache[0], cache[1]))
    found = beam_search(table_step, jnp.asarray(first), (tables, path), max_length=L, spread=spread)
    wanted = search(-logits, first, max_length=L)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert not np.array_equal(found.tokens, search(logits, first, max_length=L).tokens)


@few
@given(batches, seeds, st.sampled_from([4, 24, 64, 130, 192, 640, 641]), st.integers(1, 4))
def test_the_highest_scores_are_those_of_a_full_sort(batch, seed, size, n):
    """With ties within blocks and across them, and where few are finite."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, rng.choice([2, 9, 10**6]), (*batch, size)).astype("float32")
    scores = np.where(rng.random(scores.shape) < rng.choice([0.0, 0.5, 0.99]), -np.inf, scores).astype("float32")
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :n].astype("int32")
    best, place = jax.jit(highest, static_argnums=1)(scores, n)
    np.testing.assert_array_equal(place, order, strict=True)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, order, axis=-1), strict=True)


@pytest.mark.parametrize(
    ("size", "looked_at"),
    [(4096, [64, 256]), (256, [256]), (130, [65, 8]), (641, [641])],
    ids=["blocks of 64", "as many blocks as are wanted", "blocks of 2", "a prime"],
)
def test_of_many_scores_a_few_blocks_are_looked_at(size, looked_at):
    program = jax.make_jaxpr(lambda scores: highest(scores, 4))(jnp.zeros((2, 3, size)))
    assert [e.invars[0].aval.shape[-1] for e in program.eqns if e.primitive.name == "top_k"] == looked_at


@pytest.mark.parametrize("nothing", [-np.inf, np.inf])
def test_where_a_step_allows_nothing_there_is_no_hypothesis(nothing):
    """Logits that are all -inf, or all inf, are no distribution, and not NaN either; here those of the second step."""
    logits, first = np.stack([table(i) for i in range(3)]), firsts((3,), 0)
    logits[..., 0, EOS] -= 9
    options = {"max_length": 2, "beam_size": 2, "n_best": 2}
    fine, shut = as_numpy(search(logits, first, **options)), logits.copy()
    shut[1, :, 1] = nothing
    found = as_numpy(search(shut, first, **options))
    assert (found.tokens[1] == PAD).all()
    assert (found.scores[1] == -np.inf).all()
    for row in (0, 2):
        np.testing.assert_array_equal(found.tokens[row], fine.tokens[row])


def test_ties_go_to_the_lowest_token():
    found = search(np.zeros((V, L, V), "float32"), firsts((2,), 0), max_length=1, beam_size=3, n_best=3)
    assert found.tokens[:, :, 0].tolist() == [[0, 1, 2]] * 2


def test_the_search_ends_when_nothing_can_come_among_the_best():
    """Counted by the step: the end is likely from the first, so one more token settles it."""
    calls = []

    def step(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return 9.0 * jax.nn.one_hot(jnp.full(tokens.shape, EOS), V), cache

    found = beam_search(step, jnp.zeros(2, jnp.int32), jnp.zeros(2), max_length=50, beam_size=2)
    jax.effects_barrier()
    assert (found.tokens[..., 0] == EOS).all()
    assert len(calls) == 1


@pytest.mark.parametrize("length_penalty", LENGTH_PENALTIES)
@few
@given(seeds, st.sampled_from([1, 2]))
def test_it_takes_as_many_steps_as_can_change_the_best(length_penalty, seed, n_best):
    calls, length, beam_size = [], 6, 3
    logits, first = table(seed, 6, length), firsts((2,), seed, 6)
    logits[..., EOS] += 1

    def step(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return table_step(tokens, cache)

    options = {"max_length": length, "beam_size": beam_size, "n_best": n_best, "length_penalty": length_penalty}
    beam_search(step, jnp.asarray(first), start(logits, first), **options)
    jax.effects_barrier()

    def settled(token, steps):
        held = slots(logits, token, **{**options, "max_length": steps, "n_best": beam_size})
        kept = [value for value, sequence in held if EOS in sequence]
        going = [log_probs(logits, token, sequence) for _, sequence in held if EOS not in sequence]
        lengths = range(steps + 1, length + 1)
        reach = [total / ((5 + n) / 6) ** length_penalty for total in going for n in lengths]
        return len(kept) >= n_best and max(reach, default=-np.inf) < kept[n_best - 1]

    wanted = max(next((n for n in range(length) if settled(token, n)), length) for token in first)
    assert len(calls) == wanted


@few
@given(batches, seeds)
def test_the_cache_goes_by_the_select_that_is_given(batch, seed):
    logits, first = table(seed), firsts(batch, seed)

    def select(cache, parents):
        seen.append(parents.shape)
        chosen = jax.nn.one_hot(parents, 3, dtype=bool)
        axes = lambda x: (*chosen.shape, *(1,) * (x.ndim - len(batch) - 1))
        mix = lambda x: jnp.where(chosen.reshape(axes(x)), jnp.expand_dims(x, len(batch)), 0).sum(len(batch) + 1)
        return jax.tree.map(lambda x: mix(x).astype(x.dtype), cache)

    seen, options = [], {"max_length": L, "beam_size": 3, "n_best": 3}
    found = beam_search(table_step, jnp.asarray(first), start(logits, first), select=select, **options)
    assert set(seen) == {(*batch, 3)}
    wanted = search(logits, first, **options)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-6)


def test_a_row_of_nan_is_minus_one_and_the_others_are_what_they_were():
    logits, first = np.stack([table(i) for i in range(3)]), firsts((3,), 0)
    options = {"max_length": L, "beam_size": 2, "n_best": 2}
    fine, bad = as_numpy(search(logits, first, **options)), logits.copy()
    bad[1, :, 1, 0] = np.nan
    found = as_numpy(search(bad, first, **options))
    assert (found.tokens[1] == -1).all()
    assert np.isnan(found.scores[1]).all()
    for row in (0, 2):
        np.testing.assert_array_equal(found.tokens[row], fine.tokens[row])
        np.testing.assert_array_equal(found.scores[row], fine.scores[row])


@pytest.mark.parametrize("pad_id", [PAD, 9])
def test_nan_behind_padding_is_not_met(pad_id):
    """Slots that have ended are fed padding; others hold nothing, since too few tokens are allowed."""

    def step(tokens, cache):
        likely = jnp.broadcast_to(jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.4])), (*tokens.shape, V))
        return jnp.where((tokens == pad_id)[..., None], jnp.nan, likely), cache

    options = {
        "max_length": L,
        "beam_size": 6,
        "n_best": 6,
        "constraints": Constraints(banned=(0, 1)),
        "pad_id": pad_id,
    }
    found = as_numpy(beam_search(step, jnp.ones(2, jnp.int32), jnp.zeros(2), **options))
    assert np.isfinite(found.scores[:, :4]).all()
    assert (found.scores[:, 4:] == -np.inf).all()
    assert (found.tokens[:, 4:] == pad_id).all()


@few
@given(batches, seeds)
def test_padding_may_be_the_end(batch, seed):
    logits, first = table(seed), firsts(batch, seed)
    options = {"max_length": L, "beam_size": 7, "n_best": 7}
    found = as_numpy(beam_search(table_step, jnp.asarray(first), start(logits, first), pad_id=EOS, **options))
    for row in np.ndindex(batch):
        wanted = slots(logits, first[row], length_penalty=0.6, **options)
        assert [cut(tokens) for tokens in found.tokens[row]] == [sequence for _, sequence in wanted]
        np.testing.assert_allclose(found.scores[row], [value for value, _ in wanted], atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scores_of_narrow_models_are_exact_sums(dtype, wide):
    with jax.enable_x64(wide):
        logits, first = jnp.asarray(table(3), dtype), firsts((2,), 0)
        found = as_numpy(search(logits, first, max_length=L, beam_size=3))
        assert found.scores.dtype == np.float32
        logits = np.asarray(logits, "float64")
    for row in range(2):
        value = score(logits, first[row], cut(found.tokens[row, 0]), 0.6)
        np.testing.assert_allclose(found.scores[row, 0], value, rtol=1e-5)


@few
@given(seeds)
def test_constraints_hold_and_the_scores_are_still_those_of_the_model(seed):
    logits, first = table(seed, 6, 6), firsts((3,), seed, 6)
    rules = Constraints(no_repeat_ngram=1, min_length=3, banned=(5,))
    found = as_numpy(
        search(logits, first, jnp.asarray([-1, 4]), max_length=6, beam_size=3, n_best=3, constraints=rules)
    )
    for row, i in np.ndindex(3, 3):
        sequence = cut(found.tokens[row, i])
        if found.scores[row, i] == -np.inf:
            assert (found.tokens[row, i] == PAD).all()
            continue
        assert sequence[1] == 4  # what is forced may come twice
        assert len({*sequence[:1], *sequence[2:]}) == len(sequence) - 1
        assert len(sequence) >= 4
        assert 5 not in sequence
        assert abs(found.scores[row, i] - score(logits, first[row], sequence, 0.6)) < 1e-5


def test_scores_of_wide_models_are_wide(x64):
    logits, first = table(0).astype("float64"), firsts((2,), 0)
    found = search(logits, first, max_length=L, beam_size=3)
    assert found.scores.dtype == jnp.float64
    for row in range(2):
        wanted = score(logits, first[row], cut(np.asarray(found.tokens[row, 0])), 0.6)
        np.testing.assert_allclose(found.scores[row, 0], wanted, rtol=1e-12)


def test_nothing_to_say_has_no_length():
    found = search(table(0), firsts((2,), 0), max_length=0, beam_size=3, n_best=2)
    assert found.tokens.shape == (2, 2, 0)
    assert found.scores.tolist() == [[0.0, -np.inf]] * 2


def test_the_penalty_is_that_of_the_paper():
    np.testing.assert_allclose(penalty(jnp.float32([1, 7]), 0.5), [1.0, 2**0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("beams", "message"),
    [
        ((0, 1, 0.6), "beam_size must be at least 1, got 0"),
        ((3, 4, 0.6), r"n_best must lie in \[1, beam_size 3\], got 4"),
        ((3, 0, 0.6), r"n_best must lie in \[1, beam_size 3\], got 0"),
        ((3, 1, float("nan")), "length_penalty must be finite, got nan"),
        ((3, 1, float("-inf")), "length_penalty must be finite, got -inf"),
    ],
)
def test_a_search_that_cannot_be_is_refused(beams, message, untyped):
    with pytest.raises(ValueError, match=message):
        check_beams(Beams(*beams))
    with pytest.raises(ValueError, match=message):
        search(table(0), firsts((2,), 0), max_length=2, **Beams(*beams)._asdict())


def test_a_negative_length_is_refused(untyped):
    with pytest.raises(ValueError, match="max_length must be at least 0, got -1"):
        beam_search(table_step, jnp.zeros(2, jnp.int32), start(table(0), np.zeros(2)), max_length=-1)
