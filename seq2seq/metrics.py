"""What a training says of itself: a line of JSON for each moment, and the same for TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

Curve = tuple[list[int], list[float]]


class Metrics:
    """Writes `metrics.jsonl` and `tensorboard/` of a run's folder, behind what is there already."""

    def __init__(self, folder: Path):
        path = folder / "metrics.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # a crash in the middle of a line
        self.file = path.open("a")
        self.file.write("\n" if torn else "")
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.board.close()

    def log(self, *, step: int, **values: float) -> None:
        """One moment; numbers that are not finite are written as null."""
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **known}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def curves(folder: Path) -> dict[str, Curve]:
    """Steps and values of each metric that a run has logged.

    Where a step was made again after a crash its last line counts; a line that a crash has torn does not.
    """
    path, found = folder / "metrics.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError:
            continue
        for name, value in line.items():
            if name != "step" and value is not None:
                found.setdefault(name, {})[line["step"]] = value
    return {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in found.items()}
