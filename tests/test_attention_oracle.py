"""Attention with all its options together against the formula in float64 loops; soft caps, sinks, NaN, gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from core.attention import (
    IMPLEMENTATIONS,
    attention_weights,
    attention_with_weights,
    dot_product_attention,
    weighted_values,
)
from core.masks import Dense, Padding, Prefix
from core.relative import ALiBi, Shaw, alibi_slopes
from tests.strategies import (
    COMBINATIONS,
    SQUARE_SHAPES,
    AttentionShape,
    attention_cases,
    options,
    qkv,
    seeds,
)
from tests.test_attention import FEW_SHAPES, STATIC, U, attend, both, closely, exactly, gaussian

EVERYTHING = COMBINATIONS[3]
few_shapes = st.sampled_from([FEW_SHAPES[0], FEW_SHAPES[1]])
combinations = pytest.mark.parametrize("combination", COMBINATIONS, ids=str)


def rules_of(combination, given):
    """The options as attention takes them."""
    names = combination.names.split()
    array = lambda x: None if x is None else jnp.asarray(x)
    mask = None
    if given.cells is not None:
        mask = Padding(array(given.real)) & (Prefix(array(given.prefix)) | Dense(array(given.cells)))
    relative = ALiBi() if "alibi" in names else None
    if given.key_rows is not None:
        relative = Shaw(array(given.key_rows), array(given.value_rows))
    rules = {"mask": mask, "bias": array(given.bias), "sinks": array(given.sinks), "relative": relative}
    rules |= {"q_offset": array(given.offset), "soft_cap": combination.soft_cap, "scale": combination.scale}
    rules |= {"causal": "causal" in names, "window": (2, 1) if "window" in names else None}
    return {name: rule for name, rule in rules.items() if rule is not None}


def formula(combination, q, k, v, given, rounded=np.float64):
    """The output, the weights and rule T1, one query at a time; each step goes through `rounded`."""
    shape = combination.shape
    scale, cap = combination.scale, combination.soft_cap
    scale = 1 / math.sqrt(shape.H) if scale is None else scale
    out, weights = np.zeros((*q.shape[:-1], shape.Hv)), np.zeros(given.allowed.shape)
    bound = np.zeros_like(out)
    q, k, v = (np.float64(x) for x in (q, k, v))
    for *b, n, t in np.ndindex(given.allowed.shape[:-1]):
        query, group = q[*b, t, n], n // (shape.N // shape.K)
        seen = np.flatnonzero(given.allowed[*b, n, t])
        if not seen.size:
            continue
        ahead = seen - t - given.offset[*b]
        keys, values = k[*b, seen, group], v[*b, seen, group]
        size = np.abs(values)
        logits = rounded(scale * rounded(keys @ query))
        sizes = (shape.H + 2) * abs(scale) * np.abs(keys) @ np.abs(query)
        if cap is not None:
            sizes += np.abs(logits) + 8 * np.minimum(np.abs(logits), cap)
            logits = rounded(cap * rounded(np.tanh(logits / cap)))
        if "alibi" in combination.names:
            added = -alibi_slopes(shape.N)[n] * np.abs(ahead)
            sizes += 2 * np.abs(added) + np.abs(logits)
            logits = rounded(logits + added)
        if given.key_rows is not None:
            rows = np.float64(given.key_rows)[np.clip(ahead, -2, 2) + 2]
            sizes += (shape.H + 2) * abs(scale) * np.abs(rows) @ np.abs(query) + np.abs(logits)
            logits = rounded(logits + rounded(scale * (rows @ query)))
            value_rows = np.float64(given.value_rows)[np.clip(ahead, -2, 2) + 2]
            values, size = values + value_rows, size + np.abs(value_rows)
        if given.bias is not None:
            logits = rounded(logits + np.float64(given.bias[*b, n, t, seen]))
            sizes += 2 * np.abs(logits)
        sink = -np.inf if given.sinks is None else np.float64(given.sinks[n])
        highest = max(logits.max(), sink)
        exponentials = rounded(np.exp(rounded(logits - highest)))
        w = rounded(exponentials / rounded(exponentials.sum() + np.exp(sink - highest)))
        weights[*b, n, t, seen] = w
        out[*b, t, n] = rounded(w @ values)
        gaps = highest - logits
        factor = 2 * sizes.max() + w @ gaps + 2 * shape.S + 12
        bound[*b, t, n] = U * (factor * (w @ size) + (w * gaps) @ size) + 2 * shape.S * 2.0**-126 * size.max()
    return out, weights, bound


# every option with every other


@combinations
@given(seed=seeds)
def test_attention_is_the_formula_in_float64(combination, seed):
    with jax.enable_x64(True):
        q_k_v, given = qkv(combination.shape, seed, "float64"), options(combination, seed, "float64")
        wanted, weights, _ = formula(combination, *q_k_v, given)
        out, got_weights = both(*q_k_v, **rules_of(combination, given))
    np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12, strict=True)
    np.testing.assert_allclose(got_weights, weights, rtol=1e-12, atol=1e-12, strict=True)


@combinations
@given(seed=seeds, size=st.sampled_from([1.0, 0.1, 10.0]))
def test_attention_in_float32_is_within_the_derived_bound(combination, seed, size):
    q_k_v, given = qkv(combination.shape, seed, scale=size), options(combination, seed, "float32")
    wanted, _, bound = formula(combination, *q_k_v, given)
    out, weights = both(*q_k_v, **rules_of(combination, given))
    np.testing.assert_array_less(np.abs(out - wanted), bound + 1e-300)
    assert (weights[~given.allowed] == 0).all()
    assert (out[~given.allowed.any(-1).swapaxes(-1, -2)] == 0).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("combination", [COMBINATIONS[1], COMBINATIONS[3]], ids=str)
@given(seed=seeds, size=st.sampled_from([1.0, 4.0]))
def test_sixteen_bits_err_at_most_twice_as_much_as_the_plain_computation(combination, dtype, seed, size):
    q_k_v, given = qkv(combination.shape, seed, dtype, scale=size), options(combination, seed, dtype)
    rounded = lambda x: np.asarray(x).astype(dtype).astype("float64")
    exact, plain = (formula(combination, *q_k_v, given, to)[0] for to in (np.float64, rounded))
    out, weights = both(*q_k_v, **rules_of(combination, given))
    assert out.dtype == dtype
    assert weights.dtype == np.float32
    noise = np.abs(rounded(rounded(rounded(exact) + 0.3) - 0.3) - rounded(exact)).max()
    error = np.abs(out.astype("float64") - exact).max()
    assert error <= 2 * np.abs(plain - exact).max() + 2 * noise + np.abs(rounded(exact) - exact).max()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("combination", [COMBINATIONS[1], COMBINATIONS[3]], ids=str)
@given(seed=seeds)
def test_in_sixteen_bits_all_options_are_computed_in_float32_and_rounded_once(combination, dtype, seed):
    low = (qkv(combination.shape, seed, dtype, scale=4.0), options(combination, seed, dtype))
    wide = jax.tree.map(lambda x: x.astype("float32") if x.dtype == dtype else x, low)
    found, wanted = (both(*q_k_v, **rules_of(combination, given)) for q_k_v, given in (low, wide))
    exactly(found[1], wanted[1])
    exactly(found[0], wanted[0].astype(dtype))
    found, wanted = (attend(*q_k_v, **rules_of(combination, given)) for q_k_v, given in (low, wide))
    exactly(found, wanted.astype(dtype))


@given(seed=seeds)
def test_wide_values_may_stand_beside_narrow_queries_and_keys(seed):
    """Exponentials in float32, their sum with float64 values in float64: two roundings of the weights told are left."""
    combination = COMBINATIONS[2]._replace(names="mask bias causal")
    with jax.enable_x64(True):
        (q, k, _), v = qkv(combination.shape, seed), qkv(combination.shape, seed, "float64")[2]
        given = options(combination, seed, "float32")
        out, weights = both(q, k, v, **rules_of(combination, given))
        assert (out.dtype, weights.dtype) == (np.float64, np.float32)
        within_roundings(2, np.asarray(weights), v, out)  # XLA multiplies by the inverse
    wanted, _, bound = formula(combination, q, k, v, given)
    np.testing.assert_array_less(np.abs(out - wanted), bound + 1e-300)


@pytest.mark.parametrize("combination", COMBINATIONS[1:3], ids=str)
@given(seed=seeds)
def test_the_weights_told_are_those_that_were_used(combination, seed):
    q_k_v, given = qkv(combination.shape, seed), options(combination, seed, "float32")
    given = given._replace(value_rows=None)
    out, weights = both(*q_k_v, **rules_of(combination, given))
    sums = 2 * combination.shape.S  # by us, and of the exponentials
    within_roundings(sums + 4, weights, q_k_v[2], out)


@combinations
def test_attention_its_weights_and_both_are_one_computation(combination):
    """Every option reaches each of the three."""
    q_k_v, given = [jnp.asarray(x) for x in qkv(combination.shape, 7)], options(combination, 7, "float32")
    rules = rules_of(combination, given)
    dropped = lambda: {"dropout_rate": 0.4, "dropout_key": jax.random.key(3)}
    out, weights = attention_with_weights(*q_k_v, **rules, **dropped())
    exactly(np.asarray(dot_product_attention(*q_k_v, **rules, **dropped())), np.asarray(out))
    exactly(np.asarray(attention_weights(*q_k_v[:2], **rules)), np.asarray(weights))


def within_roundings(number, weights, v, out):
    """The values' mean by these weights, up to so many roundings to float32."""
    v = v.astype("float64").repeat(weights.shape[-3] // v.shape[-2], axis=-2).swapaxes(-2, -3)
    weights = weights.astype("float64")
    bound = number * 2.0**-24 * (1 + 1e-6) * (weights @ np.abs(v)).swapaxes(-2, -3)
    np.testing.assert_array_less(np.abs((weights @ v).swapaxes(-2, -3) - out), bound + 1e-300)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_implementation_is_another_function(implementation):
    q_k_v, given = qkv(EVERYTHING.shape, 0), options(EVERYTHING, 0, "float32")
    rules = rules_of(EVERYTHING, given)
    chosen = np.asarray(dot_product_attention(*map(jnp.asarray, q_k_v), **rules, implementation=implementation))
    wanted, _, bound = formula(EVERYTHING, *q_k_v, given)
    np.testing.assert_array_less(np.abs(chosen - wanted), bound + 1e-300)
    if implementation == IMPLEMENTATIONS[0]:
        exactly(chosen, np.asarray(attention_with_weights(*map(jnp.asarray, q_k_v), **rules)[0]))


@given(attention_cases(st.just(FEW_SHAPES[1]), ["mask causal"]), seeds)
def test_the_output_with_dropout_is_that_of_the_weights_it_left(case, seed):
    rules = {"dropout_rate": 0.5, "dropout_key": jax.random.key(seed)}
    identity = np.broadcast_to(np.eye(case.shape.S, dtype="float32")[:, None], (*case.k.shape[:-1], case.shape.S))
    dropped, weights = both(case.q, case.k, identity, **rules, **case.rules)
    dropped = dropped.swapaxes(-2, -3)
    assert np.isin(dropped, np.stack([0 * weights, 2 * weights])).all()
    exactly(np.where(dropped == 0, dropped, weights * 2), dropped)
    closely(both(*case.qkv, **rules, **case.rules)[0], jax.jit(weighted_values)(dropped, case.v), *case.qkv)


# soft caps


@given(few_shapes, seeds, st.sampled_from([0.5, 3.0]), st.sampled_from([1.0, 1e4, 1e15]))
def test_no_logit_is_above_the_cap(shape, seed, cap, size):
    """Two weights of a row differ by at most a factor exp(2 cap), however large q and k are; their order stays."""
    q, k, v = qkv(shape, seed, scale=size)
    out, weights = both(q, k, v, soft_cap=cap)
    assert np.isfinite(out).all()
    spread = np.log(weights.astype("float64")).max(-1) - np.log(weights.astype("float64")).min(-1)
    assert spread.max() <= 2 * cap + 1e-5
    plain = both(q / np.float32(size), k / np.float32(size), v)[1]
    order = np.argsort(plain, axis=-1)
    assert (np.diff(np.take_along_axis(weights, order, axis=-1), axis=-1) >= 0).all()
    if size > 1:
        assert spread.max() > 1.9 * cap


@given(attention_cases(few_shapes, ["mask"]))
def test_a_cap_far_above_all_logits_is_none(case):
    for got, wanted in zip(both(*case.qkv, soft_cap=2.0**60, **case.rules), both(*case.qkv, **case.rules), strict=True):
        exactly(got, wanted)


@given(few_shapes, seeds)
def test_a_bias_is_added_after_the_cap(shape, seed):
    q, k, v = qkv(shape, seed, scale=1e3)
    bias = np.zeros((*(1 for _ in shape.batch), 1, 1, shape.S), "float32")
    bias[..., 0] = 40.0
    weights = both(q, k, v, soft_cap=1.0, bias=bias)[1]
    assert (weights[..., 0] > 1 - 1e-6).all()


# sinks


@given(attention_cases(few_shapes, ["", "mask"]))
def test_a_sink_of_minus_infinity_is_none(case):
    sinks = np.full(case.shape.N, -np.inf, "float32")
    for got, wanted in zip(both(*case.qkv, sinks=sinks, **case.rules), both(*case.qkv, **case.rules), strict=True):
        exactly(got, wanted)


@given(attention_cases(few_shapes, ["mask"]), seeds)
def test_a_sink_is_one_more_key_without_a_value(case, seed):
    shape, sinks = case.shape, gaussian(case.shape.N, seed, 2.0)
    with_key = [np.concatenate([x, np.zeros_like(x[..., :1, :, :])], axis=-3) for x in case.qkv[1:]]
    bias = np.zeros((*case.allowed.shape[:-1], shape.S + 1), "float32")
    bias[..., -1] = sinks[:, None]
    mask = np.concatenate([case.allowed, case.allowed.any(-1, keepdims=True)], axis=-1)
    out, weights = both(*case.qkv, mask=case.allowed, sinks=sinks)
    other, other_weights = both(case.q, *with_key, mask=mask, bias=bias)
    closely(out, other, *case.qkv, bias=4 + np.abs(sinks))
    np.testing.assert_allclose(weights, other_weights[..., :-1], rtol=1e-5, atol=1e-7)
    live = case.allowed.any(-1)
    assert (weights.sum(-1)[live] < 1).all()
    np.testing.assert_allclose((weights.sum(-1) + other_weights[..., -1])[live], 1, rtol=(shape.S + 6) * 2 * U)


@given(few_shapes, seeds, st.sampled_from([1e30, 200.0, -200.0, -1e30]))
def test_a_huge_sink_takes_all_or_nothing(shape, seed, sink):
    q, k, v = qkv(shape, seed)
    wanted = both(q, k, v)[0] * np.float32(sink < 0)
    exactly(both(q, k, v, sinks=np.full(shape.N, sink, "float32"))[0], wanted)


@given(few_shapes.filter(lambda shape: shape.N > 1), seeds)
def test_each_head_has_its_own_sink(shape, seed):
    q, k, v = qkv(shape, seed)
    sinks = gaussian(shape.N, seed)
    before = both(q, k, v, sinks=sinks)[0]
    for n in range(shape.N):
        other = np.where(np.arange(shape.N) == n, sinks + 1, sinks).astype("float32")
        out = both(q, k, v, sinks=other)[0]
        exactly(np.delete(out, n, axis=-2), np.delete(before, n, axis=-2))
        assert (out[..., n, :] != before[..., n, :]).all()


@pytest.mark.parametrize("sink", [1e4, -1e4, 3e38])
def test_a_huge_sink_leaves_finite_gradients(sink):
    shape = SQUARE_SHAPES[0]
    sinks = jnp.full(shape.N, sink, jnp.float32)
    loss = lambda q, k, v, sinks: (dot_product_attention(q, k, v, sinks=sinks) ** 2).sum()
    assert all(
        np.isfinite(x).all() for x in jax.grad(loss, argnums=(0, 1, 2, 3))(*map(jnp.asarray, qkv(shape, 0)), sinks)
    )


# NaN and infinity in what some may see


@functools.partial(jax.jit, static_argnames=STATIC)
def pull_back(arrays, cotangent, mask, q_offset, **static):
    def attention(arrays):
        q, k, v, rest = arrays
        return dot_product_attention(q, k, v, mask=mask, q_offset=q_offset, **rest, **static)

    return jax.vjp(attention, arrays)[1](cotangent)[0]


def strike(x, struck, seed, poisons):
    """x with NaN or infinity in one feature of the vectors that `struck` marks."""
    rng = np.random.default_rng(seed)
    feature = np.arange(x.shape[-1]) == rng.integers(0, x.shape[-1], struck.shape)[..., None]
    return np.where(struck[..., None] & feature, rng.choice(np.float32(poisons), x.shape), x)


def meets(case, struck):
    """[*B, T, N]: queries that may see a key [*B, S, K] that is struck."""
    by_head = np.repeat(struck.swapaxes(-1, -2), case.shape.N // case.shape.K, axis=-2)[..., None, :]
    return (case.allowed & by_head).any(-1).swapaxes(-1, -2)


LIVE = ["mask", "mask causal", "bias window"]


@given(attention_cases(few_shapes, LIVE), seeds)
def test_nan_or_infinity_in_a_value_makes_nan_of_those_who_may_see_it_and_of_no_other(case, seed):
    struck = np.random.default_rng(seed).random(case.v.shape[:-1]) < 0.3
    before, weights_before = both(*case.qkv, **case.rules)
    v = strike(case.v, struck, seed, [np.nan, np.inf, -np.inf])
    out, weights = both(case.q, case.k, v, **case.rules)
    met = meets(case, struck)
    assert np.isnan(out[met]).all()
    exactly(out[~met], before[~met])
    exactly(weights, weights_before)


@given(attention_cases(few_shapes, ["mask"]), seeds)
def test_who_does_not_see_a_value_has_the_gradient_it_had(case, seed):
    struck = np.random.default_rng(seed).random(case.v.shape[:-1]) < 0.3
    cotangent, met = gaussian((*case.q.shape[:-1], case.shape.Hv), seed), meets(case, struck)
    cotangent[met] = 0
    gradients = [
        pull_back((case.q, case.k, v, {}), cotangent, case.rules["mask"], None)
        for v in (case.v, strike(case.v, struck, seed, [np.nan, np.inf]))
    ]
    for got, wanted in zip(gradients[1][:3], gradients[0][:3], strict=True):
        assert np.isfinite(got).all()
        exactly(np.asarray(got)[0], np.asarray(wanted)[0])


@given(attention_cases(few_shapes, LIVE), seeds)
def test_nan_in_a_key_makes_nan_of_those_who_may_see_it_and_of_no_other(case, seed):
    struck = np.random.default_rng(seed).random(case.k.shape[:-1]) < 0.3
    before, met = both(*case.qkv, **case.rules)[0], meets(case, struck)
    for poisons in ([np.nan], [np.inf, -np.inf]):
        out = both(case.q, strike(case.k, struck, seed, poisons), case.v, **case.rules)[0]
        exactly(out[~met], before[~met])
        assert np.isnan(poisons[0]) <= np.isnan(out[met]).all()


@given(attention_cases(few_shapes, ["", *LIVE]), seeds)
def test_nan_in_a_query_makes_nan_of_it_alone_and_of_it_only_if_it_may_see_a_key(case, seed):
    struck = np.random.default_rng(seed).random(case.q.shape[:-1]) < 0.3
    before, hit = both(*case.qkv, **case.rules)[0], struck & case.allowed.any(-1).swapaxes(-1, -2)
    for poisons in ([np.nan], [np.inf, -np.inf]):
        out = both(strike(case.q, struck, seed, poisons), *case.qkv[1:], **case.rules)[0]
        exactly(out[~hit], before[~hit])
        assert np.isnan(poisons[0]) <= np.isnan(out[hit]).all()


@given(few_shapes, seeds)
def test_without_a_mask_nan_stays_in_its_row_group_and_feature(shape, seed):
    q, k, v = qkv(shape, seed)
    before, foul = both(q, k, v)[0], v.copy()
    foul[..., 0, 0, 0] = np.nan
    out = both(q, k, foul)[0]
    group = shape.N // shape.K
    assert np.isnan(out[..., :group, 0]).all()
    exactly(out[..., 1:], before[..., 1:])
    exactly(out[..., group:, :], before[..., group:, :])


@given(attention_cases(few_shapes, ["mask"]), seeds)
def test_nan_in_a_query_that_sees_nothing_reaches_no_gradient(case, seed):
    dead = ~case.allowed.any(-1).swapaxes(-1, -2)
    cotangent = gaussian((*case.q.shape[:-1], case.shape.Hv), seed)
    found = [
        pull_back((q, case.k, case.v, {}), cotangent, case.rules["mask"], None)[1:3]
        for q in (case.q, np.where(dead[..., None], np.float32(np.nan), case.q))
    ]
    for got, wanted in zip(*found, strict=True):
        exactly(np.asarray(got), np.asarray(wanted))


# gradients


def differentiable(combination, seed, dtype="float64"):
    """The arrays that attention has gradients for, and the function of them."""
    given = options(combination, seed, dtype)
    rules = rules_of(combination, given)
    rest = {name: rules.pop(name) for name in ("sinks", "relative", "bias") if name in rules}
    static = {name: rules.pop(name) for name in STATIC if name in rules}
    if "bias" in rest:  # finite differences need all of it finite
        rules["mask"] = Dense(jnp.asarray(given.allowed))
        rest["bias"] = jnp.where(jnp.isneginf(rest["bias"]), jnp.zeros((), dtype), rest["bias"])
    q, k, v = map(jnp.asarray, qkv(combination.shape, seed, dtype))
    return (q, k, v, rest), lambda x, **more: dot_product_attention(*x[:3], **x[3], **rules, **static, **more), given


@pytest.mark.parametrize("combination", [EVERYTHING, COMBINATIONS[5]], ids=str)
def test_backward_is_the_adjoint_of_forward_and_rematerialised_the_same(combination, x64):
    arrays, attention, given = differentiable(combination, 1)
    tangent = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape)), arrays)

    @jax.jit
    def products(arrays, tangent, cotangent):
        out, pushed = jax.jvp(attention, (arrays,), (tangent,))
        pulled = jax.vjp(attention, arrays)[1](cotangent)[0]
        again = jax.vjp(jax.checkpoint(attention), arrays)[1](cotangent)[0]
        return out, pushed, pulled, again

    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal((*arrays[0].shape[:-1], combination.shape.Hv)))
    out, pushed, pulled, again = products(arrays, tangent, cotangent)
    pairs = zip(jax.tree.leaves(tangent), jax.tree.leaves(pulled), strict=True)
    terms = [np.vdot(a, b) for a, b in pairs]
    assert abs(np.vdot(pushed, cotangent) - sum(terms)) <= 1e-12 * np.abs(terms).sum()
    for a, b in zip(jax.tree.leaves(pulled), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)
    dead = ~given.allowed.any(-1).swapaxes(-1, -2)
    assert (np.asarray(out)[dead] == 0).all()
    assert (np.asarray(pulled[0])[dead] == 0).all()


