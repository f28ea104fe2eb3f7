"""Who may see whom: masks, causality, offsets, windows, and what they hide."""

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Attention
from conformance.bounds import float32_attention
from conformance.cases import (
    FEW,
    OBLONG,
    SQUARE,
    Case,
    Shape,
    any_options,
    any_rules,
    cases,
    gaussian,
    make_case,
    seeds,
)
from conformance.law import Violation, law, same_bits, within
from conformance.laws.attention import bound, formula


@law(Attention, "mask", cases=cases("mask", shapes=[*FEW, SQUARE[3]]))
def the_mask_shows_the_keys_where_it_is_true(attend, case):
    formula(attend, case)


@st.composite
def broadcast_masks(draw, attend):
    """A mask of which some axes are 1, each query seeing key 0 at least."""
    shape, seed = SQUARE[1].within(attend), draw(seeds)
    ones = draw(st.sampled_from([(-3, -2), (-2,), (0, -3)]))
    sizes = [1 if i in ones or i - len(shape.logits) in ones else n for i, n in enumerate(shape.logits)]
    mask = np.random.default_rng(seed).random(sizes) < 0.5
    mask[..., 0] = True
    case = make_case(shape, seed)
    return case._replace(options={"mask": mask}, allowed=np.broadcast_to(mask, shape.logits))


@law(Attention, "mask", "broadcast mask", cases=broadcast_masks)
def a_mask_axis_of_one_holds_for_all(attend, case):
    """A padding mask is [B, 1, 1, S]: all heads and queries, each row its own."""
    formula(attend, case)


@law(Attention, "mask", cases=cases(shapes=FEW))
def a_mask_that_is_all_true_is_no_mask(attend, case):
    within(attend(*case.qkv, mask=np.ones(case.shape.logits, bool)), attend(*case.qkv), 2 * bound(case))


@law(Attention, "bias", cases=cases("blocking bias", shapes=FEW))
def minus_infinity_in_the_bias_blocks_a_key(attend, case):
    formula(attend, case)


@law(Attention, "causal", cases=cases("causal", shapes=SQUARE))
def causal_shows_a_query_its_own_and_earlier_positions(attend, case):
    formula(attend, case)


def aligned(offset: str):
    """The check that causal attention without an offset puts the first (or last) query on the first (last) key."""

    def check(attend, case: Case) -> None:
        q_offset = 0 if offset == "first" else case.shape.S - case.shape.T
        out = attend(*case.qkv, causal=True)
        options = {"causal": True, "q_offset": q_offset}
        within(out, oracle.attention(*case.qkv, **options), float32_attention(*case.qkv, **options))

    return check


@law(
    Attention,
    "causal",
    cases=cases(shapes=[OBLONG[0], OBLONG[1]]),
    conventions={
        "the first query stands at the first key (top left)": aligned("first"),
        "the last query stands at the last key (bottom right)": aligned("last"),
    },
)
def causal_with_other_lengths_must_be_told_where_the_queries_stand(attend, case):
    """Both alignments are in use, so neither is a default."""
    try:
        attend(*case.qkv, causal=True)
    except Exception:
        return
    shape = case.shape
    raise Violation(f"causal with T={shape.T}, S={shape.S} and no offset must be refused, got a result")


@law(Attention, "causal", "offset", cases=cases("causal", "offset", shapes=[OBLONG[0], OBLONG[1], SQUARE[1]]))
def an_offset_places_the_queries_of_each_row(attend, case):
    formula(attend, case)


@law(Attention, "window", cases=cases("window", shapes=SQUARE))
def a_window_counts_keys_before_and_after_the_own_position(attend, case):
    """window=(2, 1) without any other rule: four keys at most, two before the own position and one after."""
    formula(attend, case)


@law(Attention, "window", "offset", cases=cases("window", "offset", shapes=[OBLONG[0], OBLONG[1], SQUARE[1]]))
def an_offset_places_the_windows_of_the_queries_too(attend, case):
    formula(attend, case)


