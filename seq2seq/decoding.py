"""What a model makes of sources: greedily, by beams, or drawn; in batches of few shapes, each source in its place."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.constraints import Constraints
from core.losses import Batch
from core.sampling import Sampling
from seq2seq.batches import batch, rows
from seq2seq.errors import UserError
from seq2seq.examples import Pair
from seq2seq.frontends import randomness
from seq2seq.tasks import Task
from seq2seq.vocabulary import before_end


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How outputs are found: the likeliest symbols one by one, by beams if there are more than 1, or drawn."""

    beams: int = 1  # hypotheses that are followed
    n_best: int = 1  # hypotheses of one source, or drawn outputs
    length_penalty: float = 0.6  # of beams, as in Wu et al. (2016)
    sampling: Sampling | None = None
    seed: int = 0  # of what is drawn
    constraints: Constraints = dataclasses.field(default_factory=Constraints)
    prefix: str = ""  # with which every output begins

    def __post_init__(self) -> None:
        for name in ("beams", "n_best"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sampling is not None and self.beams > 1:
            raise UserError("outputs are drawn or searched for by beams, not both; leave out beams or the sampling")
        if self.sampling is None and self.n_best > self.beams:
            raise UserError(f"n_best must be at most beams={self.beams}, got {self.n_best}")


GREEDY = DecodingOptions()
"""The likeliest symbol each time."""


class Hypothesis(NamedTuple):
    """One output and its score, log P over the penalty of its length; greedy decoding computes none."""

    symbols: tuple[int, ...]
    score: float | None


def hypotheses(
    frontend: Any,
    model: Any,
    task: Task,
    sources: Sequence[tuple[int, ...]],
    *,
    tokens: int,
    options: DecodingOptions = GREEDY,
) -> list[list[Hypothesis]]:
    """The n best outputs for each source, in their order; no output depends on the other sources."""
    found: dict[int, list[Hypothesis]] = {}
    for chunk, made in _source_batches(task, sources, tokens):
        for i, row in zip(chunk, _decoded(frontend, model, task, made, chunk, options), strict=True):
            found[i] = row
    return [found[i] for i in range(len(sources))]


def predict(
    frontend: Any, model: Any, task: Task, sources: Sequence[tuple[int, ...]], *, tokens: int
) -> list[tuple[int, ...]]:
    """The likeliest symbols one by one, of each source in their order, cut at the end symbol."""
    return [best[0].symbols for best in hypotheses(frontend, model, task, sources, tokens=tokens)]


def _source_batches(task: Task, sources: Sequence[tuple[int, ...]], tokens: int) -> Iterator[tuple[list[int], Batch]]:
    by_length: dict[int, list[int]] = {}
    for i, source in enumerate(sources):
        by_length.setdefault(next(b for b in task.buckets if len(source) <= b), []).append(i)
    for length, members in by_length.items():
        number = rows(length, tokens)
        for start in range(0, len(members), number):
            chunk = members[start : start + number]
            yield chunk, batch([Pair(sources[i], ()) for i in chunk], length, number)


def _decoded(
    frontend: Any, model: Any, task: Task, made: Batch, chunk: list[int], options: DecodingOptions
) -> list[list[Hypothesis]]:
    common: dict[str, Any] = {
        "source_mask": made.source_mask,
        "max_length": task.buckets[-1],
        "constraints": options.constraints,
    }
    if options.prefix:
        common["forced"] = jnp.asarray(task.target.encode(options.prefix), jnp.int32)
    if options.beams > 1:
        best = frontend.beam_search(
            model, made.source, **common, beam_size=options.beams, n_best=options.n_best,
            length_penalty=options.length_penalty,
        )  # fmt: skip
        outputs, scores = np.asarray(best.tokens), np.asarray(best.scores)
    elif options.sampling is None:
        outputs, scores = np.asarray(frontend.generate(model, made.source, **common))[:, None], None
    else:
        drawn = [_drawn(frontend, model, made, chunk, common, options, n) for n in range(options.n_best)]
        outputs, scores = (np.stack(arrays, axis=1) for arrays in zip(*drawn, strict=True))
    return [
        [
            Hypothesis(before_end(outputs[row, n]), None if scores is None else float(scores[row, n]))
            for n in range(outputs.shape[1])
            if scores is None or scores[row, n] > -np.inf
        ]
        for row in range(len(chunk))
    ]


def _drawn(frontend: Any, model: Any, made: Batch, chunk: list[int], common: dict, options: DecodingOptions, n: int):
    """The n-th output of each source, drawn by a key of its own, and its log probability."""
    key = jax.random.fold_in(jax.random.key(options.seed), n)
    numbers = jnp.asarray([*chunk, *[0] * (made.source.shape[0] - len(chunk))], jnp.uint32)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
    outputs = frontend.generate(model, made.source, **common, sampling=options.sampling, **{randomness(frontend): keys})
    scores = frontend.score(model, made.source, outputs, source_mask=made.source_mask).sum(axis=-1)
    return np.asarray(outputs), np.asarray(scores)
