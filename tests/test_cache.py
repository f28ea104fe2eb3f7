"""Laws of the cache: what is decoded step by step is what the whole would give."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import cache as cache_module
from core.attention import dot_product_attention
from core.cache import (
    DecoderCache,
    KeysValues,
    KVCache,
    Slots,
    append,
    as_slots,
    cached_attention,
    empty_slots,
    select_beams,
    slot_attention,
    spread_beams,
)
from core.masks import Padding
from core.relative import T5, ALiBi, Shaw, TransformerXL
from tests.strategies import AttentionShape, floats, qkv, seeds
from tests.test_attention import precision_of

SHAPES = [AttentionShape((2,), 6, 6, 2, 2, 4, 4), AttentionShape((2, 3), 6, 6, 4, 2, 2, 2)]
shapes = st.sampled_from(SHAPES)
attend = jax.jit(cached_attention)
causal = jax.jit(functools.partial(dot_product_attention, causal=True))
exactly = functools.partial(np.testing.assert_array_equal, strict=True)


def filled(shape, capacity, lengths, k, v, junk=0.0):
    """A cache whose row b holds the first lengths[b] tokens of k and v, and junk behind them."""
    used = (np.arange(capacity) < np.asarray(lengths)[..., None])[..., None, None]
    rows = [np.where(used, x[..., :capacity, :, :], np.float32(junk)) for x in (k, v)]
    return KVCache(as_slots(KeysValues(*map(jnp.asarray, rows))), jnp.asarray(lengths, jnp.int32))


def by_position(cache):
    """k and v of all slots, `[*B, S, K, H]`."""
    return [np.asarray(x).swapaxes(-2, -3) for x in cache.slots]


def empty(shape, capacity, dtype=jnp.float32):
    slots = empty_slots(shape.batch, capacity, shape.K, shape.H, dtype)
    return KVCache(slots, jnp.zeros(shape.batch, jnp.int32))


def chunk(arrays, starts, size):
    """`size` tokens of each row, from its own start."""
    index = (np.asarray(starts)[..., None] + np.arange(size))[..., None, None]
    return [np.take_along_axis(x, index, axis=-3) for x in arrays]


def tokens(shape, seed, dtype="float32"):
    return qkv(shape, seed, dtype)


@given(shapes, seeds, st.sampled_from([[6], [1] * 6, [2, 2, 2], [4, 1, 1], [1, 4, 1]]), floats)
def test_chunks_of_any_size_are_full_causal_attention(shape, seed, sizes, dtype):
    """In 16 bits too all is computed in float32, and rounded once."""
    arrays = tokens(shape, seed, dtype)
    with precision_of(*arrays):
        whole, cache, start = causal(*arrays), empty(shape, 6, arrays[0].dtype), 0
        last = float(jnp.finfo(dtype).eps) if arrays[0].itemsize == 2 else 0.0
        for size in sizes:
            out, cache = attend(*chunk(arrays, np.full(shape.batch, start), size), cache)
            wanted = np.asarray(whole[..., start : start + size, :, :], "float64")
            near = 1e-12 if dtype == "float64" else 2e-5
            np.testing.assert_allclose(np.asarray(out, "float64"), wanted, rtol=last, atol=near)
            start += size
    exactly(np.asarray(cache.length), np.full(shape.batch, 6, "int32"))
    for slots, x in zip(by_position(cache), arrays[1:], strict=True):
        exactly(np.asarray(slots), x)


def learned(seed, *shape):
    return jnp.asarray(np.random.default_rng([seed, 5]).standard_normal(shape))


RULES = {
    "window": lambda seed: {"window": (2, 0)},
    "capped": lambda seed: {"soft_cap": 1.5, "scale": 0.7, "sinks": learned(seed, 4)},
    "alibi": lambda seed: {"relative": ALiBi()},
    "t5": lambda seed: {"relative": T5(learned(seed, 4, 4), bidirectional=False, max_distance=3)},
    "shaw": lambda seed: {"relative": Shaw(learned(seed, 5, 2), learned(seed + 1, 5, 2))},
    "transformer_xl": lambda seed: {
        "relative": TransformerXL(learned(seed, 4, 2), learned(seed + 1, 6, 8), learned(seed + 2, 4, 2))
    },
}
rules_attend = eqx.filter_jit(cached_attention)
rules_causal = eqx.filter_jit(functools.partial(dot_product_attention, causal=True))


@pytest.mark.parametrize("name", RULES)
@given(seed=seeds)
@settings(max_examples=max(2, settings.default.max_examples // 5))
def test_every_rule_goes_by_the_position_in_the_cache(name, seed):
    shape, rules = SHAPES[1], RULES[name]
    with jax.enable_x64(True):
        rules, arrays = rules(seed), [np.float64(x) for x in tokens(shape, seed)]
        lengths = np.random.default_rng(seed).integers(0, 5, shape.batch)
        slots = [np.where((np.arange(6) < lengths[..., None])[..., None, None], x, np.nan) for x in arrays[1:]]
        cache = KVCache(as_slots(KeysValues(*map(jnp.asarray, slots))), jnp.asarray(lengths, jnp.int32))
        out, _ = rules_attend(*chunk(arrays, lengths, 2), cache, **rules)
        wanted = chunk([np.asarray(rules_causal(*arrays, **rules))], lengths, 2)[0]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-12)


@given(seeds, st.sampled_from([0.0, np.nan]))
def test_the_first_tokens_of_a_row_see_each_other_with_a_prefix(seed, junk):
    """And nothing of the slots that are not filled yet, though the prefix reaches into them."""
    shape = SHAPES[0]
    arrays, prefix = tokens(shape, seed), jnp.asarray([3, 5], jnp.int32)
    cache = filled(shape, 6, [0, 0], *arrays[1:], junk=junk)
    out, cache = prefix_attend(*chunk(arrays, [0, 0], 4), cache, prefix=prefix)
    ahead = np.arange(4)[None, :] - np.arange(4)[:, None]
    mask = (ahead <= 0) | (np.arange(4) < np.asarray(prefix)[:, None, None])
    wanted = masked(*chunk(arrays, [0, 0], 4), mask=mask[:, None])
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5)
    out, _ = prefix_attend(*chunk(arrays, [4, 4], 1), cache, prefix=prefix)
    wanted = causal(*arrays)[:, 4:5]  # the last of all sees the same with and without
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5)


prefix_attend = jax.jit(cached_attention)
masked = jax.jit(dot_product_attention)


@given(shapes, seeds, st.integers(1, 3))
def test_rows_may_hold_different_numbers_of_tokens(shape, seed, size):
    arrays = tokens(shape, seed)
    lengths = np.random.default_rng(seed).integers(0, 7 - size, shape.batch)
    out, cache = attend(*chunk(arrays, lengths, size), filled(shape, 6, lengths, *arrays[1:]))
    wanted = chunk([np.asarray(causal(*arrays))], lengths, size)[0]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5)
    exactly(np.asarray(cache.length), (lengths + size).astype("int32"))
    used = np.arange(6) < (lengths + size)[..., None]
    for slots, x in zip(by_position(cache), arrays[1:], strict=True):
        exactly(np.asarray(slots)[used], x[used])
        assert (np.asarray(slots)[~used] == 0).all()


@given(shapes, seeds, st.sampled_from([np.nan, np.inf, -np.inf, 1e38]))
def test_what_lies_in_unused_slots_changes_nothing(shape, seed, junk):
    arrays = tokens(shape, seed)
    lengths = np.random.default_rng(seed).integers(0, 5, shape.batch)
    new = chunk(arrays, lengths, 2)
    clean, _ = attend(*new, filled(shape, 6, lengths, *arrays[1:]))
    foul, cache = attend(*new, filled(shape, 6, lengths, *arrays[1:], junk=junk))
    exactly(np.asarray(foul), np.asarray(clean))
    unused = np.arange(6) >= (lengths + 2)[..., None]
    assert not np.isfinite(by_position(cache)[1][unused]).any() or junk == 1e38


@given(shapes, seeds)
def test_spare_capacity_changes_nothing(shape, seed):
    arrays = tokens(shape, seed)
    new = chunk(arrays, np.zeros(shape.batch, int), 2)
    np.testing.assert_allclose(attend(*new, empty(shape, 6))[0], attend(*new, empty(shape, 2))[0], rtol=0, atol=2e-5)


@given(shapes, seeds, st.sampled_from([(5, 2), (6, 1), (0, 7), (3, 4)]))
def test_an_overflow_raises_where_it_is_known(shape, seed, sizes):
    """One full row is enough."""
    have, more = sizes
    lengths = np.zeros(shape.batch, int)
    lengths.flat[-1] = have
    arrays = tokens(shape._replace(T=7, S=7), seed)
    cache = filled(shape, 6, lengths, *arrays[1:])
    new = [jnp.asarray(x) for x in chunk(arrays, np.zeros(shape.batch, int), more)]
    message = f"the cache holds 6 tokens a row, {have} are there and {more} more came; make it with a larger max_length"
    for update in (lambda: append(cache, *new[1:]), lambda: cached_attention(*new, cache)):
        with pytest.raises(ValueError, match=message):
            update()


def test_a_chunk_longer_than_the_cache_raises_under_jit_too():
    arrays = tokens(SHAPES[0]._replace(T=7, S=7), 0)
    with pytest.raises(ValueError, match="holds 6 tokens a row, 0 are there and 7 more came"):
        attend(*arrays, empty(SHAPES[0], 6))


@given(shapes, seeds, st.integers(1, 2))
def test_an_overflow_under_jit_poisons_its_row_for_good_and_no_other(shape, seed, size):
    arrays = tokens(shape, seed)
    lengths = np.full(shape.batch, 1)
    lengths.flat[0] = 6
    over = lengths == 6
    cache = filled(shape, 6, lengths, *arrays[1:])
    roomy = filled(shape, 6, np.where(over, 0, lengths), *arrays[1:])
    for step in range(2):
        new = chunk(arrays, np.full(shape.batch, step), size)
        (out, cache), (fine, roomy) = attend(*new, cache), attend(*new, roomy)
        assert np.isnan(np.asarray(out)[over]).all()
        exactly(np.asarray(out)[~over], np.asarray(fine)[~over])
    assert (np.asarray(cache.length) == lengths + 2 * size).all()
    exactly(by_position(cache)[0][over], arrays[1][over])  # nothing is overwritten


@given(seeds)
def test_rows_of_a_cache_are_independent(seed):
    shape = SHAPES[0]
    arrays, lengths = tokens(shape, seed), np.array([3, 1])
    new, other = (chunk(tokens(shape, s), lengths, 1) for s in (seed, seed + 1))
    out, cache = attend(*new, filled(shape, 6, lengths, *arrays[1:]))
    mixed = [np.stack([x[0], y[1]]) for x, y in zip(new, other, strict=True)]
    out_mixed, cache_mixed = attend(*mixed, filled(shape, 6, lengths, *arrays[1:]))
    for one, two in zip(jax.tree.leaves((out, cache)), jax.tree.leaves((out_mixed, cache_mixed)), strict=True):
        exactly(np.asarray(one)[0], np.asarray(two)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_empty_cache_has_room_for_its_capacity(dtype):
    slots = empty_slots((2, 3), 5, 4, 8, dtype)
    assert [x.shape for x in slots] == [(2, 3, 4, 5, 8)] * 2
    assert all(x.dtype == dtype for x in slots)
    assert not any(x.any() for x in slots)


def test_values_may_be_of_another_width_than_keys():
    slots = empty_slots((2,), 5, 4, 8, jnp.float32, value_width=3)
    assert [x.shape for x in slots] == [(2, 4, 5, 8), (2, 4, 5, 3)]


@given(seeds)
def test_a_mask_hides_slots_of_the_cache(seed):
    shape = SHAPES[0]
    arrays = tokens(shape, seed)
    shown = np.random.default_rng(seed).random((*shape.batch, 1, 2, 6)) < 0.6
    cache = filled(shape, 6, [4, 4], *arrays[1:])
    out, _ = rules_attend(*chunk(arrays, [4, 4], 2), cache, mask=jnp.asarray(shown))
    last = np.arange(6) <= np.array([[4], [5]])
    wanted = masked(chunk(arrays, [4, 4], 2)[0], *arrays[1:], mask=jnp.asarray(shown & last))
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5)


def test_a_step_from_a_cache_has_the_dtype_it_stores():
    shape = SHAPES[0]
    low = [jnp.asarray(x, jnp.bfloat16) for x in chunk(tokens(shape, 0), [0, 0], 2)]
    slots = empty_slots(shape.batch, 6, shape.K, shape.H, jnp.bfloat16)
    out, cache = attend(*low, KVCache(slots, jnp.zeros(2, jnp.int32)))
    assert out.dtype == cache.slots.k.dtype == jnp.bfloat16


def test_an_empty_batch_is_an_empty_batch():
    shape = AttentionShape((0,), 2, 2, 2, 2, 4, 4)
    arrays = [jnp.asarray(x) for x in tokens(shape, 0)]
    out, cache = cached_attention(*arrays, empty(shape, 6))
    assert out.shape == (0, 2, 2, 4)
    assert cache.length.shape == (0,)


BAD = {
    "fewer heads": ((2, 1, 1, 4), jnp.float32),
    "narrower heads": ((2, 1, 2, 1), jnp.float32),
    "another batch": ((1, 1, 2, 4), jnp.float32),
    "another dtype": ((2, 1, 2, 4), jnp.bfloat16),
}


@pytest.mark.parametrize("name", BAD)
def test_keys_of_another_shape_or_dtype_are_refused(name, untyped):
    """They would be broadcast or cast into the slots without a word."""
    shape, dtype = BAD[name]
    new = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    good = jnp.zeros((2, 1, 2, 4))
    for which, arrays in (("k", (new, good)), ("v", (good, new))):
        message = rf"{which} must fit the cache in all but its length, got {new.dtype}\[{', '.join(map(str, shape))}\]"
        with pytest.raises(ValueError, match=message):
            append(empty(SHAPES[0], 6), *arrays)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (jnp.zeros((), jnp.int32), r"an int32 for each row \[2\], got int32\[\]"),
        (jnp.zeros(3, jnp.int32), r"an int32 for each row \[2\], got int32\[3\]"),
        (jnp.zeros(2), r"an int32 for each row \[2\], got float32\[2\]"),
        (jnp.zeros(2, jnp.uint32), r"an int32 for each row \[2\], got uint32\[2\]"),
        (jnp.asarray([0, -1], jnp.int32), "a cache's length must be at least 0, got -1"),
    ],
)
def test_a_length_that_no_cache_has_is_refused(length, message, untyped):
    with pytest.raises(ValueError, match=message):
        append(empty(SHAPES[0], 6)._replace(length=length), jnp.ones((2, 1, 2, 4)), jnp.ones((2, 1, 2, 4)))


@pytest.mark.parametrize(("queries", "keys", "values"), [(2, 3, 3), (3, 1, 1), (1, 2, 2), (3, 3, 2)])
def test_new_queries_keys_and_values_are_of_the_same_tokens(queries, keys, values, untyped):
    arrays = [jnp.ones((2, length, 2, 4)) for length in (queries, keys, values)]
    message = rf"k and v must agree in all axes but the last, got k \(2, {keys}, .*, v \(2, {values}, "
    message = message if keys != values else "the same new tokens.*, got q"
    with pytest.raises(ValueError, match=message):
        cached_attention(*arrays, empty(SHAPES[0], 6))


@pytest.mark.parametrize(("rows", "of_slots"), [((2,), (2,)), ((2, 3), (2, 1))], ids=["rows", "beams of one row"])
def test_the_form_that_is_named_is_the_one_that_computes(rows, of_slots, monkeypatch):
    asked = []
    take = lambda q, k, v, implementation=None: asked.append(implementation) or q
    monkeypatch.setattr(cache_module, "dot_product_attention", take)
    slots = empty_slots(of_slots, 5, 2, 4, jnp.float32)
    for name in ("blockwise", "materialised"):
        slot_attention(jnp.ones((*rows, 2 if rows == of_slots else 1, 2, 4)), slots, implementation=name)
    assert asked == ["blockwise", "materialised"]


@pytest.mark.parametrize("rule", [{"causal": False}, {"q_offset": 99}])
def test_rules_that_the_cache_decides_are_refused(rule, untyped):
    arrays = [jnp.ones((2, 1, 2, 4))] * 3
    with pytest.raises(TypeError, match=f"causal by its length: {next(iter(rule))} go without"):
        cached_attention(*arrays, empty(SHAPES[0], 6), **rule)


def test_lengths_stay_int32_where_numbers_are_wide(x64):
    cache = append(empty(SHAPES[0], 6), jnp.ones((2, 1, 2, 4), "float32"), jnp.ones((2, 1, 2, 4), "float32"))
    assert cache.length.dtype == jnp.int32
    assert cache.length.tolist() == [1, 1]


@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_beams_take_over_what_others_have_seen_but_for_the_memory(batch):
    rng, beams = np.random.default_rng(0), (*batch, 3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((*beams, *shape)), jnp.float32)
    length, parents = (jnp.asarray(rng.integers(0, 9, beams), jnp.int32) for _ in range(2))
    cache = DecoderCache(
        (Slots(draw(2, 4, 3), draw(2, 4, 5)),),
        (Slots(draw(2, 6, 3), draw(2, 6, 3)),),
        None,
        length,
        length + 1,
    )
    parents = parents % 3
    found = select_beams(cache, parents)
    assert found.memory is cache.memory
    for row in np.ndindex(beams):
        other = (*row[:-1], int(parents[row]))
        for got, wanted in zip(found.attention[0], cache.attention[0], strict=True):
            exactly(np.asarray(got[row]), np.asarray(wanted[other]))
        assert (int(found.length[row]), int(found.prefix[row])) == (int(length[other]), int(length[other]) + 1)
    assert select_beams(cache._replace(prefix=None), parents).prefix is None


@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_beams_that_keep_their_slots_know_whose_slots_hold_their_past(batch):
    rng, beams = np.random.default_rng(1), (*batch, 3)
    rows = jnp.asarray(rng.integers(1, 4, batch), jnp.int32)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((*batch, *shape)), jnp.float32)
    real = Padding(jnp.asarray(rng.random((*batch, 6)) < 0.5))
    memory = Slots(draw(2, 6, 3), draw(2, 6, 3))
    cache = spread_beams(DecoderCache((Slots(draw(2, 4, 3), draw(2, 4, 5)),), (memory,), real, rows, rows + 1), 3)
    itself = np.broadcast_to(np.arange(3)[:, None], (*beams, 4))
    exactly(np.asarray(cache.owners), itself.astype("int32"))
    assert cache.memory[0].k.shape == (*batch, 1, 2, 6, 3)
    assert cache.memory_mask.real.shape == (*batch, 1, 6)
    exactly(np.asarray(cache.length), np.broadcast_to(np.asarray(rows)[..., None], beams).astype("int32"))
    first, second = (rng.integers(0, 3, beams).astype("int32") for _ in range(2))
    found = select_beams(cache, jnp.asarray(first))
    assert found.attention is cache.attention
    filled = np.arange(4) < np.asarray(rows)[..., None, None]
    exactly(np.asarray(found.owners), np.where(filled, first[..., None], itself).astype("int32"))
    grown = found._replace(length=found.length + 1)  # each beam has written a position of its own
    found = select_beams(grown, jnp.asarray(second))
    wanted = np.take_along_axis(np.asarray(grown.owners), second[..., None], axis=-2)
    exactly(
        np.asarray(found.owners),
        np.where(np.arange(4) <= np.asarray(rows)[..., None, None], wanted, itself).astype("int32"),
    )
    assert (np.asarray(found.prefix) == np.asarray(rows)[..., None] + 1).all()


def test_many_beams_move_their_slots_instead():
    draw = lambda *shape: jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    cache = DecoderCache((Slots(draw(2, 1, 4, 3), draw(2, 1, 4, 3)),), (), None, jnp.ones(2, jnp.int32))
    assert spread_beams(cache, 8).owners is not None
    many = spread_beams(cache, 9)
    assert many.owners is None
    assert many.attention[0].k.shape == (2, 9, 1, 4, 3)