SMALL = COMBINATIONS[3]._replace(shape=AttentionShape((2,), 3, 2, 2, 1, 2, 1))


def test_gradients_are_those_of_finite_differences(x64):
    """Of q, k, v, bias, sinks and the rows of relative positions, through a soft cap and a mask with dead rows."""
    arrays, attention, given = differentiable(SMALL, 5)
    assert not given.allowed.any(-1).all()
    assert given.allowed.sum(-1).max() == 2
    assert set(arrays[3]) == {"sinks", "relative", "bias"}
    leaves, structure = jax.tree.flatten(arrays)
    check_grads(jax.jit(lambda *x: attention(jax.tree.unflatten(structure, x))), leaves, order=2, modes=["rev"])


def test_a_dead_row_has_no_gradient_in_anything(x64):
    arrays, attention, given = differentiable(EVERYTHING, 1)
    dead = ~given.allowed.any(-1).swapaxes(-1, -2)[..., None]
    assert dead[0].all()
    cotangent = np.where(dead, np.random.default_rng(0).standard_normal((*arrays[0].shape[:-1], 3)), 0)
    gradients = jax.jit(lambda x, c: jax.vjp(attention, x)[1](c)[0])(arrays, cotangent)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradients))
    assert len(jax.tree.leaves(gradients)) == 7


