"""How good a model is: teacher-forced loss and accuracy, and what it says when left alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from seq2seq.batches import Pair, batch, batches, pairs, rows
from seq2seq.tasks import Example, Task


class TokenScores(NamedTuple):
    """Means over the real target tokens, EOS included."""

    loss: float
    accuracy: float


class SequenceScores(NamedTuple):
    """Of free-running generation. An example is right if the output equals any of its targets."""

    sequence_accuracy: float
    symbol_error_rate: float  # edit distance to the nearest target over its length; PER for phones
    predictions: list[tuple[int, ...]]

    @property
    def word_error_rate(self) -> float:
        """1 - sequence accuracy."""
        return 1 - self.sequence_accuracy


def token_scores(trainer: Any, task: Task, examples: Sequence[Example], *, tokens: int) -> TokenScores:
    """Loss and accuracy when every previous token is given; `trainer.evaluate` is called on each batch."""
    scores = np.array(
        [
            [float(m.loss), float(m.accuracy), float(m.tokens)]
            for m in map(trainer.evaluate, batches(pairs(examples), task.buckets, tokens=tokens))
        ]
    )
    loss, accuracy = scores[:, 2] @ scores[:, :2] / scores[:, 2].sum()
    return TokenScores(float(loss), float(accuracy))


def sequence_scores(
    frontend: Any, model: Any, task: Task, examples: Sequence[Example], *, tokens: int
) -> SequenceScores:
    """What greedy decoding makes of the sources."""
    predictions = predict(frontend, model, task, [example.source for example in examples], tokens=tokens)
    right = [prediction in example.targets for prediction, example in zip(predictions, examples, strict=True)]
    nearest = [
        min((Levenshtein.distance(prediction, target), len(target)) for target in example.targets)
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    errors, length = np.sum(nearest, axis=0)
    return SequenceScores(float(np.mean(right)), float(errors / length), predictions)


def predict(
    frontend: Any, model: Any, task: Task, sources: Sequence[tuple[int, ...]], *, tokens: int
) -> list[tuple[int, ...]]:
    """The generated symbols of each source, in their order, cut at the end symbol."""
    longest, found = task.buckets[-1], {}
    by_length: dict[int, list[int]] = {}
    for i, source in enumerate(sources):
        by_length.setdefault(next(b for b in task.buckets if len(source) <= b), []).append(i)
    for length, members in by_length.items():
        number = rows(length, tokens)
        for start in range(0, len(members), number):
            chunk = members[start : start + number]
            made = batch([Pair(sources[i], ()) for i in chunk], length, number)
            generated = frontend.generate(model, made.source, source_mask=made.source_mask, max_length=longest)
            found |= {
                i: task.target.cut(row) for i, row in zip(chunk, np.asarray(generated)[: len(chunk)], strict=True)
            }
    return [found[i] for i in range(len(sources))]
