"""The endless stream of training batches, whose place can be noted and gone back to."""

from collections.abc import Sequence
from typing import Any

import grain

from core.losses import Batch
from seq2seq.batches import batch, bucket, rows
from seq2seq.examples import Pair


def endless_batches(
    data: Sequence[Pair], buckets: Sequence[int], *, tokens: int, micro: int = 1, seed: int = 0
) -> grain.DatasetIterator[Batch]:
    """Epoch after epoch, each in an order of its own that the seed fixes; a few batches at a time are in memory.

    With `micro` above 1 the first axis is that of so many micro-batches. An epoch's last batch of each bucket is
    filled up with empty rows. `get_state()` is JSON; after `set_state()` of it the same batches follow.
    """
    numbers = grain.MapDataset.range(len(data)).seed(seed).shuffle().repeat()
    order = numbers.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return _Batches(order.__iter__(), data, buckets, tokens, micro)


class _Batches(grain.DatasetIterator[Batch]):
    """Pairs wait in their bucket until they are enough for a batch."""

    def __init__(
        self, order: grain.DatasetIterator, data: Sequence[Pair], buckets: Sequence[int], tokens: int, micro: int
    ):
        super().__init__(order)
        self.data, self.buckets, self.tokens, self.micro = data, buckets, tokens, micro
        self.seen, self.ready = 0, []
        self.waiting: dict[int, list[int]] = {length: [] for length in buckets}

    def __next__(self) -> Batch:
        while not self.ready:
            number = int(next(self._parent))
            length = bucket(self.data[number], self.buckets)
            self.waiting[length].append(number)
            self.seen += 1
            if len(self.waiting[length]) == self.micro * rows(length, self.tokens):
                self._release(length)
            if self.seen % len(self.data) == 0:
                for left in self.buckets:
                    self._release(left)
        length, numbers = self.ready.pop(0)
        made = batch([self.data[i] for i in numbers], length, self.micro * rows(length, self.tokens))
        return made if self.micro == 1 else Batch(*(x.reshape(self.micro, -1, *x.shape[1:]) for x in made))

    def _release(self, length: int) -> None:
        if self.waiting[length]:
            self.ready.append([length, self.waiting[length]])
            self.waiting[length] = []

    def get_state(self) -> dict[str, Any]:
        """Pairs by their numbers."""
        waiting = [[length, list(numbers)] for length, numbers in self.waiting.items()]
        ready = [[length, list(numbers)] for length, numbers in self.ready]
        return {"order": self._parent.get_state(), "seen": self.seen, "waiting": waiting, "ready": ready}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was."""
        self._parent.set_state(state["order"])
        self.seen = state["seen"]
        self.waiting = {length: list(numbers) for length, numbers in state["waiting"]}
        self.ready = [[length, list(numbers)] for length, numbers in state["ready"]]
