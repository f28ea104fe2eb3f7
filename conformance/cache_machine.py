"""A public state machine for KV caches: whatever is done to a cache, it attends as if it had never been one.

from conformance.cache_machine import cache_machine
TestMyCache = cache_machine(my_adapter).TestCase    # pytest and unittest collect it
"""

import copy
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from conformance.adapters import Cache
from conformance.cases import gaussian
from conformance.law import Violation, within


class Decoding:
    """A cache beside the tokens that it should hold; every output is compared with the full forward of those."""

    def __init__(self, cache: Cache, *, rows: int = 2, capacity: int = 6, seed: int = 0):
        self.cache, self.capacity, self.seed = cache, capacity, seed
        self.tokens: list[np.ndarray] = [np.zeros((0, cache.width), "float32")] * rows
        self.state = self._start()

    def _start(self) -> Any:
        with self.cache.context():
            return self.cache.start(len(self.tokens), self.capacity)

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.tokens]

    def feed(self, number: int = 1, *, compare: bool = True) -> None:
        """Some new tokens to every row. Beyond the capacity it must raise, or give NaN."""
        self.seed += 1
        x = gaussian((len(self.tokens), number, self.cache.width), self.seed)
        over = [length + number > self.capacity for length in self.lengths]
        if any(over):
            self._overflow(x, over)
            return
        out, self.state = self.cache(self.state, x)
        self.tokens = [np.concatenate([row, new]) for row, new in zip(self.tokens, x, strict=True)]
        if not compare:
            return
        wanted = self._full()
        for i, length in enumerate(self.lengths):
            what = f"row {i}, positions {length - number} to {length - 1}, by the cache"
            within(out[i], wanted[i, length - number : length], self.cache.tolerance, what)

    def _overflow(self, x: np.ndarray, over: list[bool]) -> None:
        """The state stays what it was."""
        try:
            out, _ = self.cache(self.state, x)
        except Exception:
            return
        for i, full in enumerate(over):
            if full and not np.isnan(out[i]).all():
                raise Violation(
                    f"{x.shape[1]} more tokens for a row of {self.lengths[i]} in a cache of {self.capacity} "
                    "must raise or give NaN, got numbers"
                )

    def _full(self) -> np.ndarray:
        """All tokens again without a cache; what stands behind a row's end cannot matter, for it is causal."""
        padded = [np.pad(row, [(0, self.capacity - len(row)), (0, 0)]) for row in self.tokens]
        with self.cache.context():
            return np.asarray(self.cache.full(np.stack(padded)))

    def fork(self) -> "Decoding":
        """Another decoding that begins with this state, and shares nothing that changes."""
        return copy.copy(self)

    def reorder(self, rows: np.ndarray) -> None:
        """Row i goes on as row rows[i] was, as beams do."""
        self.state = self.cache.select(self.state, rows)  # type: ignore[misc]
        self.tokens = [self.tokens[i] for i in rows]

    def truncate(self, lengths: np.ndarray) -> None:
        """Each row keeps its first tokens, as after rejected speculation."""
        self.state = self.cache.truncate(self.state, lengths)  # type: ignore[misc]
        self.tokens = [row[:length] for row, length in zip(self.tokens, lengths, strict=True)]

    def reset(self) -> None:
        """Begins anew."""
        self.state = self._start()
        self.tokens = [row[:0] for row in self.tokens]


def cache_machine(cache: Cache, *, rows: int = 2, capacity: int = 6) -> type[RuleBasedStateMachine]:
    """Steps, chunks, forks, reordered beams, truncation, ragged rows, resets and overflow in any order."""

    def offered(flag: str):
        return precondition(lambda machine: flag in cache.can)

    class CacheMachine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.decodings = [Decoding(cache, rows=rows, capacity=capacity)]

        @property
        def decoding(self) -> Decoding:
            return self.decodings[-1]

        @rule()
        def step(self):
            self.decoding.feed()

        @offered("chunks")
        @rule(number=st.integers(2, capacity))
        def chunk(self, number):
            self.decoding.feed(number)

        @rule()
        def fork(self):
            """The fork goes on; the original waits behind it, to be taken up later."""
            self.decodings.append(self.decoding.fork())
            self.decoding.seed += 1000

        @precondition(lambda self: len(self.decodings) > 1)
        @rule()
        def take_up_the_oldest(self):
            self.decodings.append(self.decodings.pop(0))

        @offered("reorder")
        @rule(order=st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
        def reorder(self, order):
            self.decoding.reorder(np.array(order))

        @offered("truncate")
        @rule(length=st.integers(0, capacity))
        def truncate(self, length):
            self.decoding.truncate(np.full(rows, min(length, *self.decoding.lengths)))

        @offered("ragged")
        @rule(cuts=st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
        def make_ragged(self, cuts):
            self.decoding.truncate(np.maximum(np.array(self.decoding.lengths) - cuts, 0))

        @rule()
        def reset(self):
            self.decoding.reset()

    return CacheMachine
