"""Bugs of KV caches, in NumPy: one head, tokens of width 4 that are query, key and value at once."""

from typing import NamedTuple

import numpy as np

from conformance import oracle
from conformance.adapters import Cache
from conformance.museum.exhibit import Exhibit

WIDTH = 4


class State(NamedTuple):
    """Slots [B, C, 1, W] and how many of each row are filled."""

    slots: np.ndarray
    length: np.ndarray


class NumpyCache:
    """A right one; an exhibit replaces the method that is wrong."""

    def start(self, rows, capacity):
        return State(np.zeros((rows, capacity, 1, WIDTH), "float32"), np.zeros(rows, int))

    def __call__(self, state, x):
        x, slots, length = x[:, :, None], state.slots.copy(), state.length
        index = self.places(length, x.shape[1])
        self.check(index, slots.shape[1])
        for row, at in enumerate(index):
            slots[row, at] = x[row]
        out = oracle.attention(self.placed(x, length), self.placed_keys(slots), slots, **self.rules(length, slots))
        return out[:, :, 0].astype("float32"), State(slots, length + x.shape[1])

    def full(self, x):
        x = x[:, :, None]
        zero = np.zeros(len(x), int)
        return oracle.attention(self.placed(x, zero), self.placed_keys(x), x, causal=True)[:, :, 0].astype("float32")

    def places(self, length, number):
        return length[:, None] + np.arange(number)

    def check(self, index, capacity):
        if index.max() >= capacity:
            raise ValueError("the cache is full")

    def placed(self, x, first):
        return oracle.rotary(x, first[:, None] + np.arange(x.shape[1]), 100.0)

    def placed_keys(self, slots):
        return NumpyCache.placed(self, slots, np.zeros(len(slots), int))

    def rules(self, length, slots):
        return {"causal": True, "q_offset": length}

    def select(self, state, rows):
        return State(state.slots[rows], state.length[rows])

    def truncate(self, state, lengths):
        return State(state.slots, np.array(lengths))

    def adapter(self, name):
        flags = {"chunks", "reorder", "truncate", "ragged"}
        return Cache(
            name, self, flags, width=WIDTH, start=self.start, full=self.full, select=self.select, truncate=self.truncate
        )  # fmt: skip


class CausalByTheChunk(NumpyCache):
    """Each chunk is causal from its own position 0, so a single query sees key 0 alone."""

    def rules(self, length, slots):
        return {"causal": True}


class PrefillUnmasked(NumpyCache):
    def rules(self, length, slots):
        last = np.broadcast_to(np.arange(slots.shape[1]), (len(slots), 1, 1, slots.shape[1]))
        return {"mask": last < (length + self.number)[:, None, None, None]}

    def __call__(self, state, x):
        self.number = x.shape[1]
        return super().__call__(state, x)


class JunkIsSeen(NumpyCache):
    def rules(self, length, slots):
        return {}


class PositionDrifts(NumpyCache):
    def placed(self, x, first):
        return super().placed(x, first + (first > 0))


class LengthOfTheFirstRow(NumpyCache):
    def places(self, length, number):
        return np.broadcast_to(length[:1], length.shape)[:, None] + np.arange(number)


class OverflowClamps(NumpyCache):
    def places(self, length, number):
        return np.minimum(super().places(length, number), 5)


class OverflowWraps(NumpyCache):
    def places(self, length, number):
        return super().places(length, number) % 6


FULL = "one_token_at_a_time_is_the_full_forward"
EXHIBITS = (
    Exhibit(6, "decoding sees key 0 only", "flax#5591", CausalByTheChunk().adapter("causal by the chunk"), (FULL,)),
    Exhibit(
        8,
        "prefill skips the causal mask",
        "TinyLLM#18",
        PrefillUnmasked().adapter("prefill unmasked"),
        ("chunks_of_any_size_are_the_full_forward",),
    ),
    Exhibit(29, "unused slots are seen", "x-transformers#219", JunkIsSeen().adapter("junk is seen"), (FULL,)),
    Exhibit(
        29, "positions drift", "tiny-llm#46, transformers#25420", PositionDrifts().adapter("positions drift"), (FULL,)
    ),
    Exhibit(
        29,
        "one length for all rows",
        "mosaicml/examples#257",
        LengthOfTheFirstRow().adapter("one length"),
        ("rows_may_hold_different_numbers_of_tokens",),
    ),
    Exhibit(
        30,
        "overflow writes over the last slot",
        "nanochat#627",
        OverflowClamps().adapter("overflow clamps"),
        ("a_token_too_many_raises_or_gives_nan",),
    ),
    Exhibit(
        30,
        "overflow wraps around",
        "tokenspeed#506",
        OverflowWraps().adapter("overflow wraps"),
        ("a_token_too_many_raises_or_gives_nan",),
    ),
)
right = NumpyCache().adapter("NumPy cache")
