"""Laws of generation, with toy steps in the place of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.attention import dot_product_attention
from core.cache import KVCache, cached_attention, empty_slots
from core.constraints import FREE, Constraints
from core.decoding import (
    BOS,
    EOS,
    PAD,
    Rules,
    check_generation,
    greedy,
    next_tokens,
    prefill,
    prompt_lengths,
    sample,
    until_end,
    whole,
)
from core.sampling import Sampling, draw, row_keys
from tests.strategies import seeds

V, L = 6, 8
batches = st.sampled_from([(3,), (), (2, 2)])


def table(seed):
    """Logits of the next token by the last one and how many came before: [V, L, V]."""
    return np.random.default_rng(seed).standard_normal((V, L, V)).astype("float32")


def table_step(tokens, cache):
    """The cache counts the calls, row by row, and carries the table."""
    logits, count = cache
    return logits[tokens, count[..., None]], (logits, count + 1)


def start(logits, first):
    return jnp.asarray(logits), jnp.zeros(np.shape(first), jnp.int32)


@functools.partial(jax.jit, static_argnames=("max_length", "eos_id", "pad_id", "constraints"))
def generate(logits, first, **options):
    return greedy(table_step, first, start(logits, first), **options)


def expected(logits, first, *, max_length=L, eos_id=EOS, pad_id=PAD):
    """One row, token by token."""
    out, last = [], first
    for count in range(max_length):
        last = int(np.argmax(logits[last, count]))
        out.append(last)
        if last == eos_id:
            break
    return out + [pad_id] * (max_length - len(out))


def firsts(batch, seed):
    return np.random.default_rng([seed, 1]).integers(0, V, batch).astype("int32")


@given(batches, seeds, st.sampled_from([{}, {"max_length": 3}, {"max_length": 0}, {"eos_id": 4, "pad_id": 5}]))
def test_each_token_is_the_likeliest_until_the_end_and_padding_follows(batch, seed, options):
    """A batch gives what its rows give one by one, whenever each of them ends."""
    options = {"max_length": L} | options
    logits, first = table(seed), firsts(batch, seed)
    out = np.asarray(generate(logits, first, **options))
    assert out.shape == (*batch, options["max_length"])
    assert out.dtype == np.int32
    for row in np.ndindex(batch):
        assert out[row].tolist() == expected(logits, first[row], **options)


@functools.partial(jax.jit, static_argnames="sampling")
def generate_drawn(logits, first, keys, sampling):
    return sample(table_step, first, start(logits, first), keys=keys, sampling=sampling, max_length=L, eos_id=-7)


@functools.partial(jax.jit, static_argnames="sampling")
def drawn_one_by_one(logits, key, sampling):
    keys = jax.vmap(lambda t: jax.random.fold_in(key, t))(jnp.arange(L))
    return draw(logits, keys, sampling)


@given(st.sampled_from([(3,), (2, 2)]), seeds)
def test_token_t_of_a_row_is_drawn_with_its_key_folded_with_t(batch, seed):
    logits, first, keys = table(seed), firsts(batch, seed), row_keys(jax.random.key(seed), batch)
    out = np.asarray(generate_drawn(logits, first, keys, Sampling(top_k=4)))
    for row in np.ndindex(batch):
        before = [first[row], *out[row][:-1]]
        wanted = drawn_one_by_one(logits[before, np.arange(L)], keys[row], Sampling(top_k=4))
        np.testing.assert_array_equal(out[row], wanted)


def test_a_penalty_is_for_tokens_that_came_and_not_for_the_padding_ahead():
    logits = np.full((V, L, V), [2.0, 1.9, 0, 0, 0, 0], "float32")
    assert PAD == 0
    out = generate(logits, firsts((3,), 0), max_length=2, constraints=Constraints(repetition_penalty=2.0))
    assert out.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("batch", [(3,), (), (2, 2)])
def test_jit_changes_no_token(batch):
    logits, first = table(0), firsts(batch, 0)
    eager = greedy(table_step, jnp.asarray(first), start(logits, first), max_length=L)
    np.testing.assert_array_equal(generate(logits, first, max_length=L), eager, strict=True)


@given(seeds, st.integers(0, V - 1))
def test_ties_go_to_the_lowest_id(seed, lowest):
    tied = np.random.default_rng(seed).random((V, L, V)) < 0.5
    tied[..., lowest] = True
    tied[..., :lowest] = False
    out = generate(np.where(tied, 2.5, table(seed) - 9).astype("float32"), firsts((3,), seed), max_length=2, eos_id=-7)
    assert (np.asarray(out) == lowest).all()


@pytest.mark.parametrize(("batch", "steps"), [((3,), 8), ((2, 2), 2), ((), 1)])
def test_the_loop_ends_when_all_rows_have_ended(batch, steps):
    """Counted by the step itself: row r ends after r + 1 tokens, at most `steps`."""
    calls = []

    def step(tokens, count):
        jax.debug.callback(lambda: calls.append(1))
        ends = count + 1 >= last
        return jnp.where(ends, jax.nn.one_hot(EOS, V), jax.nn.one_hot(5, V))[..., None, :], count + 1

    first = jnp.zeros(batch, jnp.int32)
    last = jnp.minimum(jnp.arange(first.size).reshape(*batch, 1) + 1, steps)
    out = greedy(step, first, jnp.int32(0), max_length=L)
    jax.effects_barrier()
    assert len(calls) == min(max(first.size, 1), steps)
    assert ((out == EOS).sum(-1) == 1).all()


def test_the_ids_that_are_assumed():
    """Vocabularies and weights in files depend on them."""
    assert (PAD, BOS, EOS) == (0, 1, 2)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint16"])
def test_tokens_of_any_integer_type_give_int32(dtype, x64):
    logits, first = table(0), firsts((3,), 0)
    out = greedy(table_step, jnp.asarray(first, dtype), start(logits, first), max_length=L)
    assert out.tolist() == [expected(logits, token) for token in first]
    assert out.dtype == jnp.int32


def test_one_nan_among_the_logits_is_enough():
    logits, first = table(0), np.array([3, 4], "int32")
    logits[3, 0, 2] = np.nan
    out = generate(logits, first, max_length=1)
    assert out.tolist() == [[-1], expected(logits, 4, max_length=1)]


@pytest.mark.parametrize("bad", range(3))
def test_a_row_of_nan_gets_minus_one_and_the_others_their_tokens(bad):
    logits, first = table(0), jnp.asarray([3, 4, 5], jnp.int32)
    poison = lambda tokens, cache: (
        jnp.where((jnp.arange(3) == bad)[:, None, None], jnp.nan, table_step(tokens, cache)[0]),
        table_step(tokens, cache)[1],
    )
    out = greedy(poison, first, start(logits, first), max_length=L, eos_id=-7)
    fine = generate(logits, first, max_length=L, eos_id=-7)
    for row in range(3):
        np.testing.assert_array_equal(out[row], jnp.full(L, -1) if row == bad else fine[row])


D = 4


def attention_step(tokens, state):
    """One layer of attention between a table and its transpose."""
    embedding, cache = state
    x = embedding[tokens]
    heads = x[..., None, :]
    out, cache = cached_attention(heads, heads, -heads[..., ::-1], cache)
    return (x + out[..., 0, :]) @ embedding.T, (embedding, cache)


@jax.jit
def full_logits(embedding, sequence):
    x = embedding[sequence]
    heads = x[..., None, :]
    out = dot_product_attention(heads, heads, -heads[..., ::-1], causal=True)
    return (x + out[..., 0, :]) @ embedding.T


@functools.partial(jax.jit, static_argnums=(3, 4))
def generate_cached(embedding, first, lengths, capacity, steps):
    cache = KVCache(empty_slots(first.shape, capacity, 1, D, jnp.float32), lengths)
    return greedy(attention_step, first, (embedding, cache), max_length=steps, eos_id=-7)


@given(st.sampled_from([(2,), (2, 2)]), seeds)
def test_cached_steps_choose_what_the_whole_sequence_would(batch, seed):
    embedding = np.random.default_rng(seed).standard_normal((V, D)).astype("float32")
    first, steps = firsts(batch, seed), 4
    out = np.asarray(generate_cached(embedding, first, np.zeros(batch, "int32"), steps, steps))
    logits = np.asarray(full_logits(embedding, np.concatenate([first[..., None], out[..., :-1]], axis=-1)))
    chosen = np.take_along_axis(logits, out[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, logits.max(-1), rtol=0, atol=1e-4)


def test_a_cache_that_overflows_ends_in_minus_one():
    embedding = np.random.default_rng(0).standard_normal((V, D)).astype("float32")
    out = generate_cached(embedding, np.array([3, 4], "int32"), np.array([0, 2], "int32"), 3, 4)
    np.testing.assert_array_equal(np.asarray(out) == -1, [[False, False, False, True], [False, True, True, True]])


def test_a_negative_length_is_refused(untyped):
    with pytest.raises(ValueError, match="max_length must be at least 0, got -1"):
        generate(table(0), firsts((2,), 0), max_length=-1)


def rules(**changes):
    return Rules(**{"max_length": 3, "constraints": FREE, "eos_id": EOS, "pad_id": PAD, **changes})


@pytest.mark.parametrize("max_length", [0, 1, 7])
def test_a_generation_may_have_any_length_and_any_ids_of_its_vocabulary(max_length):
    forced = jnp.full((2, max_length), V - 1)
    check_generation(V, (2,), rules(max_length=max_length, eos_id=0, pad_id=V - 1), forced=forced)
    check_generation(V, (2,), rules(max_length=max_length), forced=-jnp.ones(max_length, jnp.int32))


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"max_length": -1}, {}, "max_length must be at least 0, got -1"),
        ({"eos_id": -1}, {}, rf"eos_id must lie in the target vocabulary \[0, {V}\), got -1"),
        ({"pad_id": V}, {}, rf"pad_id must lie in the target vocabulary \[0, {V}\), got {V}"),
        ({}, {"bos_id": V + 1}, rf"bos_id must lie in the target vocabulary \[0, {V}\), got {V + 1}"),
        ({"constraints": Constraints(banned=(1, V))}, {}, rf"banned must lie in the target vocabulary .*, got {V}"),
        ({"constraints": Constraints(min_length=4)}, {}, "min_length must be at most max_length 3, got 4"),
        ({}, {"forced": jnp.ones((2, 4), jnp.int32)}, r"forced must have the shape \(2, 'P'\) or .*got \(2, 4\)"),
        ({}, {"forced": jnp.ones((3, 2), jnp.int32)}, r"P at most max_length 3, got \(3, 2\)"),
        ({}, {"forced": jnp.int32(1)}, r"forced must have the shape .*got \(\)"),
        ({}, {"forced": jnp.asarray([1, V])}, rf"vocabulary \[0, {V}\), or -1 for any token, got 1 to {V}"),
        ({}, {"forced": jnp.asarray([-2, 1])}, "or -1 for any token, got -2 to 1"),
    ],
)
def test_a_generation_that_cannot_be_is_refused(changes, more, message, untyped):
    with pytest.raises(ValueError, match=message):
        check_generation(V, (2,), rules(**changes), **more)


def test_ids_are_integers(untyped):
    with pytest.raises(TypeError, match=r"eos_id must be an integer, got 1\.5"):
        check_generation(V, (2,), rules(eos_id=1.5))


def test_forced_tokens_are_integers(untyped):
    with pytest.raises(TypeError, match="forced must be token ids, -1 for any token, got float32"):
        check_generation(V, (2,), rules(), forced=jnp.ones(2))


@given(st.sampled_from([(2,), (), (2, 2)]), seeds, st.sampled_from([None, 1, 2, 3, 4, 5, 9]))
def test_a_prompt_may_be_read_in_chunks_of_any_size(batch, seed, chunk):
    """What grows here is the list of real tokens itself."""
    rng = np.random.default_rng(seed)
    tokens, lengths = rng.integers(0, 9, (*batch, 5)).astype("int32"), rng.integers(0, 6, batch).astype("int32")
    seen = np.zeros((*batch, 0), "int32")

    def grow(part, cache, count):
        real = np.where(np.arange(part.shape[-1]) < np.asarray(count)[..., None], part, -1)
        return np.concatenate([cache, real], axis=-1)

    found = prefill(grow, jnp.asarray(tokens), seen, lengths=jnp.asarray(lengths), chunk=chunk)
    np.testing.assert_array_equal(found, np.where(np.arange(5) < lengths[..., None], tokens, -1))


@pytest.mark.parametrize("chunk", [None, 2])
def test_no_prompt_leaves_the_cache_as_it_is(chunk):
    nothing, lengths = jnp.zeros((2, 0), jnp.int32), jnp.zeros(2, jnp.int32)
    assert prefill(lambda *_: "another", nothing, "cache", lengths=lengths, chunk=chunk) == "cache"


@pytest.mark.parametrize("chunk", [0, -1, 1.5])
def test_a_chunk_holds_a_token_at_least(chunk, untyped):
    with pytest.raises(ValueError, match="prefill_chunk must be an integer of at least 1, got"):
        prefill(None, jnp.zeros((2, 3), jnp.int32), None, lengths=jnp.zeros(2, jnp.int32), chunk=chunk)


def test_a_target_is_predicted_from_what_stands_before_it():
    target = jnp.asarray([[3, 4, 5], [6, 7, 8]], jnp.int32)
    for dtype in ("int8", "int32"):
        found = next_tokens(jnp.asarray([1, 2], jnp.int32), target.astype(dtype))
        np.testing.assert_array_equal(found, np.array([[1, 3, 4], [2, 6, 7]], dtype), strict=True)


def test_a_row_goes_up_to_its_first_end():
    tokens = jnp.asarray([[3, EOS, EOS, 0], [3, 4, 5, 6], [EOS, 1, 1, 1]], jnp.int32)
    assert until_end(tokens, EOS).sum(-1).tolist() == [2, 4, 1]
    assert until_end(tokens, EOS)[0].tolist() == [True, True, False, False]


@given(st.sampled_from([(3, 4), (4,), (2, 2, 4)]), seeds)
def test_prompt_lengths_count_the_real_tokens(size, seed):
    lengths = np.random.default_rng(seed).integers(1, size[-1] + 1, size[:-1]).astype("int32")
    mask, prompt = jnp.asarray(np.arange(size[-1]) < lengths[..., None]), jnp.zeros(size, jnp.int32)
    np.testing.assert_array_equal(prompt_lengths(mask, prompt), lengths, strict=True)
    np.testing.assert_array_equal(jax.jit(prompt_lengths)(mask, prompt), lengths, strict=True)
    assert (np.asarray(prompt_lengths(None, prompt)) == size[-1]).all()


def test_prompt_lengths_are_int32_where_numbers_are_wide(x64):
    assert prompt_lengths(None, jnp.zeros((2, 3), jnp.int32)).dtype == jnp.int32


@pytest.mark.parametrize("row", [[False, True, True], [True, False, True], [False, False, False]])
def test_a_prompt_has_its_real_tokens_first_and_at_least_one(row):
    mask = jnp.asarray([[True, True, False], row])
    with pytest.raises(ValueError, match="each row of a prompt needs its real tokens first, at least one, then"):
        prompt_lengths(mask, jnp.zeros((2, 3), jnp.int32))


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="each row of a prompt needs its real tokens first, at least one, then"):
        prompt_lengths(None, jnp.zeros((2, 0), jnp.int32))


@pytest.mark.parametrize("number", [2.7, 2.0, "2", None])
def test_what_is_no_integer_is_not_cut_to_one(number):
    with pytest.raises(TypeError, match=f"max_length must be an integer, got {number!r}"):
        whole("max_length", number)


@pytest.mark.parametrize("dtype", [int, np.int8, np.int64, np.uint32])
def test_integers_of_any_type_are_integers(dtype):
    assert type(whole("max_length", dtype(3))) is int
    assert whole("max_length", dtype(3)) == 3


@pytest.mark.parametrize("mask", [np.ones((2, 3), "int32"), np.ones((2, 4), bool), np.ones(3, bool)])
def test_the_mask_of_a_prompt_is_bool_and_of_its_shape(mask, untyped):
    message = (
        rf"prompt's mask must be bool and of its shape \(2, 3\), got {mask.dtype} \({', '.join(map(str, mask.shape))}"
    )
    with pytest.raises(ValueError, match=message):
        prompt_lengths(jnp.asarray(mask), jnp.zeros((2, 3), jnp.int32))
