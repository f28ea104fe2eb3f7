"""A folder sealed by the sha256 of its files: whole and unchanged, or refused."""

import hashlib
import json
import os
from pathlib import Path

from seq2seq.errors import CheckpointError

_MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Writes the manifest of all files in the folder, and forces everything to the disk."""
    (folder / _MANIFEST).write_text(json.dumps(_digests(folder), indent=2) + "\n")
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def verify(folder: Path) -> None:
    """CheckpointError unless the folder holds exactly the files of its manifest, in every bit."""
    try:
        kept = json.loads((folder / _MANIFEST).read_text())
        digests = _digests(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not whole, its {_MANIFEST} cannot be read: {error}") from None
    if not isinstance(kept, dict) or kept != digests:
        kept = kept if isinstance(kept, dict) else {}
        name = min(name for name in kept.keys() | digests.keys() if kept.get(name) != digests.get(name))
        what = "is missing" if name not in digests else "does not belong there" if name not in kept else "has changed"
        raise CheckpointError(f"{folder} is damaged: {name} {what}; remove the folder to use another")


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.name != _MANIFEST or path.parent != folder)
    return {str(path.relative_to(folder)): _sha256(path) for path in files if not path.is_dir() or path.is_symlink()}


def _sha256(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "not a file"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
