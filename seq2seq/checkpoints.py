"""Checkpoints that are whole or not there: arrays by Orbax, every file by its sha256, one rename to make them count.

A checkpoint is a folder `00001200` with `arrays/` (Orbax), `about.json` and `manifest.json`. It is written under
another name, forced to the disk, and renamed; what a crash leaves under other names is never read, and collected later.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array

from seq2seq import manifest
from seq2seq.errors import CheckpointError

FORMAT = 1


class Checkpoint(NamedTuple):
    """The state of a training after a step: arrays by group and name, and what else there is to know."""

    arrays: dict[str, dict[str, Array]]
    about: dict[str, Any]


def save(folder: Path, step: int, arrays: Mapping[str, Mapping[str, Array]], about: Mapping[str, Any]) -> Path:
    """The checkpoint of that step, complete and on the disk when this returns; a crash before leaves none."""
    final = folder / f"{step:08}"
    if final.exists():
        raise CheckpointError(f"{final} is already there; a step is saved once")
    written = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((written / "arrays").absolute(), {group: dict(named) for group, named in arrays.items()})
        text = json.dumps({"format": FORMAT, "step": step, **about}, indent=2) + "\n"
        (written / "about.json").write_text(text)
        manifest.seal(written)
        written.rename(final)
        manifest.sync(folder)
    except OSError as error:
        shutil.rmtree(written, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {final} cannot be written: {error.strerror}; what was there stays"
        ) from None
    return final


def steps(folder: Path) -> list[int]:
    """Of all checkpoints in a folder, in order."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())


def load(folder: Path, step: int) -> Checkpoint:
    """CheckpointError, before anything is used, if a file is missing, extra, or differs from what was written."""
    found = folder / f"{step:08}"
    manifest.verify(found)
    known = about(folder, step)
    if known.get("format") != FORMAT:
        raise CheckpointError(
            f"{found} has format {known.get('format')!r}, this version reads {FORMAT}; update isoformer"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        path = (found / "arrays").absolute()
        stored = checkpointer.metadata(path).item_metadata.tree
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
        return Checkpoint(checkpointer.restore(path, wanted), known)


def about(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    path = folder / f"{step:08}" / "about.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove the folder to use another") from None


def remove(folder: Path, step: int) -> None:
    """Away with it, at once for every reader."""
    found = folder / f"{step:08}"
    doomed = folder / f".{found.name}.{os.getpid()}.old"
    found.rename(doomed)
    shutil.rmtree(doomed)


def collect(folder: Path) -> None:
    """Removes what crashed writers have left. Only for who is the one writer."""
    for path in folder.glob(".*"):
        shutil.rmtree(path)
