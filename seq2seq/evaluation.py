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
    frontend: Any, model: Any, task: Task, examples: Sequence[Example], *, tokens: int, beams: int = 1
) -> SequenceScores:
    """What decoding makes of the sources: greedily, or the best hypothesis of so many beams."""
    sources = [example.source for example in examples]
    found = hypotheses(frontend, model, task, sources, tokens=tokens, beams=beams)
    predictions = [best[0].symbols for best in found]
    right = [prediction in example.targets for prediction, example in zip(predictions, examples, strict=True)]
    nearest = [
        min((Levenshtein.distance(prediction, target), len(target)) for target in example.targets)
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    errors, length = np.sum(nearest, axis=0)
    return SequenceScores(float(np.mean(right)), float(errors / length), predictions)


class Hypothesis(NamedTuple):
    """One output and its score, log P over the penalty of its length; greedy decoding computes none."""

    symbols: tuple[int, ...]
    score: float | None


def predict(
    frontend: Any, model: Any, task: Task, sources: Sequence[tuple[int, ...]], *, tokens: int
) -> list[tuple[int, ...]]:
    """The likeliest symbols one by one, of each source in their order, cut at the end symbol."""
    return [found[0].symbols for found in hypotheses(frontend, model, task, sources, tokens=tokens)]


def hypotheses(
    frontend: Any,
    model: Any,
    task: Task,
    sources: Sequence[tuple[int, ...]],
    *,
    tokens: int,
    beams: int = 1,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    """The n best outputs for each source, in their order; one beam is greedy decoding."""
    longest, found = task.buckets[-1], {}
    by_length: dict[int, list[int]] = {}
    for i, source in enumerate(sources):
        by_length.setdefault(next(b for b in task.buckets if len(source) <= b), []).append(i)
    for length, members in by_length.items():
        number = rows(length, tokens)
        for start in range(0, len(members), number):
            chunk = members[start : start + number]
            made = batch([Pair(sources[i], ()) for i in chunk], length, number)
            options = {"source_mask": made.source_mask, "max_length": longest}
            if beams == 1:
                outputs = np.asarray(frontend.generate(model, made.source, **options))[:, None]
                scores = np.full(outputs.shape[:2], None)
            else:
                best = frontend.beam_search(model, made.source, **options, beam_size=beams, n_best=n_best)
                outputs, scores = np.asarray(best.tokens), np.asarray(best.scores).astype(object)
            for i, output, score in zip(chunk, outputs, scores, strict=False):
                found[i] = [
                    Hypothesis(task.target.cut(row), s)
                    for row, s in zip(output, score, strict=True)
                    if s is None or s > -np.inf
                ]
    return [found[i] for i in range(len(sources))]
