"""Where implementations part ways: rows without keys, NaN behind masks, huge numbers, and input without a meaning."""

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Attention
from conformance.bounds import float32_attention
from conformance.cases import FEW, SQUARE, Case, Shape, cases, gaussian, make_case, qkv, seeds
from conformance.law import law, refuses, require, same_bits, within
from conformance.laws.attention import low_precision_cases

SEVERAL = [Shape((1,), 2, 2, 1, 1, 2, 2), Shape((2,), 3, 5, 4, 2, 3, 3)]


def dead_row(case: Case) -> np.ndarray:
    """A mask under which query 0 sees nothing and the others all."""
    return np.broadcast_to(np.arange(case.shape.T)[:, None] > 0, case.shape.logits)


def mean_of_all_values(attend, case: Case) -> None:
    """The convention of a finite fill value: the row falls back to equal weights."""
    values = np.repeat(case.v, case.shape.N // case.shape.K, axis=-2)
    out = attend(*case.qkv, mask=dead_row(case))[..., 0, :, :]
    within(out, np.asarray(values, np.float64).mean(axis=-3), 1e-6 * np.abs(values).max())


@law(Attention, "mask", cases=cases(shapes=SEVERAL), conventions={"the mean of all values": mean_of_all_values})
def a_query_with_nothing_to_see_gives_zero(attend, case):
    out = attend(*case.qkv, mask=dead_row(case))[..., 0, :, :]
    same_bits(out, np.zeros_like(out))


@law(Attention, "mask", cases=cases(shapes=SEVERAL))
def a_query_with_nothing_to_see_leaves_the_others_alone(attend, case):
    mask = dead_row(case)
    out = attend(*case.qkv, mask=mask)
    wanted, limit = oracle.attention(*case.qkv, mask=mask), float32_attention(*case.qkv, mask=mask)
    within(out[..., 1:, :, :], wanted[..., 1:, :, :], limit[..., 1:, :, :])


@law(Attention, "bias", cases=cases(shapes=SEVERAL))
def a_row_of_minus_infinity_in_the_bias_gives_zero(attend, case):
    bias = np.where(dead_row(case), np.float32(0), np.float32(-np.inf))
    out = attend(*case.qkv, bias=bias)[..., 0, :, :]
    same_bits(out, np.zeros_like(out))


def unseen(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A mask that hides key 0 from every query, and where that key stands in k and v."""
    mask = np.broadcast_to(np.arange(case.shape.S) > 0, case.shape.logits)
    return mask, (np.arange(case.shape.S) == 0)[:, None, None]


def poisoned(attend, case: Case, which: tuple[str, ...]) -> None:
    """NaN, infinity or a huge number in a key that no query sees is as a zero there."""
    mask, there = unseen(case)
    clean = [case.q, *(np.where(there, np.float32(0), x) for x in (case.k, case.v))]
    wanted = attend(*clean, mask=mask)
    for poison in np.array([np.nan, np.inf, 1e38], np.float32):
        k, v = (
            np.where(there, poison, x) if name in which else y
            for name, x, y in zip("kv", (case.k, case.v), clean[1:], strict=True)
        )
        same_bits(attend(case.q, k, v, mask=mask), wanted, f"the output with {poison} behind the mask")


@law(Attention, "mask", cases=cases(shapes=SEVERAL))
def a_key_that_no_query_sees_may_hold_anything(attend, case):
    poisoned(attend, case, ("k",))


@law(Attention, "mask", cases=cases(shapes=SEVERAL))
def a_value_that_no_query_sees_may_hold_anything(attend, case):
    """0 * NaN is NaN in a plain weighted sum."""
    poisoned(attend, case, ("v",))


@law(Attention, "mask", cases=cases(shapes=SEVERAL))
def nan_in_a_key_reaches_only_the_queries_that_see_it(attend, case):
    reaches(attend, case, "k")


def spreads(attend, case: Case) -> None:
    """The convention of IEEE sums: 0 * NaN is NaN, for all queries of a head if any sees the value."""
    mask, there = half_seen(case)
    out = attend(case.q, case.k, np.where(there, np.float32(np.nan), case.v), mask=mask)
    require(np.isnan(out), "every query must give NaN")


@law(
    Attention,
    "mask",
    cases=cases(shapes=SEVERAL),
    conventions={"a NaN that any query sees reaches all (0 * NaN)": spreads},
)
def nan_in_a_value_reaches_only_the_queries_that_see_it(attend, case):
    reaches(attend, case, "v")


def half_seen(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A mask under which query 0 alone sees key 0, and where that key stands."""
    hidden = (np.arange(case.shape.T)[:, None] > 0) & (np.arange(case.shape.S) == 0)
    return np.broadcast_to(~hidden, case.shape.logits), (np.arange(case.shape.S) == 0)[:, None, None]


def reaches(attend, case: Case, name: str) -> None:
    mask, there = half_seen(case)
    before = attend(*case.qkv, mask=mask)
    k, v = (np.where(there, np.float32(np.nan), x) if n == name else x for n, x in (("k", case.k), ("v", case.v)))
    out = attend(case.q, k, v, mask=mask)
    require(np.isnan(out[..., 0, :, :]), "a NaN that a query sees must show in its output")
    same_bits(out[..., 1:, :, :], before[..., 1:, :, :], "the output of queries that do not see the NaN")


@law(Attention, cases=cases(shapes=FEW))
def nan_in_a_query_stays_in_its_row(attend, case):
    before = attend(*case.qkv)
    q = case.q.copy()
    q[..., 0, :, :] = np.nan
    out = attend(q, case.k, case.v)
    require(np.isnan(out[..., 0, :, :]), "a query of NaN must give NaN")
    same_bits(out[..., 1:, :, :], before[..., 1:, :, :], "the output of the other queries")


# sizes


def steep(case: Case, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys along one axis whose products reach +-size**2, those of the keys all distinct."""
    q, k = np.zeros_like(case.q), np.zeros_like(case.k)
    q[..., 0] = size * np.where(case.q[..., 0] < 0, -1, 1)
    k[..., 0] = size * np.linspace(-1, 1, case.shape.S, dtype="float32")[:, None]
    return q, k


@law(Attention, cases=cases(shapes=SEVERAL), max_examples=10)
def huge_logits_give_the_value_of_the_largest(attend, case):
    for size in (1e4, 1e15):
        q, k = steep(case, size)
        within(attend(q, k, case.v), oracle.attention(q, k, case.v), 1e-6, f"the output at logits of {size**2:g}")


@law(Attention, cases=cases(shapes=[Shape((1,), 2, 2, 1, 1, 16, 16)]), max_examples=5)
def logits_that_fit_once_scaled_do_not_overflow_before(attend, case):
    """A product of 8e38 is beyond float32, a quarter of it is not."""
    q, k = steep(case, 8e38**0.5)
    within(attend(q, k, case.v), oracle.attention(q, k, case.v), 1e-6)


@law(
    Attention,
    "mask",
    cases=cases(shapes=[Shape((1,), 2, 2, 1, 1, 1, 1), Shape((2,), 3, 4, 2, 2, 1, 1)]),
    max_examples=5,
)
def a_visible_key_beats_a_hidden_one_however_low_its_logit(attend, case):
    """A fill value above the lowest float lets the hidden key win."""
    q, k = np.zeros_like(case.q), np.zeros_like(case.k)
    q[..., 0], k[..., 1:, :, 0] = -1.6e19, 2e19
    mask, _ = unseen(case)
    within(attend(q, k, case.v, mask=mask), oracle.attention(q, k, case.v, mask=mask), 1e-5)


@law(Attention, "float16", cases=low_precision_cases(("float16",)))
def float16_logits_above_65504_do_not_overflow(attend, case):
    q, k, v = (200 * case[0], 200 * case[1], case[2])
    require(np.isfinite(attend(q, k, v)), "finite float16 queries and keys must give finite numbers, got NaN")


@law(Attention, "float16", "mask", cases=low_precision_cases(("float16",)))
def a_mask_in_float16_needs_no_number_that_overflows(attend, case):
    q, k, v = case
    mask = np.broadcast_to(np.arange(k.shape[-3]) > 0, (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3]))
    out = attend(q, k, v, mask=mask)
    within(out, oracle.attention(q, k, v, mask=mask), 0.02 * np.abs(np.asarray(v, np.float64)).max())


# nothing there


@law(
    Attention,
    "empty",
    cases=lambda attend: st.builds(lambda seed: make_case(SQUARE[1].within(attend), seed), seeds),
    max_examples=2,
)
def no_keys_give_zeros_and_no_queries_nothing(attend, case):
    q, k, v = case.qkv
    out = attend(q, k[..., :0, :, :], v[..., :0, :, :])
    same_bits(out, np.zeros((*q.shape[:-1], v.shape[-1]), "float32"), "the output without keys")
    out = attend(q[..., :0, :, :], k, v)
    same_bits(out, np.zeros((*q.shape[:-3], 0, q.shape[-2], v.shape[-1]), "float32"), "the output without queries")


# no meaning

CUBE = Shape((3,), 3, 3, 3, 3, 3, 3)
"""All sizes equal, so that a mask of any rank would broadcast."""
cubes = lambda attend: st.builds(lambda seed: make_case(CUBE, seed), seeds)


def trailing(attend, case: Case) -> None:
    """The convention of NumPy: missing axes stand in front."""
    for rank in (2, 3):
        mask = gaussian((3,) * rank, 1) < 0.8
        mask[..., 0] = True
        full = np.broadcast_to(mask, case.shape.logits)
        limit = float32_attention(*case.qkv, mask=full)
        within(attend(*case.qkv, mask=mask), oracle.attention(*case.qkv, mask=full), limit)


def without_heads(attend, case: Case) -> None:
    """The convention of a call that is mapped over the batch."""
    mask = gaussian((3, 3, 3), 1) < 0.8
    mask[..., 0] = True
    full = np.broadcast_to(mask[:, None], case.shape.logits)
    limit = float32_attention(*case.qkv, mask=full)
    within(attend(*case.qkv, mask=mask), oracle.attention(*case.qkv, mask=full), limit)
    refuses(lambda: attend(*case.qkv, mask=mask[0]), "a mask [T, S]")


@law(
    Attention,
    "mask",
    cases=cubes,
    max_examples=3,
    conventions={
        "axes that a mask lacks stand in front": trailing,
        "a mask [B, T, S] serves all heads": without_heads,
    },
)
def a_mask_of_another_rank_is_refused(attend, case):
    """A padding mask [B, S] would be read as [T, S] wherever B = T."""
    for rank in (2, 3):
        mask = np.ones((3,) * rank, bool)
        refuses(lambda mask=mask: attend(*case.qkv, mask=mask), f"a mask of shape {list(mask.shape)}")


def added(attend, case: Case) -> None:
    """The convention of torch: a float mask is a bias."""
    mask = gaussian(case.shape.logits, 2)
    limit = float32_attention(*case.qkv, bias=mask)
    within(attend(*case.qkv, mask=mask), oracle.attention(*case.qkv, bias=mask), limit)


@law(Attention, "mask", cases=cubes, max_examples=3, conventions={"a float mask is added to the logits": added})
def a_float_mask_is_refused(attend, case):
    """Read as bool, the additive mask 0 / -1e9 shows what it should hide."""
    mask = np.where(gaussian(case.shape.logits, 1) < 0, np.float32(-1e9), np.float32(0))
    refuses(lambda: attend(*case.qkv, mask=mask), "a float mask of 0 and -1e9")


def as_floats(attend, case: Case) -> None:
    """The convention of promotion: the result is that of the same numbers as floats."""
    arrays = [(4 * x).astype(np.int32) for x in case.qkv]
    floats = [x.astype(np.float32) for x in arrays]
    within(attend(*arrays), oracle.attention(*floats), float32_attention(*floats))


@law(Attention, cases=cases(shapes=FEW), max_examples=5, conventions={"integers are taken as floats": as_floats})
def integers_are_refused(attend, case):
    """As integers, all weights below 1 are 0."""
    arrays = [(4 * x).astype(np.int32) for x in case.qkv]
    refuses(lambda: attend(*arrays), "integer q, k and v")


@law(Attention, "grouped heads", cases=lambda attend: st.just(Shape((1,), 2, 2, 4, 3, 2, 2)), max_examples=1)
def heads_that_do_not_divide_are_refused(attend, shape):
    refuses(lambda: attend(*qkv(shape, 0)), "4 query heads over 3 key heads")
