"""All benches, each in a short form of some minutes at most and at its full length."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Form(NamedTuple):
    """What follows `python -m bench`, and the options that make it short."""

    command: tuple[str, ...]
    short: tuple[str, ...] = ()


_FEW = ("--rounds", "5", "--length", "64", "--length", "256", "--length", "512")
FORMS = {
    "agreement": Form(("agreement",)),
    "speed": Form(("speed",), _FEW),
    "speed-full": Form(("speed", "--full"), _FEW),
    "modules": Form(("modules",), _FEW),
    "memory": Form(("memory",)),
    "compile": Form(("compile",), ("--layers", "1", "--layers", "3", "--layers", "6", "--rounds", "2")),
    "dispatch": Form(("dispatch",), ("--layers", "1", "--layers", "3", "--layers", "9", "--rounds", "7")),
    "train": Form(("train",), ("--size", "small", "--rounds", "3")),
    "decode": Form(("decode",), ("--rounds", "3")),
    "recipes": Form(("recipes",), ("--runs", "1")),
    "conformance": Form(("conformance",), ("--max-examples", "10")),
}
"""By the name of the file, but for its ending, that keeps what was found."""


def run(name: str, *, short: bool, kept: Path | None = None) -> None:
    """Runs one in a process of its own, which prints its tables; with a folder, what it found is kept there."""
    form = FORMS[name]
    command = [sys.executable, "-m", "bench", *form.command, *(form.short if short else ())]
    subprocess.run(command + (["--json", str(kept / f"{name}.json")] if kept else []), check=True)
