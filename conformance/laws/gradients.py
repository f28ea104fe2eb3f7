"""Gradients of attention: right, zero where nothing is seen, and never NaN."""

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Attention
from conformance.cases import FEW, Case, Shape, any_rules, cases, gaussian, make_case, seeds
from conformance.law import Violation, law, require, same_bits, within
from conformance.laws.edges import SEVERAL, dead_row, unseen

STEP = 1e-5


def float64_cases(attend):
    names = ("mask",) if "mask" in attend.can else ()
    build = lambda shape, seed: make_case(shape.within(attend), seed, names, dtype="float64")
    return st.builds(build, st.sampled_from([Shape((1,), 2, 3, 1, 1, 2, 2), Shape((1,), 2, 2, 4, 2, 2, 2)]), seeds)


@law(Attention, "jax", "float64", cases=float64_cases, max_examples=8)
def gradients_are_those_of_finite_differences_of_the_formula(attend, case):
    """Along one random direction, in float64."""
    cotangent = gaussian((*case.q.shape[:-1], case.shape.Hv), 4, dtype="float64")
    directions = [gaussian(x.shape, 5, i, dtype="float64") for i, x in enumerate(case.qkv)]
    with attend.wide():
        gradients = attend.pull_back(cotangent, *case.qkv, **case.options)
    got = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    ends = [
        oracle.attention(*(x + sign * STEP * d for x, d in zip(case.qkv, directions, strict=True)), **case.options)
        for sign in (1, -1)
    ]
    wanted = (cotangent * (ends[0] - ends[1])).sum() / (2 * STEP)
    within(np.asarray(got), np.asarray(wanted), 1e-6 * (1 + abs(wanted)), "the derivative along a direction")


@law(Attention, "jax", cases=any_rules(FEW[1:2]), max_examples=8)
def a_query_has_no_derivative_in_what_it_may_not_see(attend, case):
    """Of the output of each query by hidden keys, hidden values and other queries: exactly 0."""
    for t in range(case.shape.T):
        cotangent = np.zeros((*case.q.shape[:-1], case.shape.Hv), "float32")
        cotangent[..., t, :, :] = gaussian(cotangent[..., t, :, :].shape, 6)
        dq, dk, dv = attend.pull_back(cotangent, *case.qkv, **case.options)
        hidden = ~case.grouped[..., t, :].swapaxes(-1, -2)[..., None]
        others = np.delete(dq, t, axis=-3)
        same_bits(others, np.zeros_like(others), "the derivative by other queries")
        for name, gradient in (("keys", dk), ("values", dv)):
            same_bits(np.where(hidden, gradient, 0), np.zeros_like(gradient), f"the derivative by hidden {name}")


def first_query(case: Case) -> np.ndarray:
    """A cotangent of query 0 alone."""
    cotangent = np.zeros((*case.q.shape[:-1], case.shape.Hv), "float32")
    cotangent[..., 0, :, :] = gaussian(cotangent[..., 0, :, :].shape, 6)
    return cotangent


def that_of_the_mean(attend, case: Case) -> None:
    """The convention of a finite fill value: each hidden value gets its share."""
    cotangent, shape = first_query(case), case.shape
    dq, dk, dv = attend.pull_back(cotangent, *case.qkv, mask=dead_row(case))
    share = cotangent[..., :1, :, :].reshape(*shape.batch, 1, shape.K, -1, shape.Hv).sum(axis=-2) / shape.S
    within(dv, np.broadcast_to(share, dv.shape), 1e-5)
    same_bits(dq, np.zeros_like(dq))
    same_bits(dk, np.zeros_like(dk))


@law(
    Attention,
    "jax",
    "mask",
    cases=cases(shapes=SEVERAL),
    max_examples=12,
    conventions={"that of the mean of all values, so hidden values get one": that_of_the_mean},
)
def a_query_with_nothing_to_see_has_no_gradient(attend, case):
    for name, gradient in zip("qkv", attend.pull_back(first_query(case), *case.qkv, mask=dead_row(case)), strict=True):
        same_bits(gradient, np.zeros_like(gradient), f"the gradient by {name}")


@law(Attention, "jax", "mask", cases=cases(shapes=SEVERAL), max_examples=12)
def no_gradient_is_nan_beside_a_query_with_nothing_to_see(attend, case):
    cotangent = gaussian((*case.q.shape[:-1], case.shape.Hv), 6)
    for gradient in attend.pull_back(cotangent, *case.qkv, mask=dead_row(case)):
        require(np.isfinite(gradient), "gradients must be finite")


@law(Attention, "jax", "mask", cases=cases(shapes=SEVERAL), max_examples=12)
def nan_behind_the_mask_leaves_gradients_finite(attend, case):
    mask, there = unseen(case)
    k, v = (np.where(there, np.float32(np.nan), x) for x in (case.k, case.v))
    cotangent = gaussian((*case.q.shape[:-1], case.shape.Hv), 6)
    for name, gradient in zip("qkv", attend.pull_back(cotangent, case.q, k, v, mask=mask), strict=True):
        require(np.isfinite(gradient), f"the gradient by {name} must be finite")


@law(Attention, "jax", "mask", cases=cases(shapes=[SEVERAL[0]]), max_examples=2)
def no_nan_is_made_on_the_way(attend, case):
    """Forward and backward, of finite numbers, with a row that sees nothing: what hides a NaN need not exist."""
    try:
        attend.careful(*case.qkv, mask=dead_row(case))
    except FloatingPointError as error:
        raise Violation(f"no operation may make nan, got {str(error).splitlines()[0]}") from None
