"""Examples to arrays: grouped by length into few shapes, so that little is compiled and little is padding."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from core.decoding import BOS, EOS, PAD
from core.losses import Batch
from seq2seq.examples import Pair


def batches(data: Sequence[Pair], buckets: Sequence[int], *, tokens: int) -> Iterator[Batch]:
    """All pairs once, in batches of about `tokens` target positions, each of one bucket's length.

    What is left over of a bucket fills a last batch up with empty rows, which no query may see and which count for
    nothing.
    """
    waiting: dict[int, list[Pair]] = {length: [] for length in buckets}
    for pair in data:
        length = bucket(pair, buckets)
        waiting[length].append(pair)
        if len(waiting[length]) == rows(length, tokens):
            yield batch(waiting[length], length, rows(length, tokens))
            waiting[length] = []
    for length, rest in waiting.items():
        if rest:
            yield batch(rest, length, rows(length, tokens))


def bucket(pair: Pair, buckets: Sequence[int]) -> int:
    """The least length that holds both sides, the end included."""
    return next(b for b in buckets if max(len(pair.source), len(pair.target) + 1) <= b)


def rows(length: int, tokens: int) -> int:
    """How many rows of that length a batch has."""
    return max(1, tokens // length)


def batch(data: Sequence[Pair], length: int, number: int) -> Batch:
    """At most `number` pairs as one batch of exactly that many rows. A source of vectors has one label, its class."""
    vectors = np.ndim(data[0].source) == 2
    source = np.zeros((number, length, *np.shape(data[0].source)[1:]), np.float32 if vectors else np.int32)
    inputs, labels = (np.full((number, 1 if vectors else length), PAD, np.int32) for _ in range(2))
    source_mask, target_mask = np.zeros((number, length), bool), np.zeros(labels.shape, bool)
    for row, pair in enumerate(data):
        source[row, : len(pair.source)] = pair.source
        source_mask[row, : len(pair.source)] = True
        wanted = pair.target if vectors else (*pair.target, EOS)
        inputs[row, : len(wanted)] = (BOS, *pair.target)[: len(wanted)]
        labels[row, : len(wanted)] = wanted
        target_mask[row, : len(wanted)] = True
    return Batch(*map(jnp.asarray, (source, source_mask, inputs, labels, target_mask)))
