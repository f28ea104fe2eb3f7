"""Dropout of an array."""

import numpy as np
from hypothesis import strategies as st

from conformance.adapters import Dropout
from conformance.cases import gaussian
from conformance.law import Violation, law, refuses, require, same_bits, within

RATE = 0.25
X = 1 + np.abs(gaussian((4, 8, 64), 0))
seeds = lambda drop: st.integers(0, 1000).map(np.uint32)


@law(Dropout, cases=seeds, max_examples=5)
def its_share_of_the_elements_is_dropped(drop, seed):
    kept = drop(X, rate=RATE, seed=seed) != 0
    within(kept.mean(), np.float64(1 - RATE), 6 * (RATE * (1 - RATE) / kept.size) ** 0.5, "the share that is kept")


@law(Dropout, cases=seeds, max_examples=5)
def what_is_kept_is_divided_by_the_rate_that_is_kept(drop, seed):
    out = drop(X, rate=RATE, seed=seed)
    within(out, np.where(out == 0, 0, np.asarray(X, np.float64) / (1 - RATE)), 1e-6 * X)


@law(Dropout, cases=seeds, max_examples=5)
def elements_are_dropped_independently(drop, seed):
    """No two rows or columns of the array are dropped alike."""
    kept = drop(X, rate=RATE, seed=seed) != 0
    chance = RATE**2 + (1 - RATE) ** 2
    for axis in range(kept.ndim):
        rows = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1)
        agreement = (rows[0] == rows[1:]).mean(axis=-1)
        sigma = (chance * (1 - chance) / rows.shape[1]) ** 0.5
        within(agreement, np.full_like(agreement, chance), 6 * sigma, f"how often slices of axis {axis} agree")


@law(Dropout, cases=seeds, max_examples=5)
def the_same_seed_drops_the_same_and_another_does_not(drop, seed):
    first = drop(X, rate=RATE, seed=seed)
    same_bits(drop(X, rate=RATE, seed=seed), first)
    other = drop(X, rate=RATE, seed=seed + np.uint32(1))
    require(((first != 0) != (other != 0)).mean() > 0.2, "another seed must drop other elements")


@law(Dropout, cases=seeds, max_examples=2)
def a_rate_of_zero_drops_nothing(drop, seed):
    same_bits(drop(X, rate=0.0, seed=seed), X)


@law(Dropout, cases=seeds, max_examples=2)
def evaluation_drops_nothing_and_leaves_training_as_it_was(drop, seed):
    before = drop(X, rate=RATE, seed=seed)
    require((before == 0).any(), "training must drop elements")
    same_bits(drop(X, rate=RATE), X, "the output in evaluation")
    same_bits(drop(X, rate=RATE, seed=seed), before, "training after an evaluation")


@law(Dropout, cases=lambda drop: st.sampled_from([-0.5, 1.5, float("nan")]), max_examples=3)
def a_rate_that_is_no_probability_is_refused(drop, rate):
    refuses(lambda: drop(X, rate=rate, seed=np.uint32(0)), f"a dropout rate of {rate}")


def drops_all(drop, rate) -> None:
    """The convention that a rate of 1 leaves nothing."""
    same_bits(drop(X, rate=rate, seed=np.uint32(0)), np.zeros_like(X))


@law(Dropout, cases=lambda drop: st.just(1.0), max_examples=1, conventions={"a rate of 1 drops all": drops_all})
def a_rate_of_one_is_refused(drop, rate):
    """What is kept would be divided by 0."""
    refuses(lambda: drop(X, rate=rate, seed=np.uint32(0)), "a dropout rate of 1")


@law(Dropout, "jax", cases=seeds, max_examples=1)
def a_key_is_used_once(drop, seed):
    """Clean under `jax.debug_key_reuse`."""
    import jax

    try:
        drop.careful(X, rate=RATE, seed=seed)
    except jax.errors.KeyReuseError as error:
        raise Violation(f"a random key must be used once, got {str(error).splitlines()[0]}") from None
