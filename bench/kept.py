"""What a bench found, as a file: with the command that made it, the machine, how busy it was, and the versions."""

import datetime
import importlib.metadata
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seq2seq.machine import machine, versions

PACKAGES = ("jax", "jaxlib", "flax", "equinox", "optax", "numpy", "torch", "hypothesis", "ctranslate2", "transformers")


class Kept(NamedTuple):
    """Results, and all that they depend on beside the code."""

    command: str
    date: str
    machine: dict[str, str | int]
    load: float  # programs that ran or waited for a core, the minute before the end
    versions: dict[str, str]  # of the packages that are installed
    results: Any


def about(results: Any, *, arguments: Sequence[str]) -> Kept:
    """The results of `python -m bench` with these arguments, found here and now."""
    installed = {package.metadata["Name"] for package in importlib.metadata.distributions()}
    return Kept(
        shlex.join(["python", "-m", "bench", *arguments]),
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine(),
        round(os.getloadavg()[0], 1),
        versions(*(name for name in PACKAGES if name in installed)),
        results,
    )


def keep(file: Path, found: Kept) -> None:
    """Writes the file, and the folder that it is to lie in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found._asdict(), indent=1, ensure_ascii=False) + "\n")


def load(file: Path) -> Kept:
    """What `keep` wrote."""
    return Kept(**json.loads(file.read_text()))