@given(seeds)
def test_gradients_in_float32_err_little_more_than_those_of_the_plain_formula(seed):
    shape = SQUARE_SHAPES[0]
    cotangent = gaussian((*shape.batch, shape.T, shape.N, shape.Hv), seed)
    exact = [np.float64(x) for x in plain_gradients(*(np.float64(x) for x in qkv(shape, seed)), np.float64(cotangent))]
    got = ours(*qkv(shape, seed), cotangent)
    plain = plain_gradients(*qkv(shape, seed), cotangent)
    for a, b, c in zip(got, plain, exact, strict=True):
        allowance = 4 * np.abs(b - c).max() + 32 * U * np.abs(c).max()
        assert np.abs(a - c).max() <= allowance


@jax.jit
def ours(q, k, v, cotangent):
    return jax.vjp(lambda *x: dot_product_attention(*x, causal=True), q, k, v)[1](cotangent)


def plain_gradients(q, k, v, cotangent):
    """Those of causal attention, worked out by hand in NumPy, in the dtype of the arrays."""
    scale = q.dtype.type(1 / math.sqrt(q.shape[-1]))
    logits = np.einsum("btnh,bsnh->bnts", q, k) * scale
    logits = np.where(np.tri(q.shape[1], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    d_weights = np.einsum("btnh,bsnh->bnts", cotangent, v)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_v = np.einsum("bnts,btnh->bsnh", weights, cotangent)
    return np.einsum("bnts,bsnh->btnh", d_logits, k), np.einsum("bnts,btnh->bsnh", d_logits, q), d_v


# under JAX's own checks


CHECKS = {
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "leaks": jax.checking_leaks,
    "keys": lambda: jax.debug_key_reuse(True),
}


@pytest.mark.parametrize("check", CHECKS)
def test_attention_is_clean_under_jaxs_own_checks(check):
    """With all options, dead rows, dropout and gradients."""
    arrays, attention, _ = differentiable(EVERYTHING, 1, "float32")

    def loss(arrays, key):
        return attention(arrays, dropout_rate=0.5, dropout_key=key).sum()

    with CHECKS[check]():
        gradients = jax.jit(jax.grad(loss))(arrays, jax.random.key(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("queries", "keys"), [(0, 2), (3, 0)])
def test_all_options_take_nothing(queries, keys):
    shape = AttentionShape((2,), queries, keys, 6, 3, 5, 3)
    nothing = np.ones((2, 6, queries, keys), bool)
    given = options(COMBINATIONS[5]._replace(shape=shape, names="sinks shaw window"), 0, "float32")
    given = given._replace(real=nothing[:, 0, 0] if queries else np.ones((2, keys), bool), cells=nothing)
    given = given._replace(prefix=np.zeros(2, "int32"), bias=np.zeros(nothing.shape, "float32"))
    rules = rules_of(EVERYTHING._replace(shape=shape), given)
    out, weights = both(*qkv(shape, 0), **rules)
    exactly(out, np.zeros((2, queries, 6, 3), "float32"))
    assert weights.shape == nothing.shape


def test_every_two_options_meet_in_a_combination():
    names = ["mask", "bias", "causal", "window", "sinks", "alibi", "shaw", "cap", "scale"]
    met = set()
    for combination in COMBINATIONS:
        used = set(combination.names.split())
        used |= {name for name, x in (("cap", combination.soft_cap), ("scale", combination.scale)) if x is not None}
        met |= {frozenset((a, b)) for a in used for b in used if a != b}
    wanted = {frozenset((a, b)) for a in names for b in names if a != b} - {frozenset(("alibi", "shaw"))}
    assert met >= wanted, wanted - met
