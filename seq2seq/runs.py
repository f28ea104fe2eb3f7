"""A run folder: what was trained, how it went, and the best weights, for either frontend."""

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array

from core.config import TransformerConfig
from seq2seq.errors import UserError
from seq2seq.optimizer import TrainingOptions
from seq2seq.tasks import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with `run.json`, `metrics.jsonl`, `checkpoints/` and their `digests.json`."""

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
        versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy", "optax")}
        about = {
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
            return cls(folder, about["task"], about["frontend"], config, TrainingOptions(**about["options"]))
        except OSError:
            raise UserError(f"{folder} is no run folder, it has no run.json; `isoformer train` makes one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be used: {error}; train the run again") from None

    def log(self, **metrics: Any) -> None:
        """Adds one line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def save(self, step: int, weights: dict[str, Array], *, loss: float) -> None:
        """Keeps the weights if their validation loss is the lowest so far."""
        with self._manager() as manager:
            manager.save(step, args=ocp.args.StandardSave(weights), metrics={"loss": loss})
        temporary = self.folder / "digests.tmp"
        temporary.write_text(json.dumps(self._digests(), indent=2) + "\n")
        temporary.replace(self.folder / "digests.json")

    def best_weights(self) -> dict[str, Array]:
        """The weights of the lowest validation loss. UserError if there are none, or a file of them has changed."""
        try:
            kept = json.loads((self.folder / "digests.json").read_text())
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} has no checkpoint yet; let `isoformer train` reach its first validation"
            ) from None
        found = self._digests()
        # orbax itself takes a flipped bit for a number
        if changed := sorted(name for name in kept | found if kept.get(name) != found.get(name)):
            raise UserError(
                f"the checkpoint of {self.folder} is damaged, {changed[0]} has changed; train the run again"
            )
        with self._manager() as manager:
            step = manager.best_step()
            stored = manager.item_metadata(step).tree
            wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
            return manager.restore(step, args=ocp.args.StandardRestore(wanted))

    def _digests(self) -> dict[str, str]:
        """The sha256 of every file of the checkpoints."""
        files = sorted(path for path in (self.folder / "checkpoints").rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

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

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1,
            best_fn=lambda metrics: metrics["loss"],
            best_mode="min",
            enable_async_checkpointing=False,
        )
        folder = (self.folder / "checkpoints").absolute()
        return ocp.CheckpointManager(folder, item_handlers=ocp.StandardCheckpointHandler(), options=options)
