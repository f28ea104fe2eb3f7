"""Drawing tokens: what may come, how often each does, and what the seed decides."""

import itertools
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from jaxtyping import Float, Int

from conformance.adapters import Sampling
from conformance.cases import seeds
from conformance.law import law, require, same_bits, within

DRAWS = 8192
"""Rows of one call, all alike, so that one call is many draws."""
RARE = 31.0
"""A right sampler breaks one bound with a probability of at most 2 exp(-RARE) < 1e-13; a run checks a few thousand."""
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
V = 8


class Case(NamedTuple):
    """One row of logits, none near to another, a seed, and the options of the call."""

    logits: Float[np.ndarray, "V"]
    seed: np.uint32
    rules: dict[str, Any]


# what the rules say


def softmax(logits: Float[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    exponentials = np.exp(np.float64(logits) - logits.max())
    return exponentials / exponentials.sum()


def the_highest(p: Float[np.ndarray, "V"], top_k: int) -> Float[np.ndarray, "V"]:
    """The probabilities when only the k highest may come."""
    p = np.where(p >= np.sort(p)[-top_k], p, 0)
    return p / p.sum()


def nucleus(
    p: Float[np.ndarray, "V"], top_p: float, by: Float[np.ndarray, "V"] | None = None
) -> Float[np.ndarray, "V"]:
    """When only the fewest may come whose mass reaches top_p (Holtzman et al. 2020); the mass is that of p or `by`."""
    by, kept, mass = p if by is None else by, np.zeros(len(p), bool), 0.0
    for token in np.argsort(-by):
        if mass >= top_p:
            break
        kept[token] = True
        mass += by[token]
    p = np.where(kept, p, 0)
    return p / p.sum()


def is_clear(p: Float[np.ndarray, "V"], top_p: float) -> bool:
    """No number of tokens has just the mass that is wanted."""
    return bool((np.abs(np.cumsum(np.sort(p)[::-1])[:-1] - top_p) > 1e-3).all())


# laws


def cases(*rules: dict[str, Any], vocab: int = V, of_note=lambda logits, rules: True):
    """Logits in steps of 0.05 to 0.4, in any order, under one of the rules."""

    def build(seed, rules):
        for attempt in itertools.count():
            rng = np.random.default_rng([seed, attempt])
            steps = rng.uniform(0.05, 0.4, vocab) * V / vocab
            logits = rng.permutation(np.cumsum(steps)).round(3).astype("float32")
            if of_note(logits, rules):
                return Case(logits, np.uint32(seed), rules)
        raise AssertionError

    return lambda draw: st.builds(build, seeds, st.sampled_from(rules))


def drawn(draw, case: Case) -> Int[np.ndarray, "B"]:
    return draw(np.tile(case.logits, (DRAWS, 1)), seed=case.seed, **case.rules)


def come_by(draw, case: Case, p: Float[np.ndarray, "V"]) -> None:
    """Tokens of probability 0 never come, and the others as often as they should.

    A count is off by s with a probability of at most 2 exp(-s^2 / 2 / (n p (1 - p) + s / 3)) (Bernstein), and is 0
    with one of at most exp(-n p).
    """
    tokens = drawn(draw, case)
    right = tokens.shape == (DRAWS,) and np.issubdtype(tokens.dtype, np.integer)
    require(right, f"tokens must be whole numbers [{DRAWS}], got {tokens.dtype}{list(tokens.shape)}")
    inside = (tokens >= 0) & (tokens < len(p))
    require(inside, f"tokens must lie in the vocabulary [0, {len(p)}), got {tokens.min()} to {tokens.max()}")
    counts = np.bincount(tokens, minlength=len(p))
    mean = DRAWS * p
    shown = f"of {DRAWS} draws {counts.tolist()}, wanted {mean.round().astype(int).tolist()}"
    never, missed = (counts > 0) & (p == 0), (counts == 0) & (mean >= RARE)
    require(~never, f"token {never.argmax()} must not come: {shown}")
    require(~missed, f"token {missed.argmax()} must come: {shown}")
    within(counts, mean, RARE / 3 + np.sqrt(RARE**2 / 9 + 2 * RARE * mean * (1 - p)), "how often each token came")


@law(Sampling, cases=cases({}))
def tokens_come_as_often_as_the_softmax_says(draw, case):
    """Rows that are alike are drawn each for itself."""
    come_by(draw, case, softmax(case.logits))


@law(Sampling, "temperature", cases=cases({"temperature": 0.5}, {"temperature": 2.0}))
def logits_are_divided_by_the_temperature(draw, case):
    come_by(draw, case, softmax(case.logits / case.rules["temperature"]))


@law(Sampling, "top k", cases=cases({"top_k": 1}, {"top_k": 3}, {"top_k": V}))
def top_k_gives_each_of_the_k_highest_and_no_other(draw, case):
    come_by(draw, case, the_highest(softmax(case.logits), case.rules["top_k"]))


@law(
    Sampling,
    "top p",
    cases=cases(
        *({"top_p": p} for p in (0.05, 0.5, 0.9, 1.0)),
        of_note=lambda logits, rules: is_clear(softmax(logits), rules["top_p"]),
    ),
)
def top_p_gives_the_fewest_tokens_whose_mass_reaches_p(draw, case):
    """The token that crosses p is one of them, so there always is one; 1 takes none away."""
    come_by(draw, case, nucleus(softmax(case.logits), case.rules["top_p"]))


@law(Sampling, "top p", cases=cases({"top_p": BELOW_ONE}, vocab=5 * V), max_examples=10)
def a_top_p_just_below_one_takes_no_token_away(draw, case):
    """In float32 the mass of all tokens may never reach it."""
    come_by(draw, case, softmax(case.logits))


def warm_then_nucleus(logits, rules):
    return nucleus(softmax(logits / rules["temperature"]), rules["top_p"])


def nucleus_then_warm(logits, rules):
    return nucleus(softmax(logits / rules["temperature"]), rules["top_p"], by=softmax(logits))


def the_temperature_decides(logits, rules) -> bool:
    masses = softmax(logits), softmax(logits / rules["temperature"])
    differ = (warm_then_nucleus(logits, rules) > 0) != (nucleus_then_warm(logits, rules) > 0)
    return all(is_clear(p, rules["top_p"]) for p in masses) and bool(differ.any())


@law(
    Sampling,
    "temperature",
    "top p",
    cases=cases({"temperature": 2.0, "top_p": 0.7}, of_note=the_temperature_decides),
    conventions={
        "the mass is that before the temperature": lambda draw, case: come_by(draw, case, nucleus_then_warm(*case[::2]))
    },
)
def the_mass_of_top_p_is_that_after_the_temperature(draw, case):
    come_by(draw, case, warm_then_nucleus(*case[::2]))


def of_the_rest(logits, rules):
    return nucleus(the_highest(softmax(logits), rules["top_k"]), rules["top_p"])


def of_all(logits, rules):
    return nucleus(the_highest(softmax(logits), rules["top_k"]), rules["top_p"], by=softmax(logits))


def top_k_decides(logits, rules) -> bool:
    """The answers differ from one another, and from those of either rule without the other."""
    p, top_k, top_p = softmax(logits), rules["top_k"], rules["top_p"]
    sizes = [(kept > 0).sum() for kept in (of_the_rest(logits, rules), of_all(logits, rules), nucleus(p, top_p))]
    return is_clear(p, top_p) and is_clear(the_highest(p, top_k), top_p) and sizes[0] < sizes[1] and sizes[2] != top_k


@law(
    Sampling,
    "top k",
    "top p",
    cases=cases({"top_k": 5, "top_p": 0.6}, {"top_k": 3, "top_p": 0.6}, of_note=top_k_decides),
    conventions={"the mass is that of all tokens": lambda draw, case: come_by(draw, case, of_all(*case[::2]))},
)
def the_mass_of_top_p_is_that_of_what_top_k_has_left(draw, case):
    come_by(draw, case, of_the_rest(*case[::2]))


@law(Sampling, cases=cases({}), max_examples=5)
def the_same_seed_gives_the_same_tokens_and_another_others(draw, case):
    once, again = drawn(draw, case), drawn(draw, case)
    same_bits(again, once, "the second draw")
    other = drawn(draw, case._replace(seed=np.uint32(case.seed ^ 1)))
    require((other != once).any(), f"seed {case.seed ^ 1} must not draw the {DRAWS} tokens of seed {case.seed}")


@law(Sampling, cases=cases({}), max_examples=5)
def what_stands_in_other_rows_does_not_change_a_row(draw, case):
    logits = np.tile(case.logits, (DRAWS, 1))
    before = draw(logits, seed=case.seed)
    logits[1::2] = logits[1::2, ::-1] * 3
    same_bits(draw(logits, seed=case.seed)[::2], before[::2], "rows that stayed")
