"""Laws of attention: every row of the contract, for any leading axes, heads and widths, in each floating dtype."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import attention
from core.attention import (
    IMPLEMENTATIONS,
    allowed_keys,
    attention_weights,
    attention_with_weights,
    dot_product_attention,
    merge_heads,
    split_heads,
)
from core.blockwise import blockwise_attention
from core.masks import Padding
from core.step_attention import step_attention
from tests.strategies import (
    RECTANGULAR_SHAPES,
    SQUARE_SHAPES,
    AttentionShape,
    attention_cases,
    attention_shapes,
    floats,
    qkv,
    seeds,
    square_shapes,
)

U = 2.0**-24
STATIC = ("causal", "window", "scale", "soft_cap", "dropout_rate", "implementation")
FEW_SHAPES = [RECTANGULAR_SHAPES[0], SQUARE_SHAPES[2], RECTANGULAR_SHAPES[2]]
GROUPED = [SQUARE_SHAPES[3], RECTANGULAR_SHAPES[1]]
few_shapes = st.sampled_from(FEW_SHAPES)
cases = functools.partial(attention_cases, dtypes=floats)
compiled = jax.jit(dot_product_attention, static_argnames=STATIC)
compiled_with_weights = jax.jit(attention_with_weights, static_argnames=STATIC)
exactly = functools.partial(np.testing.assert_array_equal, strict=True)


@functools.partial(jax.jit, static_argnames=STATIC)
def _pulled_back(q, k, v, cotangent, **rules):
    return jax.vjp(lambda *qkv: dot_product_attention(*qkv, **rules), q, k, v)[1](cotangent)


def precision_of(*arrays):
    """float64 is switched on for those who bring it."""
    return jax.enable_x64(True) if any(x.dtype == np.float64 for x in arrays) else contextlib.nullcontext()


def pull_back(*qkv, cotangent, **rules):
    with precision_of(*qkv):
        return [np.array(x) for x in _pulled_back(*qkv, cotangent.astype(qkv[2].dtype), **rules)]


def both(*qkv, **rules):
    with precision_of(*qkv):
        return [np.array(x) for x in compiled_with_weights(*qkv, **_cloned(rules))]


def attend(*qkv, **rules):
    with precision_of(*qkv):
        return np.array(compiled(*qkv, **_cloned(rules)))


def _cloned(rules):
    """Laws use a key twice on purpose."""
    return rules | {name: jax.random.clone(key) for name, key in rules.items() if name == "dropout_key"}


def weigh(*qkv, **rules):
    return both(*qkv, **rules)[1]


def unit(dtype):
    """Half a unit in the last place of numbers in [1, 2)."""
    return float(jnp.finfo(dtype).eps) / 2


def wide(dtype):
    """What attention computes in."""
    return np.float64 if dtype == np.float64 else np.float32


def closely(got, wanted, q, k, v, bias=0.0):
    """Within twice the bound T1 of the dtype computed in, with every weight at its largest, and twice v's rounding."""
    dtype, rounded = v.dtype, unit(v.dtype) if v.dtype.itemsize == 2 else 0.0
    got, wanted, q, k, v = (np.asarray(x, "float64") for x in (got, wanted, q, k, v))
    S, H, u = k.shape[-3], q.shape[-1], unit(wide(dtype))
    scores = H**0.5 * np.abs(q).max(initial=0) * np.abs(k).max(initial=0) + np.abs(bias).max()
    bound = (u * (2 * (H + 2) * scores + 4 * scores + 2 * S + 6) + rounded) * np.abs(v).max(initial=0)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2 * bound)


def gaussian(shape, seed=0, scale=1.0, dtype="float32"):
    return (scale * np.random.default_rng([seed, 3]).standard_normal(shape)).astype(dtype)


def replaced(x, where, new):
    """x with `new` at the keys [*B, S, K] that `where` marks."""
    return np.where(where[..., None], np.broadcast_to(new, x.shape).astype(x.dtype), x)


# who may see whom


@given(attention_cases(rules=["mask", "causal", "bias window", "mask bias causal window"]))
def test_allowed_keys_are_those_of_the_contract(case):
    got = allowed_keys(*map(jnp.asarray, case.qkv[:2]), **jax.tree.map(_traceable, case.rules))
    exactly(np.broadcast_to(got, case.allowed.shape), case.allowed)


def _traceable(leaf):
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


@given(cases())
def test_weights_sum_to_one_over_the_allowed_keys_and_are_zero_elsewhere(case):
    weights = weigh(*case.qkv, **case.rules)
    assert (weights.shape, weights.dtype) == (case.allowed.shape, wide(case.q.dtype))
    assert (weights[~case.allowed] == 0).all()
    assert (weights[case.allowed] >= 0).all()
    live = case.allowed.any(-1)
    sums = weights.astype("float64").sum(-1)
    assert np.abs(sums - live).max() <= (case.shape.S + 2) * unit(weights.dtype)
    assert (sums[~live] == 0).all()


