"""Examples to arrays: grouped by length into few shapes, so that little is compiled and little is padding."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from core.decoding import BOS, EOS, PAD
from core.losses import Batch
from seq2seq.tasks import Example


class Pair(NamedTuple):
    """One source and one of its targets."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def pairs(examples: Sequence[Example]) -> list[Pair]:
    """Every target of every example."""
    return [Pair(example.source, target) for example in examples for target in example.targets]


def batches(
    data: Sequence[Pair], buckets: Sequence[int], *, tokens: int, seed: Sequence[int] | None = None
) -> Iterator[Batch]:
    """All pairs once, in batches of about `tokens` target positions, each of one bucket's length.

    With a seed in random order, the same for the same seed. What is left over of a bucket fills a last batch up
    with empty rows, which no query may see and which count for nothing.
    """
    for length, chosen in plan(data, buckets, tokens=tokens, seed=seed):
        yield batch([data[i] for i in chosen], length, rows(length, tokens))


def plan(
    data: Sequence[Pair], buckets: Sequence[int], *, tokens: int, micro: int = 1, seed: Sequence[int] | None = None
) -> list[tuple[int, list[int]]]:
    """Of each batch its length and the numbers of its pairs, at most `micro` times `rows` of them."""
    order = range(len(data)) if seed is None else np.random.default_rng(seed).permutation(len(data)).tolist()
    waiting: dict[int, list[int]] = {length: [] for length in buckets}
    planned = []
    for i in order:
        length = next(b for b in buckets if max(len(data[i].source), len(data[i].target) + 1) <= b)
        waiting[length].append(i)
        if len(waiting[length]) == micro * rows(length, tokens):
            planned.append((length, waiting[length]))
            waiting[length] = []
    return planned + [(length, rest) for length, rest in waiting.items() if rest]


def endless_batches(
    data: Sequence[Pair], buckets: Sequence[int], *, tokens: int, micro: int = 1, seed: int = 0, start: int = 0
) -> Iterator[Batch]:
    """Epoch after epoch, each in an order of its own that the seed fixes, from batch number `start` on.

    With `micro` above 1 the first axis is that of so many micro-batches. Every epoch has as many batches, so that
    where a training stands is said by their number.
    """
    number = len(plan(data, buckets, tokens=tokens, micro=micro))
    for epoch in itertools.count(start // number):
        planned = plan(data, buckets, tokens=tokens, micro=micro, seed=(seed, epoch))
        for length, chosen in planned[start % number if epoch == start // number else 0 :]:
            made = batch([data[i] for i in chosen], length, micro * rows(length, tokens))
            yield made if micro == 1 else Batch(*(x.reshape(micro, -1, length) for x in made))


def rows(length: int, tokens: int) -> int:
    """How many rows of that length a batch has."""
    return max(1, tokens // length)


def batch(data: Sequence[Pair], length: int, number: int) -> Batch:
    """At most `number` pairs as one batch of exactly that many rows."""
    source, inputs, labels = (np.full((number, length), PAD, np.int32) for _ in range(3))
    for row, pair in enumerate(data):
        source[row, : len(pair.source)] = pair.source
        inputs[row, : len(pair.target) + 1] = (BOS, *pair.target)
        labels[row, : len(pair.target) + 1] = (*pair.target, EOS)
    return Batch(*map(jnp.asarray, (source, source != PAD, inputs, labels, labels != PAD)))
