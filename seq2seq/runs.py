"""A run folder: what was trained, how it went, and its checkpoints, for either frontend."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Array

from core.config import TransformerConfig
from seq2seq import checkpoints
from seq2seq.errors import UserError
from seq2seq.options import TrainingOptions
from seq2seq.tasks import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with `run.json`, `metrics.jsonl` and `checkpoints/`."""

    folder: Path
    task: str
    frontend: str
    config: TransformerConfig
    options: TrainingOptions

    @classmethod
    def create(
        cls, folder: Path, *, task: str, frontend: str, config: TransformerConfig, options: TrainingOptions
    ) -> "Run":
        """UserError if the folder holds anything: a run never writes over another."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is already there and not empty; give another --run or remove it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}; give another --run") from None
        run = cls(folder, task, frontend, config, options)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
        about = {
            "command": shlex.join(["isoformer", *sys.argv[1:]]),
            "task": task,
            "frontend": frontend,
            "config": json.loads(config.to_json()),
            "options": dataclasses.asdict(options),
            "versions": versions,
        }
        (folder / "run.json").write_text(json.dumps(about, indent=2) + "\n")
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """UserError for a folder that is not a run, or whose description cannot be understood."""
        path = folder / "run.json"
        try:
            about = json.loads(path.read_text())
            config = TransformerConfig.from_json(json.dumps(about["config"]))
            return cls(folder, about["task"], about["frontend"], config, _options(about["options"]))
        except OSError:
            raise UserError(f"{folder} is no run folder, it has no run.json; `isoformer train` makes one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be used: {error}; train the run again") from None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """This process alone writes to the folder. UserError if another one does."""
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder} is being trained by another process; wait for it, or stop it") from None
            checkpoints.collect(self.checkpoint_folder)
            yield

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    def log(self, **metrics: Any) -> None:
        """Adds one line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def save(self, step: int, arrays: Mapping[str, Mapping[str, Array]], about: Mapping[str, Any]) -> None:
        """Keeps the state after a step; of the older ones those with the lowest losses stay."""
        checkpoints.save(self.checkpoint_folder, step, arrays, about)
        found = losses(self.checkpoint_folder)
        wanted = {step, *sorted(found, key=found.__getitem__)[: self.options.keep]}
        for old in set(checkpoints.steps(self.checkpoint_folder)) - wanted:
            checkpoints.remove(self.checkpoint_folder, old)

    def latest(self) -> checkpoints.Checkpoint | None:
        """The state after the last step that was saved; None before the first."""
        found = checkpoints.steps(self.checkpoint_folder)
        return checkpoints.load(self.checkpoint_folder, found[-1]) if found else None

    def best_weights(self) -> dict[str, Array]:
        """The weights of the lowest validation loss. UserError if there are none, or a file of them has changed."""
        found = losses(self.checkpoint_folder)
        if not found:
            raise UserError(
                f"{self.folder} has no checkpoint yet; let `isoformer train` reach its first validation"
            ) from None
        arrays = checkpoints.load(self.checkpoint_folder, min(found, key=found.__getitem__)).arrays
        return averaged(arrays["optimizer"]) if self.options.average else arrays["weights"]

    def load_model(self, frontend: Any, task: Task) -> Any:
        """The best model in a frontend. UserError if its weights are of another configuration or task."""
        sizes = (self.config.source_vocab_size, self.config.target_vocab_size)
        if sizes != (len(task.source), len(task.target)):
            raise UserError(
                f"the model of {self.folder} has vocabularies of {sizes[0]} and {sizes[1]} symbols, "
                f"the task {task.name} of {len(task.source)} and {len(task.target)}; train the run again"
            )
        try:
            return frontend.from_weights(self.config, self.best_weights())
        except ValueError as error:
            raise UserError(f"the checkpoint of {self.folder} does not fit its run.json: {error}") from None


def _options(fields: dict[str, Any]) -> TrainingOptions:
    tuples: dict[str, Any] = {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}  # JSON has none
    return TrainingOptions(**{**fields, **tuples})


def losses(folder: Path) -> dict[int, float]:
    """The validation loss of each checkpoint that has one, by its step."""
    about = {step: checkpoints.about(folder, step) for step in checkpoints.steps(folder)}
    return {step: a["validation_loss"] for step, a in about.items() if a.get("validation_loss") is not None}


def averaged(optimizer_state: Mapping[str, Array]) -> dict[str, Array]:
    """The moving average of the weights that the optimizer has kept, by their names."""
    parts = ((name.partition(".average."), array) for name, array in optimizer_state.items())
    return {name: array for (_, found, name), array in parts if found}