@given(cases(), st.data())
def test_what_a_query_may_not_see_does_not_change_it(case, data):
    """Causality, masks, windows and biases at once: all that is hidden from query t is replaced."""
    shape, t = case.shape, data.draw(st.integers(0, case.shape.T - 1))
    before = attend(*case.qkv, **case.rules)
    groups = case.allowed[..., t, :].reshape(*shape.batch, shape.K, -1, shape.S)
    hidden = ~groups.any(axis=-2).swapaxes(-1, -2)
    q = gaussian(case.q.shape, 1, 1e3, case.q.dtype)
    q[..., t, :, :] = case.q[..., t, :, :]
    k = replaced(case.k, hidden, gaussian(case.k.shape, 2, 1e3))
    v = replaced(case.v, hidden, gaussian(case.v.shape, 3, 1e3))
    exactly(attend(q, k, v, **case.rules)[..., t, :, :], before[..., t, :, :])


@given(few_shapes.filter(lambda s: s.T == s.S), seeds, floats)
def test_the_future_does_not_change_the_past_with_dropout_and_weights_on(shape, seed, dtype):
    q, k, v = qkv(shape, seed, dtype)
    rules = {"causal": True, "dropout_rate": 0.4, "dropout_key": jax.random.key(seed)}
    before = both(q, k, v, **rules)
    for t in range(1, shape.T):
        later = [x.copy() for x in (q, k, v)]
        for x in later:
            x[..., t:, :, :] = gaussian(x[..., t:, :, :].shape, seed, 1e3, dtype)
        out, weights = both(*later, **rules)
        exactly(out[..., :t, :, :], before[0][..., :t, :, :])
        exactly(weights[..., :t, :], before[1][..., :t, :])


@given(cases(few_shapes), seeds)
def test_a_key_that_no_query_may_see_may_hold_anything(case, seed):
    """Also where the mask alone and causality alone would each let some query see it."""
    rng = np.random.default_rng(seed)
    unseen = ~case.seen
    largest = float(jnp.finfo(case.v.dtype).max)
    poison = rng.choice([np.nan, np.inf, -np.inf, largest], (2, *unseen.shape, 1))
    cotangent = gaussian((*case.q.shape[:-1], case.shape.Hv), seed)
    clean = [case.q, replaced(case.k, unseen, 0.0), replaced(case.v, unseen, 0.0)]
    foul = [case.q, replaced(case.k, unseen, poison[0]), replaced(case.v, unseen, poison[1])]
    out = attend(*foul, **case.rules)
    assert np.isfinite(out).all()
    exactly(out, attend(*clean, **case.rules))
    gradients = pull_back(*foul, cotangent=cotangent, **case.rules)
    for got, wanted in zip(gradients, pull_back(*clean, cotangent=cotangent, **case.rules), strict=True):
        assert np.isfinite(got).all()
        exactly(got, wanted)
    for got in gradients[1:]:
        assert (got[unseen] == 0).all()


@given(cases(few_shapes, ["mask", "causal", "bias window"]), st.data())
def test_who_does_not_see_a_key_that_is_not_finite_changes_by_no_bit(case, data):
    key = data.draw(st.integers(0, case.shape.S - 1))
    junk, into = data.draw(st.sampled_from([np.nan, np.inf])), data.draw(st.integers(0, 1))
    arrays = [case.k.copy(), case.v.copy()]
    arrays[into][..., key, :, :] = junk
    sees = case.allowed[..., key].swapaxes(-1, -2)
    got, before = attend(case.q, *arrays, **case.rules), attend(*case.qkv, **case.rules)
    exactly(got[~sees], before[~sees])
    if into or np.isnan(junk):
        assert np.isnan(got[sees]).all()


@pytest.mark.parametrize("shape", SQUARE_SHAPES[2:])
def test_a_key_hidden_only_by_mask_and_causality_together_may_hold_anything(shape):
    q, k, v = qkv(shape, 5)
    future = np.triu(np.ones((shape.T, shape.S), bool), 1)  # the mask shows only what causality hides ...
    future[:, 0] = True  # ... and the first key
    mask = np.broadcast_to(future, (*(1 for _ in shape.batch), shape.N, shape.T, shape.S))
    unseen = np.broadcast_to(np.arange(shape.S)[:, None] > 0, (*shape.batch, shape.S, shape.K))
    for rate in (0.0, 0.5):
        rules = {"mask": mask, "causal": True, "dropout_rate": rate, "dropout_key": jax.random.key(1)}
        clean = attend(q, replaced(k, unseen, 0.0), replaced(v, unseen, 0.0), **rules)
        exactly(attend(q, replaced(k, unseen, np.inf), replaced(v, unseen, np.nan), **rules), clean)


DEAD = {  # ways in which query 0 may see nothing and the others something
    "mask": lambda rows: {"mask": rows[:, None] > 0},
    "bias": lambda rows: {"bias": np.where(rows[:, None] > 0, 0, -np.inf).astype("float32")},
    "causal": lambda rows: {"causal": True, "q_offset": -1},
    "window": lambda rows: {"window": (9, 0), "q_offset": -1},
}


