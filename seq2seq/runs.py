"""A run folder: what was trained, how it went, and its checkpoints, for either frontend."""

import contextlib
import dataclasses
import fcntl
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Array

from core.config import TransformerConfig
from seq2seq import checkpoints, manifest
from seq2seq.corpus import Prepared
from seq2seq.errors import UserError
from seq2seq.machine import versions
from seq2seq.metrics import Metrics
from seq2seq.options import TrainingOptions
from seq2seq.tasks import Task, load_task


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with `run.json`, `metrics.jsonl`, `checkpoints/`, and `data/` with the tokenizer of prepared data."""

    folder: Path
    task: str
    frontend: str
    config: TransformerConfig
    options: TrainingOptions
    data: Path | None = None  # what `isoformer prepare` made, if the task needs it

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        task: str,
        frontend: str,
        config: TransformerConfig,
        options: TrainingOptions,
        data: Path | None = None,
    ) -> "Run":
        """UserError if the folder holds anything: a run never writes over another."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is already there and not empty; give another --run or remove it")
        try:
            manifest.make_folder(folder)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}; give another --run") from None
        run = cls(folder, task, frontend, config, options, None if data is None else data.absolute())
        if data is not None:
            Prepared(data).keep(run.kept)
        about = {
            "command": shlex.join(["isoformer", *sys.argv[1:]]),
            "task": task,
            "data": None if run.data is None else str(run.data),
            "frontend": frontend,
            "config": json.loads(config.to_json()),
            "options": dataclasses.asdict(options),
            "versions": versions("grain", "jax", "jaxlib", "numpy", "optax"),
        }
        try:
            (folder / "run.json").write_text(json.dumps(about, indent=2) + "\n")
            for path in [*folder.rglob("*"), folder]:  # without it no checkpoint can be used
                manifest.sync(path)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}; give another --run") from None
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """UserError for a folder that is not a run, or whose description cannot be understood."""
        path = folder / "run.json"
        try:
            about = json.loads(path.read_text())
            config = TransformerConfig.from_json(json.dumps(about["config"]))
            data = None if about.get("data") is None else Path(about["data"])
            return cls(folder, about["task"], about["frontend"], config, _options(about["options"]), data)
        except OSError:
            raise UserError(f"{folder} is no run folder, it has no run.json; `isoformer train` makes one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be used: {error}; train the run again") from None

    @property
    def kept(self) -> Path:
        """What the run keeps of prepared data, to read and write text without it."""
        return self.folder / "data"

    def load_task(self) -> Task:
        """The task that the run learns, as it was."""
        return load_task(self.task, data=self.data, kept=None if self.data is None else self.kept)

    @contextlib.contextmanager
    def training(self) -> Iterator[Metrics]:
        """This process alone writes to the folder, its metrics too. UserError if another one does."""
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context((self.folder / ".lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder} is being trained by another process; wait for it, or stop it") from None
            except OSError as error:
                raise UserError(f"{self.folder} cannot be written: {error.strerror}; make it writable") from None
            checkpoints.collect(self.checkpoint_folder)
            with Metrics(self.folder) as metrics:
                yield metrics

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    def save(self, step: int, arrays: Mapping[str, Mapping[str, Array]], about: Mapping[str, Any]) -> None:
        """Keeps the state after a step; of the older ones those with the lowest losses stay."""
        checkpoints.save(self.checkpoint_folder, step, arrays, about)
        found = losses(self.checkpoint_folder)
        wanted = {step, *sorted(found, key=found.__getitem__)[: self.options.keep]}
        for old in set(checkpoints.steps(self.checkpoint_folder)) - wanted:
            checkpoints.remove(self.checkpoint_folder, old)

    def latest(self) -> checkpoints.Checkpoint | None:
        """The state after the last step that was saved; None before the first."""
        choose = lambda: max(checkpoints.steps(self.checkpoint_folder), default=None)
        return checkpoints.load_chosen(self.checkpoint_folder, choose)

    def best(self) -> checkpoints.Checkpoint:
        """The state of the lowest validation loss. UserError if there is none, or a file of it has changed."""

        def choose() -> int | None:
            found = losses(self.checkpoint_folder)
            return min(found, key=found.__getitem__, default=None)

        found = checkpoints.load_chosen(self.checkpoint_folder, choose)
        if found is None:
            raise UserError(f"{self.folder} has no checkpoint yet; let `isoformer train` reach its first validation")
        return found

    def best_weights(self) -> dict[str, Array]:
        """Those of the best state. The same errors."""
        return self.weights(self.best())

    def weights(self, state: checkpoints.Checkpoint) -> dict[str, Array]:
        """Of a state, averaged if the run averages."""
        return averaged(state.arrays["optimizer"]) if self.options.average else state.arrays["weights"]

    def load_model(self, frontend: Any, task: Task) -> Any:
        """The best model in a frontend. UserError if its weights are of another configuration or task."""
        sizes = task.sizes()
        own = {name: getattr(self.config, name) for name in sizes}
        if own != sizes:
            raise UserError(
                f"the model of {self.folder} has {_listed(own)}, the task {task.name} {_listed(sizes)}; "
                "train the run again"
            )
        try:
            return frontend.from_weights(self.config, self.best_weights(), model_class=getattr(frontend, task.model))
        except ValueError as error:
            raise UserError(f"the checkpoint of {self.folder} does not fit its run.json: {error}") from None


def _listed(sizes: Mapping[str, int | None]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def _options(fields: dict[str, Any]) -> TrainingOptions:
    tuples: dict[str, Any] = {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}  # JSON has none
    return TrainingOptions(**{**fields, **tuples})


def losses(folder: Path) -> dict[int, float]:
    """The validation loss of each checkpoint that has one, by its step."""
    about = checkpoints.about_all(folder)
    return {step: a["validation_loss"] for step, a in about.items() if a.get("validation_loss") is not None}


def averaged(optimizer_state: Mapping[str, Array]) -> dict[str, Array]:
    """The moving average of the weights that the optimizer has kept, by their names."""
    parts = ((name.partition(".average."), array) for name, array in optimizer_state.items())
    return {name: array for (_, found, name), array in parts if found}
