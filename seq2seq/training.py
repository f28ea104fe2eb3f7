"""The training loop: batches in, the best weights out, with its progress to be seen."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.losses import Batch
from seq2seq.batches import Pair, batches, pairs
from seq2seq.evaluation import token_scores
from seq2seq.optimizer import TrainingOptions, make_optimizer
from seq2seq.runs import Run
from seq2seq.tasks import Task


class Outcome(NamedTuple):
    """How a training ended."""

    steps: int
    best_step: int
    best_loss: float  # on the validation split, nats a token
    stopped: str  # why


def endless_batches(data: Sequence[Pair], task: Task, options: TrainingOptions) -> Iterator[Batch]:
    """Epoch after epoch, each in an order of its own that the seed fixes."""
    for epoch in itertools.count():
        yield from batches(data, task.buckets, tokens=options.tokens, seed=(options.seed, epoch))


def progress_bar(console: Console) -> Progress:
    """A bar with the numbers that one wants to watch."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        console=console,
    )


def train(run: Run, frontend: Any, task: Task, *, console: Console) -> Outcome:
    """Trains until the steps are done, the validation loss has stopped falling, or Ctrl-C."""
    options = run.options
    model = frontend.init_transformer(run.config, seed=options.seed)
    trainer = frontend.Trainer(
        model, make_optimizer(options), seed=options.seed, label_smoothing=options.label_smoothing
    )
    data, validation = pairs(task.split("train")), task.split("validation")
    best_step, best_loss, step, stopped = 0, float("inf"), 0, "all steps done"
    with progress_bar(console) as progress:
        bar = progress.add_task(f"{task.name} in {run.frontend}", total=options.steps, numbers="compiling")
        try:
            meter = _Meter()
            for step, batch in enumerate(itertools.islice(endless_batches(data, task, options), options.steps), 1):
                metrics = trainer.train(batch)
                meter.count(batch)
                if step % 10 == 0 or step == 1:
                    loss, accuracy = float(metrics.loss), float(metrics.accuracy)
                    speed = meter.tokens_per_second()
                    numbers = f"loss {loss:.3f}  accuracy {accuracy:.1%}  {speed:,.0f} tokens/s"
                    progress.update(bar, completed=step, numbers=numbers)
                    run.log(step=step, loss=loss, accuracy=accuracy, tokens_per_second=speed)
                if step % options.validate_every == 0 or step == options.steps:
                    scores = token_scores(trainer, task, validation, tokens=options.tokens)
                    run.log(step=step, validation_loss=scores.loss, validation_accuracy=scores.accuracy)
                    progress.console.print(
                        f"step {step}: validation loss {scores.loss:.4f}, token accuracy {scores.accuracy:.2%}"
                    )
                    if scores.loss < best_loss:
                        best_step, best_loss = step, scores.loss
                        run.save(step, frontend.to_weights(trainer.model), loss=scores.loss)
                    elif step - best_step >= options.patience * options.validate_every:
                        stopped = f"the validation loss has not fallen for {options.patience} validations"
                        break
                    meter = _Meter()
        except KeyboardInterrupt:
            stopped = "interrupted"
    return Outcome(step, best_step, best_loss, stopped)


class _Meter:
    """Real target tokens a second since it was made."""

    def __init__(self):
        self.start, self.tokens = time.perf_counter(), 0

    def count(self, batch: Batch) -> None:
        self.tokens += int(np.asarray(batch.target_mask).sum())

    def tokens_per_second(self) -> float:
        return self.tokens / (time.perf_counter() - self.start)
