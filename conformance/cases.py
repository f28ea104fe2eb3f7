"""What the laws of attention are tried on: small shapes in buckets, random distinct data, rules in combination."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Attention

seeds = st.integers(0, 2**32 - 1)


class Shape(NamedTuple):
    """Sizes of one attention; `batch` are the leading axes."""

    batch: tuple[int, ...]
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int

    @property
    def logits(self) -> tuple[int, ...]:
        return (*self.batch, self.N, self.T, self.S)

    def within(self, adapter: Attention) -> "Shape":
        """The nearest shape that the adapter takes."""
        shape = self
        if "leading axes" not in adapter.can:
            shape = shape._replace(batch=(int(np.prod(shape.batch)),))
        if "grouped heads" not in adapter.can:
            shape = shape._replace(K=shape.N)
        if "value width" not in adapter.can:
            shape = shape._replace(Hv=shape.H)
        return shape


SQUARE = [
    Shape((1,), 2, 2, 1, 1, 2, 2),
    Shape((2,), 3, 3, 4, 2, 3, 3),
    Shape((), 1, 1, 2, 1, 1, 3),
    Shape((2, 1, 2), 7, 7, 3, 1, 8, 2),
]
OBLONG = [
    Shape((1,), 2, 3, 1, 1, 2, 2),
    Shape((2,), 1, 5, 6, 3, 5, 1),
    Shape((2, 2), 7, 3, 2, 2, 4, 4),
]
LONG = Shape((1,), 3, 130, 2, 1, 4, 4)
"""Longer than the blocks of 64 or 128 keys that kernels work in."""
FEW = [SQUARE[0], SQUARE[1], OBLONG[0]]
WINDOWS = [(1, 1), (2, 0), (0, 1), (1, 2)]


class Case(NamedTuple):
    """One whole attention problem, and who may see whom."""

    shape: Shape
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any]
    allowed: np.ndarray

    @property
    def qkv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.q, self.k, self.v

    @property
    def seen(self) -> np.ndarray:
        """[*B, S, K]: keys that some query may see."""
        return np.asarray(self.grouped.any(axis=-2)).swapaxes(-1, -2)

    @property
    def grouped(self) -> np.ndarray:
        """[*B, K, T, S]: allowed by any head of a group."""
        shape = self.shape
        return np.asarray(self.allowed.reshape(*shape.batch, shape.K, -1, shape.T, shape.S).any(axis=-3))

    @property
    def rows(self) -> np.ndarray:
        """[*B, T, N]: queries that may see a key."""
        return np.asarray(self.allowed.any(axis=-1)).swapaxes(-1, -2)


def gaussian(shape: tuple[int, ...], *seed: int, scale: float = 1.0, dtype: Any = "float32") -> np.ndarray:
    """Normal numbers of few digits, so that a failing example can be read."""
    return (scale * np.random.default_rng(seed).standard_normal(shape).round(3)).astype(dtype)


def qkv(shape: Shape, seed: int, dtype: Any = "float32", scale: float = 1.0) -> list[np.ndarray]:
    """Queries, keys and values."""
    sizes = [(shape.T, shape.N, shape.H), (shape.S, shape.K, shape.H), (shape.S, shape.K, shape.Hv)]
    return [gaussian((*shape.batch, *x), seed, i, scale=scale, dtype=dtype) for i, x in enumerate(sizes)]


def drawn_options(shape: Shape, seed: int, names: tuple[str, ...], live: bool) -> dict[str, Any]:
    """One value for each of the named options; with `live` every query sees a key."""
    rng, options = np.random.default_rng([seed, 7]), {}
    if "causal" in names:
        options["causal"] = True
    if "window" in names:
        options["window"] = WINDOWS[rng.integers(len(WINDOWS))]
    if "offset" in names:
        options["q_offset"] = rng.integers(0, max(1, shape.S - shape.T + 1), shape.batch, "int32")
    if "scale" in names:
        options["scale"] = 0.75
    if "soft cap" in names:
        options["soft_cap"] = 1.5
    if "bias" in names or "blocking bias" in names:
        options["bias"] = gaussian(shape.logits, seed, 8)
    if "sinks" in names:
        options["sinks"] = gaussian((shape.N,), seed, 9)
    visibility = {name: options[name] for name in ("causal", "window", "q_offset") if name in options}
    shown = rng.random(shape.logits) < 0.6
    if live:  # of the keys that the other rules leave to a query, one is shown
        others = oracle.allowed_keys(shape.logits, **visibility)
        best = (rng.random(shape.logits) * others).argmax(axis=-1)[..., None]
        shown |= np.arange(shape.S) == best
    if "mask" in names:
        options["mask"] = shown
    if "blocking bias" in names:
        blocked = shown if "mask" not in names else shown | (rng.random(shape.logits) < 0.5)
        options["bias"] = np.where(blocked, options["bias"], np.float32(-np.inf))
    return options


def make_case(shape: Shape, seed: int, names: tuple[str, ...] = (), live: bool = True, dtype: Any = "float32") -> Case:
    """The case of a shape, a seed and the names of options."""
    options = drawn_options(shape, seed, names, live)
    visibility = {name: x for name, x in options.items() if name in ("mask", "bias", "causal", "window", "q_offset")}
    allowed = oracle.allowed_keys(shape.logits, **visibility)
    q, k, v = qkv(shape, seed, dtype)
    return Case(shape, q, k, v, options, allowed)


def cases(*names: str, shapes: list[Shape] = SQUARE + OBLONG, live: bool = True, dtype: Any = "float32"):
    """Cases under the named options: a strategy for each adapter."""

    def strategy(adapter: Attention):
        return st.builds(
            lambda shape, seed: make_case(shape.within(adapter), seed, names, live, dtype),
            st.sampled_from(shapes),
            seeds,
        )

    return strategy


def offered(adapter: Attention) -> list[tuple[str, ...]]:
    """Combinations of rules on who sees whom that the adapter takes, the plainest first; all fit T = S."""
    single = [name for name in ("mask", "causal", "window") if name in adapter.can]
    found: list[tuple[str, ...]] = [(), *((name,) for name in single)]
    if "combined" in adapter.can and len(single) > 1:
        found.append(tuple(single))
    return found


def any_options():
    """Cases under some of all the options that the adapter takes: each often given and often not, beside each other.

    An adapter that takes none beside another gets one at a time.
    """
    flags = ("mask", "blocking bias", "causal", "window", "offset", "scale", "soft cap", "sinks")

    def strategy(adapter: Attention):
        names = [name for name in flags if name.removeprefix("blocking ") in adapter.can]

        def build(shape, seed):
            rng = np.random.default_rng([seed, 11])  # Hypothesis would give mostly few of them, and the same
            count = rng.integers(len(names) + 1) if "combined" in adapter.can else min(1, len(names))
            chosen = {str(name) for name in rng.permutation(names)[:count]}
            if not chosen & {"causal", "window"}:
                chosen.discard("offset")
            elif shape.T != shape.S and "offset" not in chosen:
                chosen -= {"causal", "window"}
            return make_case(shape.within(adapter), seed, tuple(sorted(chosen)))

        return st.builds(build, st.sampled_from([SQUARE[1], OBLONG[0], OBLONG[1]]), seeds)

    return strategy


def any_rules(shapes: list[Shape] = FEW, live: bool = True):
    """Cases under any combination of rules that the adapter offers."""

    def strategy(adapter: Attention):
        plain = [names for names in offered(adapter) if not {"causal", "window"} & set(names)]

        def build(shape, seed, pick):
            names = offered(adapter) if shape.T == shape.S else plain
            return make_case(shape.within(adapter), seed, names[pick % len(names)], live)

        return st.builds(build, st.sampled_from(shapes), seeds, st.integers(0, 11))

    return strategy