@pytest.mark.parametrize("way", DEAD)
@given(st.sampled_from([s for s in SQUARE_SHAPES if s.T > 1]), floats)
def test_a_query_with_nothing_to_attend_to_gives_zero_and_no_gradient(way, shape, dtype):
    q, k, v = qkv(shape, 7, dtype)
    rules = DEAD[way](np.arange(shape.T))
    for name in {"mask", "bias"} & rules.keys():
        rules[name] = np.broadcast_to(rules[name], (*(1 for _ in shape.batch), 1, shape.T, shape.S))
    if "q_offset" in rules:
        rules["q_offset"] = np.full(shape.batch, -1, "int32")
    out, weights = both(q, k, v, **rules)
    assert (out[..., 0, :, :] == 0).all()
    assert (weights[..., 0, :] == 0).all()
    assert (out[..., 1:, :, :] != 0).all()
    cotangent = gaussian(out.shape, dtype=dtype)
    assert all(np.isfinite(g).all() for g in pull_back(q, k, v, cotangent=cotangent, **rules))
    cotangent[..., 1:, :, :] = 0
    assert all((g == 0).all() for g in pull_back(q, k, v, cotangent=cotangent, **rules))


@given(cases(few_shapes))
def test_a_position_has_no_derivative_in_what_it_may_not_see(case):
    """d out_t / d k_s = d out_t / d v_s = 0 wherever no head of the group lets t see s."""
    shape = case.shape
    grouped = case.allowed.reshape(*shape.batch, shape.K, -1, shape.T, shape.S).any(axis=-3)
    cotangent = gaussian((*case.q.shape[:-1], shape.Hv))
    for t in range(shape.T):
        only_t = np.zeros_like(cotangent)
        only_t[..., t, :, :] = cotangent[..., t, :, :]
        dq, dk, dv = pull_back(*case.qkv, cotangent=only_t, **case.rules)
        hidden = ~grouped[..., t, :].swapaxes(-1, -2)
        assert (dk[hidden] == 0).all()
        assert (dv[hidden] == 0).all()
        assert (np.delete(dq, t, axis=-3) == 0).all()


# what the output is made of


