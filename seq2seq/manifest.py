"""A folder sealed by the sha256 of its files: whole and unchanged, or refused."""

import hashlib
import json
import os
from pathlib import Path

from seq2seq.errors import CheckpointError

_MANIFEST = "manifest.json"
_LONGEST = 1 << 24  # bytes of a manifest that is read


def seal(folder: Path) -> None:
    """Writes the manifest of all files in the folder, and forces everything to the disk."""
    (folder / _MANIFEST).write_text(_text(_digests(folder)))
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def verify(folder: Path) -> None:
    """CheckpointError unless the folder holds exactly the files of its manifest, in every bit."""
    kept = _kept(folder)
    try:
        digests = _digests(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}; remove the folder to use another") from None
    if kept != digests:
        name = min(name for name in kept.keys() | digests.keys() if kept.get(name) != digests.get(name))
        what = "is missing" if name not in digests else "does not belong there" if name not in kept else "has changed"
        raise _damaged(folder, f"{name} {what}")


def content(folder: Path, name: str) -> bytes:
    """Of one file, as it was when the folder was sealed; else CheckpointError. The other files are not looked at."""
    kept = _kept(folder).get(name)
    if not _is_file(folder / name):
        raise _damaged(folder, f"{name} is missing")
    try:
        found = (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}; remove the folder to use another") from None
    if kept != hashlib.sha256(found).hexdigest():
        raise _damaged(folder, f"{name} has changed")
    return found


def make_folder(folder: Path) -> None:
    """With all those that it lies in, forced to the disk; it may be there."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kept(folder: Path) -> dict[str, str]:
    path = folder / _MANIFEST
    try:
        if not _is_file(path) or path.stat().st_size > _LONGEST:
            raise ValueError("there is none, or it is too long")
        text = path.read_text()
        kept = json.loads(text)
        if not isinstance(kept, dict) or not all(isinstance(x, str) for x in kept.values()) or _text(kept) != text:
            raise ValueError("it is not as it was written")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not whole, its {_MANIFEST} cannot be read: {error}; remove the folder to use another"
        ) from None
    return kept


def _text(digests: dict[str, str | None]) -> str:
    return json.dumps(digests, indent=2) + "\n"


def _digests(folder: Path) -> dict[str, str | None]:
    files = (path for path in sorted(folder.rglob("*")) if path.name != _MANIFEST or path.parent != folder)
    return {str(path.relative_to(folder)): _sha256(path) for path in files if not path.is_dir() or path.is_symlink()}


def _sha256(path: Path) -> str | None:
    if not _is_file(path):
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_file(path: Path) -> bool:
    """No folder, no link, and nothing that keeps its reader waiting."""
    return path.is_file() and not path.is_symlink()


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged: {what}; remove the folder to use another")
