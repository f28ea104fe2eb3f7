"""The training loop: batches in, the best weights out, with its progress to be seen."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.losses import Batch
from seq2seq.errors import UserError
from seq2seq.evaluation import token_scores
from seq2seq.metrics import Metrics
from seq2seq.optimizer import learning_rate, make_optimizer
from seq2seq.runs import Run, averaged
from seq2seq.stream import endless_batches
from seq2seq.tasks import Task


class Outcome(NamedTuple):
    """How a training ended."""

    steps: int
    best_step: int
    best_loss: float  # on the validation split, nats a token
    stopped: str  # why


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
    """Trains until the steps are done, the validation loss has stopped falling, Ctrl-C or SIGTERM.

    A run that has a checkpoint goes on from it, in either frontend, to the same bits as if it had never stopped.
    """
    stop = _noted(signal.SIGINT, signal.SIGTERM)
    with run.training() as metrics, stop as signals, progress_bar(console) as progress:
        return _Training(run, frontend, task, metrics, progress, signals).run()


class _Training:
    """One run in one process."""

    def __init__(
        self,
        run: Run,
        frontend: Any,
        task: Task,
        metrics: Metrics,
        progress: Progress,
        signals: list[signal.Signals],
    ):
        self.run_, self.frontend, self.task = run, frontend, task
        self.metrics, self.progress, self.signals = metrics, progress, signals
        self.options, options = run.options, run.options
        self.rate = learning_rate(options)
        self.step, self.best_step, self.best_loss, self.saved = 0, 0, float("inf"), 0
        self.validation = task.pairs("validation")
        sizes = {"tokens": options.tokens, "micro": options.accumulate, "seed": options.seed}
        self.data = endless_batches(task.pairs("train"), task.buckets, **sizes)
        found = run.latest()
        self.model_class = getattr(frontend, task.model)
        if found is None:
            model = frontend.init_transformer(run.config, seed=options.seed, model_class=self.model_class)
        else:
            model = frontend.from_weights(run.config, found.arrays["weights"], model_class=self.model_class)
        self.trainer = frontend.Trainer(
            model,
            make_optimizer(options),
            seed=options.seed,
            label_smoothing=options.label_smoothing,
            accumulate=options.accumulate > 1,
        )
        if found is not None:
            self.step = self.saved = found.about["step"]
            self.best_step, self.best_loss = found.about["best_step"], found.about["best_loss"] or float("inf")
            self.trainer.resume(found.arrays["optimizer"], step=self.step)
            self.data.set_state(found.about["data"])
            progress.console.print(f"going on after step {self.step}")

    def run(self) -> Outcome:
        options = self.options
        bar = self.progress.add_task(
            f"{self.task.name} in {self.run_.frontend}", total=options.steps, completed=self.step, numbers="compiling"
        )
        stopped, meter = self._stopped(), _Meter()
        while stopped is None:
            batch = next(self.data)
            metrics = self.trainer.train(batch)
            self.step += 1
            meter.count(batch)
            if self.step % 10 == 0 or self.step == 1:
                loss, accuracy = float(metrics.loss), float(metrics.accuracy)
                speed = meter.tokens_per_second()
                numbers = f"loss {loss:.3f}  accuracy {accuracy:.1%}  {speed:,.0f} tokens/s"
                self.progress.update(bar, completed=self.step, numbers=numbers)
                rate = float(np.asarray(self.rate(self.step - 1)))
                self.metrics.log(
                    step=self.step, loss=loss, accuracy=accuracy, tokens_per_second=speed, learning_rate=rate
                )
                self._check_finite()
            if self.step % options.validate_every == 0 or self.step == options.steps:
                self._validate()
                meter = _Meter()
            stopped = self._stopped()
        if self.step > self.saved:
            self._save(None)
        return Outcome(self.step, self.best_step, self.best_loss, stopped)

    def _stopped(self) -> str | None:
        if self.step >= self.options.steps:
            return "all steps done"
        if self.signals:
            return f"interrupted by {self.signals[0].name}"
        if (
            self.step - self.best_step >= self.options.patience * self.options.validate_every
            and self.step == self.saved
        ):
            return f"the validation loss has not fallen for {self.options.patience} validations"
        return None

    def _validate(self) -> None:
        trainer, average = self.trainer, self.options.average
        if average:
            weights = averaged(trainer.optimizer_state())
            model = self.frontend.from_weights(self.run_.config, weights, model_class=self.model_class)
            trainer = self.frontend.Trainer(model, optax.identity())
        scores = token_scores(trainer, self.task, self.validation, tokens=self.options.tokens)
        self.metrics.log(step=self.step, validation_loss=scores.loss, validation_accuracy=scores.accuracy)
        self.progress.console.print(
            f"step {self.step}: validation loss {scores.loss:.4f}, token accuracy {scores.accuracy:.2%}"
        )
        if scores.loss < self.best_loss:
            self.best_step, self.best_loss = self.step, scores.loss
        self._save(scores.loss)

    def _save(self, validation_loss: float | None) -> None:
        known = validation_loss is not None and math.isfinite(validation_loss)
        about = {
            "validation_loss": validation_loss if known else None,
            "best_step": self.best_step,
            "best_loss": self.best_loss if self.best_step else None,
            "data": self.data.get_state(),
        }
        arrays = {"weights": self.frontend.to_weights(self.trainer.model), "optimizer": self.trainer.optimizer_state()}
        self.run_.save(self.step, arrays, about)
        self.saved = self.step

    def _check_finite(self) -> None:
        """UserError if a gradient was not finite and the run is to stop then; its step has changed nothing."""
        skipped = int(self.trainer.optimizer_state()["total_notfinite"])
        if skipped and self.options.non_finite == "stop":
            raise UserError(
                f"a gradient was not finite, {skipped} of {self.step} steps so far; the last checkpoint is of step "
                f"{self.saved}. Lower --learning-rate, or go on with --non-finite skip"
            )
        if skipped:
            self.metrics.log(step=self.step, skipped_steps=skipped)


@contextlib.contextmanager
def _noted(*numbers: signal.Signals) -> Iterator[list[signal.Signals]]:
    """The signals that came, so that the step they came in is finished and saved; the second one interrupts at once."""
    came: list[signal.Signals] = []

    def note(number: int, _: Any) -> None:
        came.append(signal.Signals(number))
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """Real target tokens a second since it was made."""

    def __init__(self):
        self.start, self.tokens = time.perf_counter(), 0

    def count(self, batch: Batch) -> None:
        self.tokens += int(np.asarray(batch.target_mask).sum())

    def tokens_per_second(self) -> float:
        return self.tokens / (time.perf_counter() - self.start)