@given(cases())
def test_the_output_lies_between_the_allowed_values(case):
    out = attend(*case.qkv, **case.rules).astype("float64")
    values = np.repeat(case.v.astype("float64"), case.shape.N // case.shape.K, axis=-2)
    values, allowed = values.swapaxes(-2, -3)[..., None, :, :], case.allowed[..., None]
    lowest = np.where(allowed, values, np.inf).min(-2).swapaxes(-2, -3)
    highest = np.where(allowed, values, -np.inf).max(-2).swapaxes(-2, -3)
    slack = ((2 * case.shape.S + 6) * unit(wide(case.v.dtype)) + unit(case.v.dtype)) * np.abs(values).max()
    live = case.allowed.any(-1).swapaxes(-1, -2)
    assert (lowest[live] - slack <= out[live]).all()
    assert (out[live] <= highest[live] + slack).all()


@given(few_shapes, seeds, st.booleans(), floats)
def test_a_single_allowed_key_gives_its_value(shape, seed, by_window, dtype):
    q, k, v = qkv(shape, seed, dtype)
    group = np.arange(shape.N) // (shape.N // shape.K)
    if by_window:
        offset = np.random.default_rng(seed).integers(0, max(1, shape.S - shape.T + 1), shape.batch).astype("int32")
        out = attend(q, k, v, window=(0, 0), q_offset=offset)
        chosen = offset[..., None] + np.arange(shape.T)
        chosen = np.broadcast_to(chosen[..., None], (*shape.batch, shape.T, shape.N))
    else:
        chosen = np.random.default_rng(seed).integers(0, shape.S, (*shape.batch, shape.T, shape.N))
        out = attend(q, k, v, mask=chosen.swapaxes(-1, -2)[..., None] == np.arange(shape.S))
    for cell in np.ndindex(chosen.shape):
        *row, t, n = cell
        wanted = v[(*row, chosen[cell], group[n])] if chosen[cell] < shape.S else np.zeros(shape.Hv, dtype)
        exactly(out[(*row, t, n)], wanted)


@given(cases(), st.data())
def test_rows_of_the_batch_and_heads_do_not_meet(case, data):
    q, k, v = (x.copy() for x in case.qkv)
    before = attend(q, k, v, **case.rules)
    row = tuple(data.draw(st.integers(0, n - 1)) for n in case.shape.batch)
    head = data.draw(st.integers(0, case.shape.K - 1))
    mine = np.zeros(k.shape[:-1], bool)
    mine[(*row, slice(None), head)] = True
    mine_q = np.repeat(mine[..., :1, :], case.shape.N // case.shape.K, axis=-1)
    q = replaced(gaussian(q.shape, 1, 1e3, q.dtype), np.broadcast_to(mine_q, q.shape[:-1]), q)
    k, v = (replaced(gaussian(x.shape, i, 1e3, x.dtype), mine, x) for i, x in enumerate((k, v)))
    mine_out = np.broadcast_to(mine_q, before.shape[:-1])
    exactly(attend(q, k, v, **case.rules)[mine_out], before[mine_out])


@given(cases(rules=["", "mask"]), seeds)
def test_reordering_the_queries_reorders_the_output(case, seed):
    order = np.random.default_rng(seed).permutation(case.shape.T)
    mask = case.rules.get("mask", np.ones((1,) * case.allowed.ndim, bool))
    out = attend(*case.qkv, mask=np.broadcast_to(mask, case.allowed.shape))
    moved = attend(case.q[..., order, :, :], case.k, case.v, mask=case.allowed[..., order, :])
    exactly(moved, out[..., order, :, :])


@given(cases(rules=["mask"]), seeds)
def test_reordering_the_keys_changes_nothing(case, seed):
    order = np.random.default_rng(seed).permutation(case.shape.S)
    moved = attend(case.q, case.k[..., order, :, :], case.v[..., order, :, :], mask=case.allowed[..., order])
    closely(moved, attend(*case.qkv, mask=case.allowed), *case.qkv)


@given(cases(), st.sampled_from([2.0, -1.0, -0.25]))
def test_the_output_is_homogeneous_in_the_values(case, factor):
    factor = case.v.dtype.type(factor)
    scaled = attend(case.q, case.k, factor * case.v, **case.rules)
    exactly(scaled, factor * attend(*case.qkv, **case.rules))


@given(cases(), seeds)
def test_the_output_is_linear_in_the_values(case, seed):
    eighths = lambda x: (np.round(8 * x.astype("float64")) / 8).astype(x.dtype)  # whose sums are no longer
    one, other = eighths(case.v), eighths(gaussian(case.v.shape, seed, dtype=case.v.dtype))
    total, *parts = (attend(case.q, case.k, v, **case.rules) for v in (one + other, one, other))
    parts = sum(part.astype("float64") for part in parts)
    closely(total, parts, case.q, case.k, np.abs(one) + np.abs(other), bias=4.0)


@given(cases(), st.integers(-20, 20))
def test_what_queries_lose_in_size_keys_may_win(case, power):
    q, k, power = case.q, case.k, np.clip(power, -4, 4) if case.q.dtype == np.float16 else power
    if case.q.dtype == np.float16:  # a sixteenth of these is no subnormal that was rounded
        q, k = (np.round(64 * x) / 64 for x in (q, k))
    factor = q.dtype.type(2.0**power)
    exactly(attend(q * factor, k / factor, case.v, **case.rules), attend(q, k, case.v, **case.rules))


@given(few_shapes, seeds, floats)
def test_scale_multiplies_the_logits_and_is_one_over_root_h(shape, seed, dtype):
    q, k, v = qkv(shape, seed, dtype)
    exactly(attend(q, k, v, scale=0.5), attend(q / q.dtype.type(2), k, v, scale=1.0))
    exactly(attend(q, k, v), attend(q, k, v, scale=1 / np.sqrt(shape.H).item()))


@given(cases(few_shapes, ["", "mask causal"]), seeds)
def test_the_same_bias_on_all_keys_changes_nothing(case, seed):
    shift = gaussian((*case.allowed.shape[:-1], 1), seed, 3.0)
    closely(attend(*case.qkv, bias=shift, **case.rules), attend(*case.qkv, **case.rules), *case.qkv, bias=shift)


@given(few_shapes, seeds, floats)
def test_bias_is_added_to_the_scaled_logits(shape, seed, dtype):
    """bias = log 2 weighs a key as if it came twice."""
    q, k, v = qkv(shape, seed, dtype)
    twice = np.random.default_rng(seed).permutation(shape.S)[: (shape.S + 1) // 2]
    bias = np.zeros((*(1 for _ in shape.batch), 1, 1, shape.S), wide(v.dtype))
    bias[..., twice] = np.log(2)
    repeated = [np.concatenate([x, x[..., twice, :, :]], axis=-3) for x in (k, v)]
    closely(attend(q, k, v, bias=bias), attend(q, *repeated), q, k, v, bias=1.0)


@given(cases(few_shapes, ["mask"]), st.integers(2, 3))
def test_keys_that_come_n_times_count_as_once(case, times):
    k, v = (np.concatenate([x] * times, axis=-3) for x in case.qkv[1:])
    several = attend(case.q, k, v, mask=np.concatenate([case.allowed] * times, axis=-1))
    closely(several, attend(*case.qkv, mask=case.allowed), case.q, k, v)


@given(cases(few_shapes, ["mask"]))
def test_keys_that_are_never_attended_may_be_dropped(case):
    live = np.arange(0, case.shape.S, 2)
    mask = case.allowed.copy()
    mask[..., 1::2] = False
    few = attend(case.q, case.k[..., live, :, :], case.v[..., live, :, :], mask=mask[..., live])
    closely(attend(*case.qkv, mask=mask), few, *case.qkv)


@given(cases(rules=["mask"]), st.data())
def test_one_more_allowed_key_shrinks_the_other_weights_in_proportion(case, data):
    s = data.draw(st.integers(0, case.shape.S - 1))
    without, with_it = case.allowed.copy(), case.allowed.copy()
    without[..., s], with_it[..., s] = False, True
    before, after = (weigh(*case.qkv, mask=m).astype("float64") for m in (without, with_it))
    others = np.delete(after, s, axis=-1)
    np.testing.assert_allclose(others, np.delete(before, s, axis=-1) * (1 - after[..., s : s + 1]), rtol=0, atol=2e-6)
    assert (after[..., s] > 0).all()


@given(cases(st.sampled_from(GROUPED)))
def test_query_head_n_reads_key_head_n_over_group_size(case):
    k, v = (np.repeat(x, case.shape.N // case.shape.K, axis=-2) for x in (case.k, case.v))
    closely(attend(*case.qkv, **case.rules), attend(case.q, k, v, **case.rules), *case.qkv, bias=4.0)


@given(cases(), st.floats(10, 30))
def test_huge_finite_logits_choose_the_largest(case, exponent):
    """Distinct integers times 10^exponent: the softmax is one-hot, and a key allowed beats any that is not."""
    shape, rng = case.shape, np.random.default_rng(int(exponent))
    exponent = exponent if case.q.dtype != np.float16 else exponent / 4  # whose largest number is 65504
    q, k = np.zeros_like(case.q), np.zeros_like(case.k)
    q[..., 0] = 10.0 ** (exponent / 2) * shape.H**0.5
    steps = rng.permuted(np.broadcast_to(np.arange(shape.S) - shape.S, (*shape.batch, shape.K, shape.S)), axis=-1)
    k[..., 0] = steps.swapaxes(-1, -2) * 10.0 ** (exponent / 2)
    weights = weigh(q, k, case.v, **case.rules)
    scores = np.where(case.allowed, np.repeat(steps, shape.N // shape.K, axis=-2)[..., None, :], -np.inf)
    wanted = (np.arange(shape.S) == scores.argmax(-1)[..., None]) & case.allowed
    exactly(weights, wanted.astype(weights.dtype))
    assert np.isfinite(attend(q, k, case.v, **case.rules)).all()


def test_an_allowed_key_beats_a_blocked_one_however_low_its_logit():
    q, k = jnp.full((2, 1, 1, 1), 1.7e19), jnp.asarray([[[[-1.9e19]], [[0.0]]]] * 2)
    v = jnp.asarray([[[[1.0]], [[100.0]]]] * 2)
    mask = jnp.asarray([True, False]).reshape(1, 1, 1, 2)
    exactly(np.asarray(dot_product_attention(q, k, v, mask=mask)), np.ones((2, 1, 1, 1), "float32"))
    bias = jnp.where(mask, 0.0, -jnp.inf)
    exactly(np.asarray(dot_product_attention(q, k, v, bias=bias)), np.ones((2, 1, 1, 1), "float32"))


def test_products_too_large_before_scaling_are_fine_after_it():
    q = jnp.zeros((2, 1, 1, 16)).at[..., 0].set(2e19)
    k = jnp.concatenate([q, -q], axis=-3)  # q k = 4e38 is no float32, a quarter of it is
    exactly(np.asarray(attention_weights(q, k)), np.broadcast_to(np.float32([1, 0]), (2, 1, 1, 2)))


# the same thing said in two ways


@given(cases())
def test_rules_may_be_given_as_one_full_mask(case):
    bias = case.rules.get("bias")
    finite = None if bias is None else np.where(bias == -np.inf, 0, bias).astype("float32")
    said = attend(*case.qkv, mask=case.allowed, bias=finite)
    exactly(attend(*case.qkv, **case.rules), said)


@pytest.mark.parametrize("size", [(3, 1, 1, 5), (1, 4, 1, 5), (1, 1, 5, 5), (3, 4, 5, 1), (1, 1, 1, 5)])
def test_masks_and_biases_broadcast_and_minus_infinity_is_false(size):
    shape = SQUARE_SHAPES[2]
    q, k, v = qkv(shape, 0)
    mask = np.random.default_rng(5).random(size) < 0.5
    full = np.broadcast_to(mask, (3, 4, 5, 5))
    unseen = ~full.reshape(3, 2, 2, 5, 5).any(axis=(2, 3)).swapaxes(-1, -2)
    v = replaced(v, unseen, np.nan)
    wanted = attend(q, k, v, mask=full)
    assert np.isfinite(wanted).all()
    exactly(attend(q, k, v, mask=mask), wanted)
    exactly(attend(q, k, v, bias=np.where(mask, 0, -np.inf).astype("float32")), wanted)


@given(attention_shapes, seeds, floats)
def test_a_mask_of_true_is_no_mask(shape, seed, dtype):
    q, k, v = qkv(shape, seed, dtype)
    exactly(attend(q, k, v, mask=np.full((1,) * (len(shape.batch) + 3), True)), attend(q, k, v))


@given(few_shapes, seeds, st.integers(-1, 2))
def test_equal_offsets_may_be_one_integer(shape, seed, offset):
    q, k, _ = map(jnp.asarray, qkv(shape, seed))
    one = allowed_keys(q, k, causal=True, q_offset=offset)
    each = allowed_keys(q, k, causal=True, q_offset=jnp.full(shape.batch, offset, jnp.int32))
    exactly(np.broadcast_to(one, each.shape), np.asarray(each))


@given(square_shapes)
def test_the_offset_of_equal_lengths_is_zero(shape):
    q, k, _ = map(jnp.asarray, qkv(shape, 0))
    exactly(*(np.asarray(allowed_keys(q, k, causal=True, q_offset=offset)) for offset in (None, 0)))


@given(st.sampled_from(SQUARE_SHAPES[2:]), seeds, st.sampled_from([{"causal": True}, {"window": (1, 1)}]), floats)
def test_queries_at_an_offset_are_those_of_the_whole(shape, seed, rules, dtype):
    """Each row of the batch starts somewhere else, as rows of a cache do."""
    q, k, v = qkv(shape, seed, dtype)
    T = (shape.T + 1) // 2
    offset = np.random.default_rng(seed).integers(0, shape.T - T + 1, shape.batch).astype("int32")
    rows = (offset[..., None] + np.arange(T))[..., None, None]
    whole = np.take_along_axis(attend(q, k, v, **rules), rows, axis=-3)
    closely(attend(np.take_along_axis(q, rows, axis=-3), k, v, q_offset=offset, **rules), whole, q, k, v)


def test_offsets_reach_the_largest_position():
    q, k, v = (jnp.asarray(x) for x in qkv(AttentionShape((2,), 2, 3, 1, 1, 2, 2), 0))
    far = dot_product_attention(q, k, v, causal=True, q_offset=2**31 - 2)
    exactly(np.asarray(far), np.asarray(dot_product_attention(q, k, v)))


@given(cases(st.just(FEW_SHAPES[1]), ["mask causal"]))
def test_asking_for_the_weights_and_compiling_change_nothing(case):
    with precision_of(case.q):
        rules = jax.tree.map(_traceable, case.rules)
        q, k, v = map(jnp.asarray, case.qkv)
        out, weights = attention_with_weights(q, k, v, **rules)
        exactly(np.asarray(dot_product_attention(q, k, v, **rules)), np.asarray(out))
        exactly(np.asarray(attention_weights(q, k, **rules)), np.asarray(weights))
    closely(attend(*case.qkv, **case.rules), out, *case.qkv, bias=4.0)


def test_dropout_goes_by_the_same_key_and_rate_by_either_call():
    q, k, v = map(jnp.asarray, qkv(SQUARE_SHAPES[0], 0))
    rules = {"dropout_rate": 0.4, "dropout_key": jax.random.key(1)}
    out = dot_product_attention(q, k, v, implementation="blockwise", **rules)
    np.testing.assert_array_equal(out, blockwise_attention(q, k, v, **rules))
    assert not np.array_equal(out, blockwise_attention(q, k, v))


@given(attention_cases(few_shapes, ["mask causal"]), st.sampled_from([np.nan, np.inf]))
def test_outside_of_jit_too_what_is_not_finite_is_met_with_care(case, junk):
    """A key and its value, which some queries see and some do not."""
    bad = np.zeros(case.k.shape[:-1], bool)
    bad[..., 0, :] = True
    q, k, v = case.q, replaced(case.k, bad, np.float32(junk)), replaced(case.v, bad, np.float32(junk))
    found = dot_product_attention(*map(jnp.asarray, (q, k, v)), **jax.tree.map(_traceable, case.rules))
    met = case.allowed[..., 0].swapaxes(-1, -2)
    np.testing.assert_array_equal(np.isfinite(found).all(-1), ~met)
    clean = attend(*case.qkv, **case.rules)
    np.testing.assert_allclose(np.asarray(found)[~met], clean[~met], rtol=0, atol=1e-5)


@given(attention_cases(few_shapes, ["mask causal", "window"]))
def test_what_is_finite_is_not_computed_a_second_time_with_care(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attention_with_weights", None)
        out = dot_product_attention(*map(jnp.asarray, case.qkv), **jax.tree.map(_traceable, case.rules))
    closely(np.asarray(out), attend(*case.qkv, **case.rules), *case.qkv)


@pytest.mark.parametrize("attend", [dot_product_attention, step_attention, blockwise_attention])
def test_a_call_outside_of_jit_compiles_nothing_twice(attend, caplog):
    q, k, v = map(jnp.asarray, qkv(SQUARE_SHAPES[0], 0))
    attend(q[:, :1], k, v, window=(1, 0), q_offset=1)
    with jax.log_compiles():
        attend(q[:, :1], k, v, window=(1, 0), q_offset=1)
    assert "ompiling" not in caplog.text


@given(cases(few_shapes, ["mask causal", "bias window"]))
def test_vmap_over_examples_is_the_batched_call(case):
    arrays = {name: rule for name, rule in case.rules.items() if isinstance(rule, np.ndarray)}
    rest = {name: rule for name, rule in case.rules.items() if name not in arrays}
    for name in {"mask", "bias"} & arrays.keys():
        arrays[name] = np.broadcast_to(arrays[name], case.allowed.shape)
    single = jax.jit(jax.vmap(lambda q, k, v, arrays: dot_product_attention(q, k, v, **arrays, **rest)))
    with precision_of(case.q):
        got = np.asarray(single(*case.qkv, arrays))
    exactly(got, attend(*case.qkv, **arrays, **rest))


def _equations(jaxpr, *, inside=True):
    for equation in jaxpr.eqns:
        yield equation
        inner = [x.jaxpr for x in jax.tree.leaves(equation.params) if hasattr(x, "jaxpr")]
        for other in inner if inside or equation.primitive.name != "cond" else []:
            yield from _equations(other, inside=inside)


@pytest.mark.parametrize("rules", [{"causal": True}, {"window": (1, 0)}, {"mask": Padding(jnp.arange(5) < 3)}])
def test_a_mask_costs_no_choice_between_logits_unless_something_is_not_finite(rules):
    q, k, v = qkv(AttentionShape((), 5, 5, 2, 1, 3, 3), 0)
    made = jax.make_jaxpr(lambda q, k, v: dot_product_attention(q, k, v, **rules))(q, k, v).jaxpr
    chosen = lambda inside: [
        equation.outvars[0].aval.shape
        for equation in _equations(made, inside=inside)
        if equation.primitive.name == "select_n" and equation.outvars[0].aval.shape == (2, 5, 5)
    ]
    assert len(chosen(True)) == 1
    assert not chosen(False)


@given(st.sampled_from([1.0, np.nan, np.inf, 1e38]), st.sampled_from(["k", "v"]), seeds)
def test_under_vmap_what_one_query_sees_disturbs_no_other(junk, name, seed):
    """And the condition stays one for all, instead of both branches for each."""
    shape = AttentionShape((3,), 4, 4, 4, 2, 3, 5)
    arrays = dict(zip("qkv", qkv(shape, seed), strict=True))
    attended = jax.vmap(functools.partial(dot_product_attention, causal=True))
    assert "stablehlo.case" in jax.jit(attended).lower(*arrays.values()).as_text()
    foul = arrays | {name: arrays[name].copy()}
    foul[name][1, 3] = junk
    got, clean = (np.asarray(jax.jit(attended)(*x.values())) for x in (foul, arrays))
    exactly(got[[0, 2]], clean[[0, 2]])
    exactly(got[1, :3], clean[1, :3])  # who does not see it
    if not np.isfinite(junk):
        assert np.isnan(got[1, 3]).any()


@pytest.mark.parametrize(
    ("queries", "keys", "picked"), [(512, 512, 1), (511, 513, 0), (1, 2**18, 1), (1, 2**18 - 1, 0)]
)
def test_the_form_is_picked_by_the_cells_of_the_logits(queries, keys, picked, monkeypatch):
    assert IMPLEMENTATIONS == ("materialised", "blockwise")
    calls = []
    monkeypatch.setattr(attention, "blockwise_attention", lambda q, k, v, **_: calls.append("blockwise") or q)
    monkeypatch.setattr(attention, "_materialised", lambda q, k, v, rules: calls.append("materialised") or q)
    q, k = (jax.ShapeDtypeStruct((2, length, 2, 4), jnp.float32) for length in (queries, keys))
    for name in (None, *IMPLEMENTATIONS):
        jax.eval_shape(functools.partial(dot_product_attention, implementation=name), q, k, k)
    assert calls == [IMPLEMENTATIONS[picked], *IMPLEMENTATIONS]


@given(attention_shapes, seeds)
def test_heads_are_consecutive_features(shape, seed):
    x = gaussian((*shape.batch, shape.T, shape.N * shape.H), seed)
    heads = split_heads(jnp.asarray(x), shape.N)
    for n in range(shape.N):
        exactly(np.asarray(heads[..., n, :]), x[..., n * shape.H : (n + 1) * shape.H])
    exactly(np.asarray(merge_heads(heads)), x)


# dtypes


@given(attention_cases(st.just(FEW_SHAPES[1]), ["", "bias window"]), st.sampled_from([jnp.bfloat16, jnp.float16]))
def test_sixteen_bit_inputs_are_computed_in_float32_and_returned_in_their_own(case, dtype):
    low = [jnp.asarray(x, dtype) for x in case.qkv]
    out, weights = both(*low, **case.rules)
    exact, exact_weights = both(*(x.astype(jnp.float32) for x in low), **case.rules)
    exactly(weights, exact_weights)
    exactly(out, exact.astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_result_has_the_dtype_of_the_values(dtype):
    q, k, v = map(jnp.asarray, qkv(FEW_SHAPES[0], 0))
    assert dot_product_attention(q, k, v.astype(dtype)).dtype == dtype
    assert dot_product_attention(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v.astype(dtype)).dtype == dtype


def test_float64_stays_float64(x64):
    shape = AttentionShape((2,), 3, 5, 4, 2, 8, 3)
    q, k, v = map(jnp.asarray, qkv(shape, 0, "float64"))
    out, weights = attention_with_weights(q, k, v)
    assert out.dtype == weights.dtype == jnp.float64
    np.testing.assert_allclose(weights.sum(-1), np.ones((2, 4, 3)), rtol=1e-15)
    grouped = np.repeat(k, 2, axis=-2)
    logits = np.einsum("btnh,bsnh->bnts", q, grouped) / 8**0.5
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, wanted, rtol=1e-13)


# nothing there


EMPTY = [((0,), 3, 3), ((2,), 0, 3), ((2,), 3, 0), ((), 0, 0), ((2, 0), 3, 2)]


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(("batch", "queries", "keys"), EMPTY)
def test_nothing_in_gives_nothing_or_zeros_out(batch, queries, keys, heads):
    T, S, N, K = queries, keys, heads, 2
    shape = AttentionShape(batch, T, S, N, K, 2, 3)
    q, k, v = qkv(shape, 0)
    mask = np.ones((*batch, N, T, S), bool)
    for rules in ({}, {"mask": mask}, {"bias": mask.astype("float32")}, {"causal": True, "q_offset": _at(batch)}):
        out, weights = both(q, k, v, **rules)
        exactly(out, np.zeros((*batch, T, N, 3), "float32"))
        assert weights.shape == (*batch, N, T, S)
        gradients = pull_back(q, k, v, cotangent=np.zeros_like(out), **rules)
        assert [g.shape for g in gradients] == [x.shape for x in (q, k, v)]


def _at(batch):
    return np.zeros(batch, "int32")


# NaN that queries do see


def test_nan_in_the_bias_is_not_taken_for_a_mask():
    q, k, v = qkv(SQUARE_SHAPES[0], 0)
    bias = gaussian((1, 1, 1, 3))
    bias[..., 1] = np.nan
    assert np.isnan(attend(q, k, v, bias=bias)).all()


# dropout


DROPPED = AttentionShape((4,), 16, 32, 4, 2, 8, 32)


@functools.cache
def dropped_weights(seed, rate):
    """Weights as dropout left them, read off by values that are one-hot, and those before."""
    q, k, _ = qkv(DROPPED, 0)
    identity = np.broadcast_to(np.eye(32, dtype="float32")[:, None], (4, 32, 2, 32))
    out, weights = both(q, k, identity, dropout_rate=rate, dropout_key=jax.random.key(seed))
    return out.swapaxes(-2, -3), weights


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_of_the_weights_and_scales_them(rate):
    dropped, weights = dropped_weights(0, rate)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], weights[kept] / (1 - rate), rtol=1e-6)
    sigma = (rate * (1 - rate) / kept.size) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 6 * sigma


def test_dropout_differs_between_examples_heads_queries_and_keys():
    kept = dropped_weights(0, 0.4)[0] != 0
    sigma = (0.52 * 0.48) ** 0.5
    for axes in ((0, 1), (2,), (3,)):
        rows = np.moveaxis(kept, axes, range(len(axes))).reshape(np.prod([kept.shape[a] for a in axes]), -1)
        agreement = (rows[:, None] == rows[None]).mean(-1)[~np.eye(len(rows), dtype=bool)]
        assert np.abs(agreement - 0.52).max() < 6 * sigma / rows.shape[1] ** 0.5


def test_dropout_is_its_key():
    exactly(dropped_weights.__wrapped__(1, 0.5)[0], dropped_weights(1, 0.5)[0])
    assert (dropped_weights(1, 0.5)[0] != dropped_weights(0, 0.5)[0]).mean() > 0.4


@given(cases(few_shapes, ["mask causal"]))
def test_dropout_without_a_key_or_a_rate_does_nothing(case):
    plain = attend(*case.qkv, **case.rules)
    exactly(attend(*case.qkv, dropout_rate=0.5, **case.rules), plain)
    exactly(attend(*case.qkv, dropout_key=jax.random.key(0), **case.rules), plain)


@given(cases(st.just(FEW_SHAPES[1]), ["mask causal"]), seeds)
def test_dropout_hides_no_rule(case, seed):
    """With dropout on, masked weights stay 0, dead rows stay 0, and the weights told are those before it."""
    rules = case.rules | {"dropout_rate": 0.3, "dropout_key": jax.random.key(seed)}
    out, weights = both(case.q, case.k, replaced(case.v, ~case.seen, np.nan), **rules)
    assert np.isfinite(out).all()
    dead = ~case.allowed.any(-1).swapaxes(-1, -2)
    assert (out[dead] == 0).all()
    exactly(weights, weigh(*case.qkv, **case.rules))