@law(Attention, "window", cases=cases(shapes=SQUARE))
def a_window_of_nothing_but_itself_gives_the_own_value(attend, case):
    same_bits(attend(*case.qkv, window=(0, 0)), np.repeat(case.v, case.shape.N // case.shape.K, axis=-2))


@law(Attention, "window", "causal", "combined", cases=cases("causal", shapes=SQUARE))
def a_window_as_long_as_the_keys_is_no_window(attend, case):
    out = attend(*case.qkv, causal=True, window=(case.shape.S - 1, 0))
    within(out, attend(*case.qkv, causal=True), 2 * bound(case))


@law(Attention, "combined", cases=any_options())
def options_hold_together(attend, case):
    """None is dropped because another is given, or because another is not."""
    formula(attend, case)


@law(Attention, "mask", "combined", cases=any_rules())
def what_a_query_may_not_see_does_not_change_it(attend, case):
    unchanged_by_the_hidden(attend, case, {})


@law(Attention, "causal", cases=cases("causal", shapes=SQUARE))
def the_future_does_not_change_the_past(attend, case):
    unchanged_by_the_hidden(attend, case, {})


@law(Attention, "causal", "dropout", cases=cases("causal", shapes=[SQUARE[1]]))
def the_future_does_not_change_the_past_with_dropout_on(attend, case):
    unchanged_by_the_hidden(attend, case, {"dropout_rate": 0.4, "dropout_seed": np.uint32(3)})


def unchanged_by_the_hidden(attend, case: Case, more: dict) -> None:
    """Each query's output stays when all that it may not see is replaced by large numbers."""
    before = attend(*case.qkv, **case.options, **more)
    for t in range(case.shape.T):
        hidden = ~case.grouped[..., t, :].swapaxes(-1, -2)[..., None]
        q = gaussian(case.q.shape, 1, scale=1e3)
        q[..., t, :, :] = case.q[..., t, :, :]
        k, v = (np.where(hidden, gaussian(x.shape, 2, i, scale=1e3), x) for i, x in enumerate((case.k, case.v)))
        out = attend(q, k, v, **case.options, **more)
        same_bits(out[..., t, :, :], before[..., t, :, :], f"the output of query {t}")


@law(Attention, "mask", cases=cases(shapes=[Shape((1,), 2, 3, 1, 1, 2, 2), Shape((2,), 3, 5, 2, 2, 4, 4)]))
def padded_keys_behind_a_mask_change_nothing(attend, case):
    """Batching sequences of different lengths is running each alone."""
    pad = [(0, 0)] * len(case.shape.batch) + [(0, 3), (0, 0), (0, 0)]
    k, v = (np.pad(x, pad, constant_values=7.5) for x in (case.k, case.v))
    mask = np.broadcast_to(np.arange(case.shape.S + 3) < case.shape.S, (*case.shape.logits[:-1], case.shape.S + 3))
    padded = float32_attention(case.q, k, v, mask=mask)
    within(attend(case.q, k, v, mask=mask), attend(*case.qkv), padded + bound(case))


@law(Attention, "mask", cases=cases(shapes=[SQUARE[1]]))
def packed_segments_are_separate_runs(attend, case):
    """Two sequences in one row, told apart by the mask."""
    first, second = slice(0, 2), slice(2, None)
    segment = np.arange(case.shape.T) >= 2
    mask = np.broadcast_to(segment[:, None] == segment, case.shape.logits)
    out = attend(*case.qkv, mask=mask)
    for part in (first, second):
        alone = [x[..., part, :, :] for x in case.qkv]
        limit = float32_attention(*case.qkv, mask=mask)[..., part, :, :] + float32_attention(*alone)
        within(out[..., part, :, :], attend(*alone), limit)


@law(Attention, "mask", cases=cases("mask", shapes=[Shape((1,), 2, 3, 1, 1, 3, 3), Shape((1,), 5, 5, 2, 2, 5, 5)]))
def one_more_visible_key_scales_the_other_weights_by_one_factor(attend, case):
    """Their ratios stay, and none grows."""
    eye = np.broadcast_to(np.eye(case.shape.S, dtype="float32")[:, None], case.v.shape)
    fewer = case.options["mask"].copy()
    fewer[..., -1] = False
    fewer[..., 0] = True
    more = fewer.copy()
    more[..., -1] = True
    before, after = (
        np.asarray(attend(case.q, case.k, eye, mask=m), np.float64).swapaxes(-2, -3) for m in (fewer, more)
    )
    factor = after[..., :1] / before[..., :1]
    slack = sum(float32_attention(case.q, case.k, eye, mask=m).max() for m in (fewer, more)) / before[..., :1]
    within(np.where(fewer, after, 0), np.where(fewer, before * factor, 0), slack, "the weight of another key")
    within(factor, np.minimum(factor, 1), slack, "the common factor")
