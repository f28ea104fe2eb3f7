"""Dropout inside of attention: it acts on the weights, by its seed, and changes nothing else."""

import functools

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Attention
from conformance.cases import SQUARE, Shape, any_options, cases, make_case, offered, qkv
from conformance.law import law, refuses, require, same_bits, within
from conformance.laws.attention import bound, low_precision_cases

MANY = Shape((4,), 16, 32, 4, 4, 32, 32)
seeds = st.integers(0, 1000).map(np.uint32)
RATE = 0.4


@functools.cache
def exact_weights() -> np.ndarray:
    q, k, _ = qkv(MANY, 0)
    return oracle.softmax(oracle.scores(q, k))


def dropped_weights(attend, seed: np.uint32, rate: float = RATE) -> np.ndarray:
    """The weights [4, 4, 16, 32] as dropout left them, read off with values that are one-hot."""
    q, k, v = qkv(MANY, 0)
    one_hot = np.ascontiguousarray(np.broadcast_to(np.eye(32, dtype="float32")[:, None], v.shape))
    return attend(q, k, one_hot, dropout_rate=rate, dropout_seed=seed).swapaxes(-2, -3)


@law(Attention, "dropout", cases=lambda attend: seeds, max_examples=3)
def dropout_is_applied_to_its_share_of_the_weights(attend, seed):
    kept = dropped_weights(attend, seed) != 0
    sigma = (RATE * (1 - RATE) / kept.size) ** 0.5
    within(kept.mean(), np.float64(1 - RATE), 6 * sigma, "the share of weights that are kept")


def shared(attend, seed) -> None:
    """The convention of a broadcast mask: one for all rows of the batch and all heads."""
    kept = dropped_weights(attend, seed) != 0
    require(kept == kept[:1, :1], "one mask must serve all rows and heads")
    require(0.3 < kept[0, 0].mean() < 0.9, "and it must drop its share")


@law(
    Attention,
    "dropout",
    cases=lambda attend: seeds,
    max_examples=3,
    conventions={"one mask is shared by the rows of the batch and the heads": shared},
)
def dropout_differs_between_rows_of_the_batch_heads_and_queries(attend, seed):
    kept = dropped_weights(attend, seed) != 0
    chance = RATE**2 + (1 - RATE) ** 2
    for what, axis in (("rows of the batch", 0), ("heads", 1), ("queries", 2)):
        rows = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1)
        agreement = (rows[0] == rows[1:]).mean(axis=-1)
        sigma = (chance * (1 - chance) / rows.shape[1]) ** 0.5
        within(agreement, np.full_like(agreement, chance), 6 * sigma, f"how often two {what} are dropped alike")


@law(Attention, "dropout", cases=lambda attend: seeds, max_examples=3)
def kept_weights_are_divided_by_the_rate_that_is_kept(attend, seed):
    dropped = dropped_weights(attend, seed)
    wanted = np.where(dropped == 0, 0, exact_weights() / (1 - RATE))
    within(dropped, wanted, 1e-5 * wanted, "a kept weight")


@law(Attention, "dropout", cases=lambda attend: seeds, max_examples=3)
def the_same_seed_drops_the_same_weights_and_another_does_not(attend, seed):
    first = dropped_weights(attend, seed)
    same_bits(dropped_weights(attend, seed), first)
    other = dropped_weights(attend, seed + np.uint32(1))
    require(((first != 0) != (other != 0)).mean() > 0.3, "another seed must drop other weights")


def all_rules(attend):
    """Under all the rules at once that the adapter offers."""
    return cases(*offered(attend)[-1], shapes=SQUARE[:2])(attend)


@law(Attention, "dropout", cases=all_rules)
def without_a_seed_there_is_no_dropout(attend, case):
    within(attend(*case.qkv, dropout_rate=0.5, **case.options), attend(*case.qkv, **case.options), 2 * bound(case))


@law(Attention, "dropout", cases=lambda attend: seeds, max_examples=3)
def evaluation_does_not_switch_dropout_off_for_good(attend, seed):
    before = dropped_weights(attend, seed)
    require((before == 0).any(), "training must drop weights")
    q, k, v = qkv(MANY, 0)
    attend(q, k, v, dropout_rate=RATE)
    same_bits(dropped_weights(attend, seed), before, "training after an evaluation")


SELDOM = {"dropout_rate": 1e-9, "dropout_seed": np.uint32(0)}
"""A rate that drops nothing, and takes the path of training."""


@law(Attention, "dropout", cases=any_options())
def the_path_of_training_computes_what_that_of_evaluation_does(attend, case):
    out = attend(*case.qkv, **case.options, **SELDOM)
    within(out, attend(*case.qkv, **case.options), 2 * bound(case))


def dead_in_both(attend):
    return st.builds(
        lambda shape, seed: make_case(shape.within(attend), seed, ("mask",), False), st.sampled_from(SQUARE[:2]), seeds
    )


@law(Attention, "dropout", "mask", cases=dead_in_both)
def the_path_of_training_treats_dead_rows_like_that_of_evaluation(attend, case):
    out = attend(*case.qkv, **case.options, **SELDOM)
    within(out, attend(*case.qkv, **case.options), 1e-5 * np.abs(case.v).max())


@law(Attention, "dropout", "bfloat16", cases=low_precision_cases(("bfloat16",)))
def the_path_of_training_is_as_accurate_as_that_of_evaluation_in_bfloat16(attend, case):
    """Within twice its error, and the last rounding."""
    q, k, v = 4 * case[0], case[1], case[2]
    exact = oracle.attention(q, k, v)
    error = np.abs(np.asarray(attend(q, k, v), np.float64) - exact).max()
    within(attend(q, k, v, **SELDOM), exact, 2 * error + 2.0**-8 * np.abs(exact).max())


@law(Attention, "dropout", cases=cases(shapes=SQUARE[:1]), max_examples=1)
def a_rate_outside_of_zero_to_one_is_refused(attend, case):
    for rate in (-0.5, 1.5, float("nan")):
        options = {"dropout_rate": rate, "dropout_seed": np.uint32(0)}
        refuses(lambda options=options: attend(*case.qkv, **options), f"a dropout rate of {rate}")
