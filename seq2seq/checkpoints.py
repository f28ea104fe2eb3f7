"""Checkpoints that are whole or not there: arrays by Orbax, every file by its sha256, one rename to make them count.

A checkpoint is a folder `00001200` with `arrays/` (Orbax), `about.json` and `manifest.json`. It is written under
another name, forced to the disk, and renamed; what a crash leaves under other names is never read, and collected later.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
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
    final = _place(folder, step)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} is already there; a step is saved once")
    text = json.dumps({"format": FORMAT, "step": step, **about}, indent=2) + "\n"
    written = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        manifest.make_folder(folder)
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir()
        _write_arrays((written / "arrays").absolute(), arrays)
        (written / "about.json").write_text(text)
        manifest.seal(written)
        written.rename(final)
        manifest.sync(folder)
    except Exception as error:  # of Orbax's libraries each has its own kind for a disk that fails
        shutil.rmtree(written, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {final} cannot be written: {_reason(error)}; what was there stays"
        ) from error
    return final


def steps(folder: Path) -> list[int]:
    """Of all checkpoints in a folder, in order."""
    return sorted(int(name) for name in _names(folder) if name.isdecimal() and _place(folder, int(name)).name == name)


def load(folder: Path, step: int) -> Checkpoint:
    """CheckpointError, before anything is used, if a file is missing, extra, or differs from what was written."""
    found = _place(folder, step)
    manifest.verify(found)
    known = about(folder, step)
    try:
        return Checkpoint(_read_arrays((found / "arrays").absolute()), known)
    except Exception as error:  # the same kinds, for files that are not what Orbax writes, or that are being removed
        raise CheckpointError(
            f"the arrays of {found} cannot be read: {_reason(error)}; remove the folder to use another"
        ) from error


def load_chosen(folder: Path, choose: Callable[[], int | None]) -> Checkpoint | None:
    """The checkpoint of the step that is chosen; chosen again if a writer has removed it meanwhile."""
    while (step := choose()) is not None:
        try:
            return load(folder, step)
        except CheckpointError:
            if step in steps(folder):
                raise
    return None


def about(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself. CheckpointError if that has changed since it was written."""
    found = _place(folder, step)
    try:
        known = json.loads(manifest.content(found, "about.json"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{found} is damaged: about.json cannot be read: {error}; remove the folder to use another"
        ) from None
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        got = known.get("format") if isinstance(known, dict) else known
        raise CheckpointError(f"{found} has format {got!r}, this version reads {FORMAT}; update isoformer")
    if known.get("step") != step:
        raise CheckpointError(f"{found} is of step {known.get('step')!r}; give it the name that it had")
    return known


def about_all(folder: Path) -> dict[int, dict[str, Any]]:
    """What all checkpoints say of themselves, asked again if a writer has removed one meanwhile."""
    found = {}
    for step in steps(folder):
        try:
            found[step] = about(folder, step)
        except CheckpointError:
            if step in steps(folder):
                raise
            return about_all(folder)
    return found


def remove(folder: Path, step: int) -> None:
    """Away with it, at once for every reader."""
    found = _place(folder, step)
    doomed = folder / f".{found.name}.{os.getpid()}.old"
    try:
        found.rename(doomed)
        manifest.sync(folder)  # or a power cut might bring back the name, and not all of the files
        shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(
            f"the old checkpoint {found} cannot be removed: {_reason(error)}; the others stay"
        ) from None


def collect(folder: Path) -> None:
    """Removes what crashed writers have left. Only for who is the one writer."""
    try:
        for name in _names(folder):
            if re.fullmatch(r"\.\d{8,}\.\d+\.(tmp|old)", name):
                shutil.rmtree(folder / name)
    except OSError as error:
        raise CheckpointError(
            f"what a crash has left in {folder} cannot be removed: {_reason(error)}; remove it, or make it writable"
        ) from None


def _place(folder: Path, step: int) -> Path:
    return folder / f"{step:08}"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:  # to go on as if there were no checkpoint would begin anew
        raise CheckpointError(f"{folder} cannot be read: {_reason(error)}; make it readable") from None


def _orbax() -> ocp.Checkpointer:
    # not StandardCheckpointer: when its folder cannot be made, its threads wait for it, and the process for them
    return ocp.Checkpointer(ocp.StandardCheckpointHandler())


def _write_arrays(path: Path, arrays: Mapping[str, Mapping[str, Array]]) -> None:
    with _orbax() as checkpointer:
        checkpointer.save(path, {group: dict(named) for group, named in arrays.items()})


def _read_arrays(path: Path) -> dict[str, dict[str, Array]]:
    with _orbax() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        return checkpointer.restore(path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
