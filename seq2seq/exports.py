"""A run's best weights to hand on: one safetensors file that says what it holds."""

import json
import os
from pathlib import Path

from core import weights
from seq2seq.errors import UserError
from seq2seq.runs import Run

_WHAT = (
    "Weights of isoformer. core.weights.load checks and reads them; nnx_impl.from_weights or equinox_impl.from_weights "
    "builds the model of TransformerConfig.from_json(config) from them."
)


def export(run: Run, path: Path) -> dict[str, str]:
    """Writes the best weights, averaged if the run averages; what is said of them is returned.

    UserError if there is a file already, or it cannot be written, or the run has no whole checkpoint.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} is already there; give another FILE or remove it")
    task, best = run.load_task(), run.best()
    about = {
        "what": _WHAT,
        "model": task.model,
        "config": run.config.to_json(),
        "task": run.task,
        "step": str(best.about["step"]),
        "validation_loss": repr(best.about["validation_loss"]),
        "averaged": json.dumps(run.options.average > 0),
        "run": json.dumps(json.loads((run.folder / "run.json").read_text())),
    }
    if run.data is not None:
        about["tokenizer"] = (run.kept / "tokenizer.json").read_text()
    for side in ("source", "target"):  # in the order of their numbers
        symbols = getattr(getattr(task, side), "symbols", None)
        if symbols is not None:
            about[f"{side}_symbols"] = json.dumps(symbols)
    try:
        weights.save(path, run.weights(best), metadata=about)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another FILE") from None
    return about
