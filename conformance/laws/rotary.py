"""Rotary positions."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Rotary
from conformance.bounds import U
from conformance.cases import gaussian, seeds
from conformance.law import law, refuses, require, same_bits, within

THETA = 10_000.0
SHAPES = [(1, 2, 1, 2), (2, 3, 1, 4), (1, 5, 3, 6)]


class Case(NamedTuple):
    """What is turned, where it stands, and the base of the frequencies."""

    x: np.ndarray
    positions: np.ndarray
    theta: float


def cases(theta: float = THETA, first: int = 0, shapes=SHAPES, far: int = 0):
    """Consecutive positions from a first one, drawn up to `far` beyond it where the adapter takes positions."""

    def strategy(rotate):
        def build(shape, seed, ahead):
            start = first + ahead if "positions" in rotate.can else 0
            positions = np.arange(start, start + shape[1], dtype="int32") + np.zeros(shape[:2], "int32")
            return Case(gaussian(shape, seed), positions, theta)

        return st.builds(build, st.sampled_from(shapes), seeds, st.integers(0, far))

    return strategy


def turned(rotate, case: Case, **changes) -> np.ndarray:
    """The rotation, with positions where the adapter takes them."""
    case = case._replace(**changes)
    more = {"positions": case.positions} if "positions" in rotate.can else {}
    return rotate(case.x, theta=case.theta, **more)


def layout(interleaved: bool):
    """The check against the formula in one layout of the pairs."""

    def check(rotate, case: Case) -> None:
        wanted = oracle.rotary(case.x, case.positions, case.theta, interleaved)
        within(turned(rotate, case), wanted, 8 * U * (1 + np.abs(case.x)).max() * (1 + case.positions.max()))

    return check


INTERLEAVED = {"pairs are neighbours (interleaved)": layout(True)}


@law(Rotary, cases=cases(), conventions=INTERLEAVED)
def pair_i_is_made_of_elements_i_and_i_plus_half(rotate, case):
    """The half-split layout, turned by position * theta^(-2i/H)."""
    layout(False)(rotate, case)


def either_layout(rotate, case: Case, bound: float) -> None:
    """Within the bound of the formula in the layout that the adapter has."""
    out = turned(rotate, case)
    both = [oracle.rotary(case.x, case.positions, case.theta, interleaved) for interleaved in (False, True)]
    wanted = min(both, key=lambda x: np.nan_to_num(np.abs(out - x), nan=np.inf).max())
    within(out, wanted, bound * np.abs(case.x).max())


@law(Rotary, cases=cases(shapes=[(1, 5, 1, 10)]), max_examples=5)
def two_thetas_in_one_process_have_each_their_own_angles(rotate, case):
    """In either order: nothing of the first is kept for the second."""
    for theta in (100.0, 1e6, 100.0):
        either_layout(rotate, case._replace(theta=theta), 1e-5)


@law(Rotary, cases=cases())
def lengths_stay(rotate, case):
    before, after = (np.linalg.norm(np.asarray(x, np.float64), axis=-1) for x in (case.x, turned(rotate, case)))
    within(after, before, 8 * U * before)


@law(Rotary, cases=cases())
def position_zero_is_left_alone(rotate, case):
    same_bits(turned(rotate, case, positions=np.zeros_like(case.positions))[:, :1], case.x[:, :1])


@law(Rotary, cases=cases(shapes=[(1, 4096, 1, 8)]), max_examples=2)
def the_angles_of_four_thousand_positions_are_exact(rotate, case):
    """Position times frequency in float32 loses one bit for each bit of the position; in 16 bit all."""
    either_layout(rotate, case, 2.0**-20)


@law(Rotary, "positions", cases=cases(first=1_000_000, far=48_000))
def the_angles_of_a_million_positions_are_exact(rotate, case):
    either_layout(rotate, case, 2.0**-20)


@law(Rotary, "positions", cases=cases(far=10**6, shapes=[(1, 2, 1, 4), (1, 3, 1, 6)]))
def products_depend_on_the_distance_alone(rotate, case):
    """Moved by any shift, queries and keys keep their products."""
    near = np.broadcast_to(np.arange(case.x.shape[1], dtype="int32"), case.positions.shape)
    products = []
    for positions in (near, case.positions):
        out = np.asarray(turned(rotate, case, positions=positions), np.float64)
        products.append(np.einsum("btnh,bsnh->bnts", out, out))
    lengths = np.linalg.norm(np.asarray(case.x, np.float64), axis=-1).max() ** 2
    within(products[1], products[0], 2.0**-19 * lengths, "the product of a query and a key")


@law(Rotary, "positions", cases=cases(far=1000))
def a_chunk_that_starts_later_is_that_part_of_the_whole(rotate, case):
    """Positions beyond a table's end are neither cut nor clamped."""
    whole = np.arange(case.positions.max() + 1, dtype="int32")[None]
    x = np.zeros((1, whole.shape[1], *case.x.shape[2:]), "float32")
    x[:, case.positions[0]] = case.x[:1]
    wanted = turned(rotate, case, x=x, positions=whole)[:, case.positions[0]]
    got = turned(rotate, case, x=case.x[:1], positions=case.positions[:1])
    within(got, wanted, 2 * U * np.abs(case.x).max())


def scattered(rotate):
    """Positions in no order, others in each row."""

    def build(shape, seed):
        positions = np.random.default_rng([seed, 1]).integers(0, 1000, shape[:2], "int32")
        return Case(gaussian(shape, seed), positions, THETA)

    return st.builds(build, st.sampled_from(SHAPES[1:]), seeds)


@law(Rotary, "positions", cases=scattered)
def every_token_turns_by_its_own_position(rotate, case):
    either_layout(rotate, case, 2.0**-20)


@law(Rotary, "positions", cases=cases(far=100, shapes=SHAPES[1:]))
def two_turns_are_one_of_their_sum(rotate, case):
    back = turned(rotate, case, x=turned(rotate, case), positions=-case.positions)
    within(back, case.x, 2.0**-19 * np.abs(case.x).max(), "turned forth and back")


@law(
    Rotary,
    lacks=("odd width",),
    cases=lambda rotate: st.just(Case(gaussian((1, 2, 1, 3), 0), np.zeros((1, 2), "int32"), THETA)),
)
def an_odd_width_is_refused(rotate, case):
    refuses(lambda: turned(rotate, case), "an odd head width of 3")


@law(Rotary, "bfloat16", cases=cases(first=1000, far=1000, shapes=[(1, 3, 1, 4), (1, 2, 2, 16)]))
def bfloat16_is_turned_by_angles_in_float32(rotate, case):
    """Angles in bfloat16 are wrong from position 256 on."""
    import ml_dtypes

    low = case._replace(x=case.x.astype(ml_dtypes.bfloat16))
    out = turned(rotate, low)
    require(out.dtype == low.x.dtype, f"the output must have the input's dtype bfloat16, got {out.dtype}")
    both = [oracle.rotary(low.x, case.positions, case.theta, interleaved) for interleaved in (False, True)]
    wanted = min(both, key=lambda x: np.abs(np.asarray(out, np.float64) - x).max())
    within(out, wanted, 2.0**-7 * (np.abs(wanted) + 2.0**-6))
