"""What attention computes: the weighted mean of the values, by the formula and by its symmetries."""

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Attention
from conformance.bounds import U, float32_attention, low_precision_attention
from conformance.cases import (
    FEW,
    LONG,
    OBLONG,
    SQUARE,
    Case,
    Shape,
    any_rules,
    cases,
    gaussian,
    make_case,
    qkv,
    seeds,
)
from conformance.law import law, require, same_bits, within

ALL = SQUARE + OBLONG


def bound(case: Case, **options) -> np.ndarray:
    """The float32 bound on the case's result."""
    return float32_attention(*case.qkv, **(case.options | options))


def formula(attend, case: Case) -> None:
    """The output is that of float64 within the float32 bound, in the dtype of the values."""
    out = attend(*case.qkv, **case.options)
    require(out.dtype == case.v.dtype, f"the output must have the values' dtype {case.v.dtype}, got {out.dtype}")
    within(out, oracle.attention(*case.qkv, **case.options), bound(case))


# by the formula


@law(Attention, cases=cases(shapes=[*ALL, LONG]))
def the_output_is_the_softmax_weighted_mean_of_the_values(attend, case):
    """softmax(q k^T / sqrt(H)) v, within the float32 bound of float64."""
    formula(attend, case)


@law(Attention, "scale", cases=cases("scale", shapes=FEW))
def scale_takes_the_place_of_one_over_root_h(attend, case):
    formula(attend, case)


@law(Attention, "bias", cases=cases("bias", shapes=[*FEW, SQUARE[3]]))
def the_bias_is_added_to_the_scaled_logits(attend, case):
    formula(attend, case)


@law(Attention, "soft cap", cases=cases("soft cap", shapes=FEW))
def a_soft_cap_bends_the_logits_by_tanh(attend, case):
    formula(attend, case)


@law(Attention, "soft cap", "bias", "combined", cases=cases("soft cap", "bias", shapes=FEW))
def a_soft_cap_comes_before_the_bias(attend, case):
    formula(attend, case)


@law(Attention, "sinks", cases=cases("sinks", shapes=FEW))
def a_sink_takes_weight_and_gives_no_value(attend, case):
    formula(attend, case)


GROUPED = [Shape((1,), 2, 2, 4, 2, 2, 2), Shape((2,), 3, 5, 6, 3, 5, 5), Shape((1,), 2, 3, 4, 1, 2, 2)]


@law(Attention, "grouped heads", cases=cases(shapes=GROUPED))
def query_head_n_reads_key_head_n_div_group(attend, case):
    """Neighbouring query heads share a key head: keys are repeated, not tiled."""
    formula(attend, case)


@law(Attention, "value width", cases=cases(shapes=[Shape((1,), 2, 3, 1, 1, 2, 5), Shape((2,), 3, 3, 2, 2, 4, 1)]))
def values_may_be_wider_or_narrower_than_keys(attend, case):
    formula(attend, case)


@law(
    Attention,
    "leading axes",
    cases=cases(
        shapes=[Shape((), 2, 3, 1, 1, 2, 2), Shape((2, 3), 2, 2, 2, 2, 2, 2), Shape((2, 1, 2), 2, 3, 1, 1, 3, 3)]
    ),
)
def there_may_be_any_number_of_leading_axes(attend, case):
    formula(attend, case)


# weights, read off with values that are one-hot


def weights_of(attend, case: Case) -> np.ndarray:
    """The weights [*B, N, T, S] of a case with H = Hv = S."""
    one_hot = np.eye(case.shape.S, dtype="float32")[:, None]
    out = attend(case.q, case.k, np.broadcast_to(one_hot, case.v.shape), **case.options)
    return out.swapaxes(-2, -3)


READABLE = [Shape((1,), 2, 2, 1, 1, 2, 2), Shape((2,), 3, 3, 4, 2, 3, 3)]


