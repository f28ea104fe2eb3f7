"""How good a model is: teacher-forced loss and accuracy, and what it says when left alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import sacrebleu
from rapidfuzz.distance import Levenshtein

from seq2seq.batches import batches
from seq2seq.decoding import GREEDY, DecodingOptions, hypotheses
from seq2seq.examples import Example, Pair
from seq2seq.tasks import Task


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


class TextScore(NamedTuple):
    """A score of whole texts and the signature that says how it was computed (Post 2018)."""

    score: float
    signature: str


def token_scores(trainer: Any, task: Task, pairs: Sequence[Pair], *, tokens: int) -> TokenScores:
    """Loss and accuracy when every previous token is given; `trainer.evaluate` is called on each batch."""
    scores = np.array(
        [
            [float(m.loss), float(m.accuracy), float(m.tokens)]
            for m in map(trainer.evaluate, batches(pairs, task.buckets, tokens=tokens))
        ]
    )
    loss, accuracy = scores[:, 2] @ scores[:, :2] / scores[:, 2].sum()
    return TokenScores(float(loss), float(accuracy))


def sequence_scores(
    frontend: Any,
    model: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    tokens: int,
    options: DecodingOptions = GREEDY,
) -> SequenceScores:
    """What decoding makes of the sources: its best hypothesis of each."""
    sources = [example.source for example in examples]
    found = hypotheses(frontend, model, task, sources, tokens=tokens, options=options)
    predictions = [best[0].symbols for best in found]
    right = [prediction in example.targets for prediction, example in zip(predictions, examples, strict=True)]
    nearest = [
        min((Levenshtein.distance(prediction, target), len(target)) for target in example.targets)
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    errors, length = np.sum(nearest, axis=0)
    return SequenceScores(float(np.mean(right)), float(errors / length), predictions)


def text_scores(
    task: Task, examples: Sequence[Example], predictions: Sequence[tuple[int, ...]]
) -> dict[str, TextScore]:
    """BLEU and chrF by sacrebleu, of the texts that the numbers stand for."""
    outputs = [task.target.decode(prediction) for prediction in predictions]
    references = [[task.target.decode(example.targets[0]) for example in examples]]
    found = {}
    for name, metric in (("BLEU", sacrebleu.BLEU()), ("chrF", sacrebleu.CHRF())):
        score = metric.corpus_score(outputs, references).score
        found[name] = TextScore(score, str(metric.get_signature()))
    return found
