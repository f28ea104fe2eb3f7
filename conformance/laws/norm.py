"""Layer norm and RMS norm."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Norm
from conformance.bounds import float32_norm
from conformance.cases import gaussian, seeds
from conformance.law import law, require, same_bits, within

SHAPES = [(2, 4), (3, 5), (2, 3, 16), (1, 7), (6,)]


class Case(NamedTuple):
    """Rows to norm and the parameters."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    epsilon: float


def cases(mean: float = 0.0, size: float = 1.0, shapes=SHAPES):
    """Rows of the given mean and standard deviation."""

    def build(shape, seed):
        x = gaussian(shape, seed, 0, scale=size) + np.float32(mean)
        return Case(x, gaussian(shape[-1:], seed, 1), gaussian(shape[-1:], seed, 2), 1e-5)

    return lambda adapter: st.builds(build, st.sampled_from(shapes), seeds)


def apply(norm, case: Case, **changes) -> np.ndarray:
    """The norm with the parameters that it takes."""
    case = case._replace(**changes)
    return norm(case.x, case.scale, *([case.bias] if "bias" in norm.can else []), epsilon=case.epsilon)


def formula(norm, case: Case) -> None:
    bias, centre = case.bias if "bias" in norm.can else 0.0, "centre" in norm.can
    arguments = (case.x, case.scale, bias, case.epsilon, centre)
    within(apply(norm, case), oracle.norm(*arguments), float32_norm(*arguments))


@law(Norm, cases=cases())
def the_output_has_variance_one_before_scale_and_bias(norm, case):
    """The formula, within the float32 bound of float64."""
    formula(norm, case)


@law(Norm, "centre", cases=cases(mean=1e3))
def a_mean_of_a_thousand_costs_no_more_than_rounding(norm, case):
    """E[x^2] - E[x]^2 loses all digits there; centred values do not."""
    formula(norm, case)


@law(Norm, cases=cases(size=1e-3))
def epsilon_stands_under_the_root(norm, case):
    """It matters where the variance is as small as itself."""
    formula(norm, case)


@law(Norm, cases=cases(shapes=SHAPES[:3]), max_examples=10)
def rows_do_not_meet(norm, case):
    before = apply(norm, case)
    x = case.x.copy()
    x[1:] = gaussian(x[1:].shape, 3, scale=1e3)
    same_bits(apply(norm, case, x=x)[:1], before[:1])


@law(Norm, cases=cases(shapes=SHAPES[:2]), max_examples=5)
def equal_numbers_in_a_row_give_no_nan(norm, case):
    x = np.full_like(case.x, 3.25)
    require(np.isfinite(apply(norm, case, x=x)), "a row of equal numbers must give finite numbers")
    if "centre" in norm.can:
        wanted = np.broadcast_to(case.bias if "bias" in norm.can else np.float32(0), x.shape)
        within(apply(norm, case, x=x), wanted, 1e-3)


@law(Norm, "jax", cases=cases(shapes=SHAPES[:1]), max_examples=5)
def equal_numbers_in_a_row_have_finite_gradients(norm, case):
    x = np.full_like(case.x, 3.25)
    arrays = [x, case.scale, *([case.bias] if "bias" in norm.can else [])]
    for gradient in norm.pull_back(gaussian(x.shape, 4), *arrays, epsilon=case.epsilon):
        require(np.isfinite(gradient), "gradients at a row of equal numbers must be finite")


def _cast(case: Case, dtype) -> Case:
    return case._replace(x=case.x.astype(dtype), scale=case.scale.astype(dtype), bias=case.bias.astype(dtype))


@law(Norm, "bfloat16", cases=cases(mean=4.0, shapes=[(2, 16), (3, 5)]), max_examples=10)
def bfloat16_is_normed_in_float32(norm, case):
    """One rounding at the end, not one at each step."""
    import ml_dtypes

    low = _cast(case, ml_dtypes.bfloat16)
    wide = _cast(low, "float32")
    bias = wide.bias if "bias" in norm.can else 0.0
    wanted = oracle.norm(wide.x, wide.scale, bias, wide.epsilon, "centre" in norm.can)
    out = apply(norm, low)
    require(out.dtype == low.x.dtype, f"the output must have the input's dtype bfloat16, got {out.dtype}")
    # of the product a rounding, of the sum one more
    within(out, wanted, 2.0**-8 * (1.01 * np.abs(wanted) + np.abs(bias) + 1e-3))