@law(Attention, cases=any_rules(READABLE))
def the_weights_of_a_row_sum_to_one(attend, case):
    """Over the keys that the query may see."""
    sums = weights_of(attend, case).astype("float64").sum(axis=-1)
    within(sums, np.ones_like(sums), (case.shape.S + 2) * U, "the sum of a row's weights")


@law(Attention, "mask", cases=any_rules(READABLE))
def a_hidden_key_weighs_exactly_nothing(attend, case):
    weights = weights_of(attend, case)
    same_bits(np.where(case.allowed, 0, weights), np.zeros_like(weights), "the weight of a hidden key")
    require(weights >= 0, f"weights must not be negative, got {weights.min()}")


@law(Attention, cases=any_rules())
def the_output_lies_between_the_allowed_values(attend, case):
    out = attend(*case.qkv, **case.options)
    values = np.repeat(case.v, case.shape.N // case.shape.K, axis=-2).swapaxes(-2, -3)[..., None, :, :]
    allowed = case.allowed[..., None]
    lowest = np.where(allowed, values, np.inf).min(axis=-2).swapaxes(-2, -3)
    highest = np.where(allowed, values, -np.inf).max(axis=-2).swapaxes(-2, -3)
    within(out, np.clip(out, lowest, highest), bound(case), "the output, against the range of the values,")


@law(Attention, "mask", cases=cases(shapes=FEW))
def a_single_visible_key_gives_its_value(attend, case):
    chosen = (np.arange(case.shape.T)[:, None] + np.arange(case.shape.N)) % case.shape.S
    mask = np.broadcast_to(chosen.T[..., None] == np.arange(case.shape.S), case.shape.logits)
    values = np.repeat(case.v, case.shape.N // case.shape.K, axis=-2)
    wanted = np.take_along_axis(values, np.broadcast_to(chosen[..., None], (*case.q.shape[:-1], 1)), axis=-3)
    same_bits(attend(*case.qkv, mask=mask), wanted)


# symmetries


@law(Attention, cases=any_rules())
def rows_of_the_batch_and_heads_do_not_meet(attend, case):
    """All else being replaced, one head of one row keeps its output."""
    before = attend(*case.qkv, **case.options)
    group, others = case.shape.N // case.shape.K, []
    for i, x in enumerate(case.qkv):
        mine = np.zeros(x.shape, bool)
        mine[(*(0 for _ in case.shape.batch), slice(None), slice(0, group if i == 0 else 1))] = True
        others.append(np.where(mine, x, gaussian(x.shape, 1, i, scale=1e3)))
    mine = (*(0 for _ in case.shape.batch), slice(None), slice(0, group))
    same_bits(attend(*others, **case.options)[mine], before[mine])


@law(Attention, cases=cases(shapes=FEW))
def reordering_the_queries_reorders_the_output(attend, case):
    out = attend(*case.qkv)
    same_bits(attend(case.q[..., ::-1, :, :], case.k, case.v), out[..., ::-1, :, :])


@law(Attention, cases=any_rules())
def reordering_the_keys_changes_nothing(attend, case):
    if {"causal", "window"} & case.options.keys():
        case = make_case(case.shape, 0)
    options = {name: x[..., ::-1] for name, x in case.options.items()}
    moved = attend(case.q, case.k[..., ::-1, :, :], case.v[..., ::-1, :, :], **options)
    within(moved, attend(*case.qkv, **case.options), 2 * bound(case))


@law(Attention, cases=any_rules())
def doubled_or_negated_values_double_or_negate_the_output(attend, case):
    out = attend(*case.qkv, **case.options)
    for factor in np.array([2, -1], np.float32):
        same_bits(attend(case.q, case.k, factor * case.v, **case.options), factor * out)


@law(Attention, cases=any_rules())
def the_output_is_linear_in_the_values(attend, case):
    other = case._replace(v=gaussian(case.v.shape, 5))
    total = case._replace(v=case.v + other.v)
    parts = [attend(*x.qkv, **x.options) for x in (case, other)]
    limit = bound(case) + bound(other) + bound(total) + 2 * U * np.abs(parts).sum(axis=0) + U * np.abs(total.v).max()
    within(attend(*total.qkv, **total.options), np.asarray(parts[0], np.float64) + parts[1], limit)


@law(Attention, cases=any_rules())
def what_queries_lose_in_size_keys_may_win(attend, case):
    """By powers of two nothing is rounded."""
    out = attend(*case.qkv, **case.options)
    for factor in np.array([2.0**8, 2.0**-8], np.float32):
        same_bits(attend(case.q * factor, case.k / factor, case.v, **case.options), out)


@law(Attention, "scale", cases=cases(shapes=FEW))
def a_doubled_scale_is_doubled_queries(attend, case):
    same_bits(attend(*case.qkv, scale=1.0), attend(2 * case.q, case.k, case.v, scale=0.5))


@law(Attention, "bias", cases=cases("bias", shapes=FEW))
def a_bias_equal_for_all_keys_changes_nothing(attend, case):
    flat = np.broadcast_to(case.options["bias"][..., :1], case.shape.logits)
    plain = case._replace(options={})
    within(attend(*case.qkv, bias=flat), attend(*case.qkv), bound(plain) + bound(plain, bias=flat))


@law(Attention, cases=cases(shapes=FEW))
def keys_that_come_twice_change_nothing(attend, case):
    twice = case._replace(k=np.concatenate([case.k] * 2, axis=-3), v=np.concatenate([case.v] * 2, axis=-3))
    within(attend(*twice.qkv), attend(*case.qkv), bound(case) + bound(twice))


# compiled, mapped, precise


@law(Attention, "jax", cases=any_rules(FEW[1:2]), max_examples=2)
def jit_changes_nothing(attend, case):
    within(attend.eager(*case.qkv, **case.options), attend(*case.qkv, **case.options), 2 * bound(case))


@law(Attention, "jax", cases=cases(shapes=[FEW[1]]), max_examples=6)
def vmap_is_a_batch(attend, case):
    arrays = [np.stack([x, gaussian(x.shape, 3, i)]) for i, x in enumerate(case.qkv)]
    rows = np.stack([attend(*(x[i] for x in arrays)) for i in range(2)])
    same_bits(attend.mapped(*arrays), rows)


def float64_cases(attend):
    return st.builds(
        lambda shape, seed: make_case(shape.within(attend), seed, dtype="float64"), st.sampled_from(FEW), seeds
    )


@law(Attention, "float64", cases=float64_cases)
def float64_is_kept(attend, case):
    with attend.wide():
        out = attend(*case.qkv)
    within(out, oracle.attention(*case.qkv), 2 * bound(case) * 2.0**-29)


def low_precision_cases(dtypes: tuple[str, ...]):
    """Shape, seed, dtype and the size of the logits."""

    def strategy(attend):
        offered = [name for name in dtypes if name in attend.can]
        shapes = [Shape((1,), 2, 3, 1, 1, 2, 2), Shape((2,), 5, 16, 2, 2, 8, 8)]
        build = lambda shape, seed, dtype, scale: qkv(shape, seed, _dtype(dtype), scale)
        return st.builds(build, st.sampled_from(shapes), seeds, st.sampled_from(offered), st.sampled_from([1.0, 3.0]))

    return strategy


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def accurate(attend, arrays, **options) -> None:
    """Within twice the error of the plain 16 bit computation, in the values' dtype."""
    q, k, v = arrays
    out = attend(q, k, v, **options)
    require(out.dtype == v.dtype, f"the output must have the values' dtype {v.dtype}, got {out.dtype}")
    within(out, oracle.attention(q, k, v), low_precision_attention(q, k, v))


@law(Attention, "bfloat16", cases=low_precision_cases(("bfloat16",)))
def bfloat16_costs_at_most_twice_the_plain_error(attend, case):
    accurate(attend, case)


@law(Attention, "float16", cases=low_precision_cases(("float16",)))
def float16_costs_at_most_twice_the_plain_error(attend, case):
    accurate(attend, case)
