"""Laws of masks: True where a query may attend, by absolute position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.attention import allowed_keys, dot_product_attention
from core.masks import causal_mask, combine, padding_mask
from tests.strategies import attention_shapes, qkv, seeds, square_shapes

attend = jax.jit(dot_product_attention)
lengths = st.sampled_from([(1, 1), (3, 3), (2, 5), (5, 2), (0, 3), (3, 0)])
sizes = st.sampled_from([(3, 1, 4, 4), (1, 2, 1, 4), (3, 2, 4, 1), (1, 4, 4), (2, 1, 4), (5, 3, 2, 4, 4)])


def masks(size, seed, number):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.random(size) < 0.5) for _ in range(number)]


def same(*masks):
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0], strict=True)


@given(lengths, st.integers(-3, 6))
def test_a_causal_mask_shows_the_keys_up_to_the_position_of_the_query(size, offset):
    T, S = size
    mask = causal_mask(T, S, q_offset=offset)
    assert mask.shape == (1, T, S)
    assert mask.dtype == jnp.bool_
    assert all(mask[0, t, s] == (s <= t + offset) for t in range(T) for s in range(S))


@pytest.mark.parametrize("length", [0, 1, 4])
def test_equal_lengths_need_no_offset(length):
    same(causal_mask(length), causal_mask(length, length), causal_mask(length, length, q_offset=0))


@pytest.mark.parametrize(("queries", "keys"), [(2, 5), (5, 2), (1, 3)])
def test_other_lengths_need_an_offset_and_both_alignments_are_named(queries, keys):
    T, S = queries, keys
    with pytest.raises(ValueError, match=f"{T} queries and {S} keys give q_offset: 0 aligns .* {S - T} the last"):
        causal_mask(T, S)


@given(attention_shapes, st.integers(-1, 4))
def test_the_causal_flag_of_attention_is_the_causal_mask(shape, offset):
    q, k, _ = map(jnp.asarray, qkv(shape, 0))
    mask = combine(causal_mask(shape.T, shape.S, q_offset=offset), jnp.ones((1,) * (len(shape.batch) + 3), bool))
    same(mask, allowed_keys(q, k, causal=True, q_offset=offset))


@given(st.sampled_from([(4,), (2, 4), (3, 2, 1), (0, 4), (2, 0)]), seeds)
def test_padding_is_hidden_from_every_query_of_its_row_alone(size, seed):
    real = masks(size, seed, 1)[0]
    mask = padding_mask(real, size)
    assert mask.shape == (*size[:-1], 1, 1, size[-1])
    same(mask[..., 0, 0, :], real)
    assert padding_mask(None, size) is None


@given(square_shapes.filter(lambda s: s.T > 1), seeds)
def test_padding_on_the_right_changes_no_real_row(shape, seed):
    q, k, v = qkv(shape, seed)
    half = (shape.S + 1) // 2
    real = jnp.broadcast_to(jnp.arange(shape.S) < half, (*shape.batch, shape.S))
    padded = attend(q, k, v, mask=padding_mask(real))[..., :half, :, :]
    alone = attend(*(x[..., :half, :, :] for x in (q, k, v)))
    np.testing.assert_allclose(padded, alone, rtol=0, atol=2e-5)


@given(sizes, seeds)
def test_combine_is_associative_commutative_and_idempotent(size, seed):
    a, b, c = masks(size, seed, 3)
    same(combine(combine(a, b), c), combine(a, combine(b, c)), combine(a, b, c))
    same(combine(a, b), combine(b, a), jnp.logical_and(a, b), ~(~a | ~b))
    same(combine(a, a), a)


@given(sizes, seeds)
def test_none_and_all_true_allow_everything(size, seed):
    (a,) = masks(size, seed, 1)
    same(combine(a, None), combine(None, a), combine(a), combine(a, jnp.ones(size, bool)), a)
    same(combine(a, jnp.zeros(size, bool)), jnp.zeros(size, bool))
    assert combine() is None
    assert combine(None, None) is None


@given(seeds)
def test_causal_and_padding_masks_combine_to_the_rank_of_the_logits(seed):
    (real,) = masks((2, 3, 4), seed, 1)
    both = combine(causal_mask(4), padding_mask(real))
    assert both.shape == (2, 3, 1, 4, 4)
    for a, b, t, s in np.ndindex(2, 3, 4, 4):
        assert both[a, b, 0, t, s] == (s <= t and real[a, b, s])


BAD = {
    "float padding": (lambda: padding_mask(jnp.zeros((2, 3))), TypeError, "bool, True for a real.*float32.*!= pad_id"),
    "integer padding": (lambda: padding_mask(jnp.ones((2, 3), jnp.int32)), TypeError, "must be bool.*int32"),
    "padding of other tokens": (
        lambda: padding_mask(jnp.ones((2, 3), bool), (2, 4)),
        ValueError,
        r"shape of its tokens, \(2, 4\), got \(2, 3\)",
    ),
    "float mask": (lambda: combine(jnp.zeros((1, 2, 2))), TypeError, "masks must be bool, True.*float32"),
    "second mask": (lambda: combine(causal_mask(2), jnp.ones((1, 2, 2), jnp.int8)), TypeError, "bool.*int8"),
    "sizes": (lambda: combine(causal_mask(2), causal_mask(3)), (TypeError, ValueError), r"\(1, 2, 2\).*\(1, 3, 3\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_named_with_rule_and_remedy(name, untyped):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_a_mask_of_tokens_is_not_taken_for_one_of_queries_and_keys(untyped):
    """[B, S] beside [B, N, T, S] with B = T would turn row b into query b; padding_mask has the axes it lacks."""
    real = jnp.asarray(np.tril(np.ones((3, 3), bool)))
    with pytest.raises(ValueError, match="padding_mask"):
        combine(real, jnp.ones((3, 2, 3, 3), bool))
