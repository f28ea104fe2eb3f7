"""Parallel text made ready: a tokenizer, and its numbers in files that are mapped, so they may exceed memory.

A folder `about.json`, `tokenizer.json`, `SPLIT.tokens`, `SPLIT.ends` and a manifest of sha256; whole or not there.
"""

import itertools
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from seq2seq.errors import UserError
from seq2seq.examples import Example
from seq2seq.machine import versions
from seq2seq.manifest import seal, sync, verify
from seq2seq.parallel_text import text_pairs
from seq2seq.splits import SPLITS, split_by_hash
from seq2seq.vocabulary import Subwords

FORMAT = 1
TOO_LONG = "too long"
_CHUNK = 1000  # pairs that are encoded at a time
_TOKENS, _ENDS = np.dtype("<u4"), np.dtype("<i8")


class Corpus(Sequence[Example]):
    """Encoded pairs, read from the disk when they are asked for."""

    def __init__(self, folder: Path, split: str):
        self.tokens = _mapped(folder / f"{split}.tokens", _TOKENS)
        self.ends = _mapped(folder / f"{split}.ends", _ENDS)

    def __len__(self) -> int:
        return len(self.ends) // 2

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...
    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        i = range(len(self))[number]
        start = 0 if i == 0 else int(self.ends[2 * i - 1])
        middle, end = map(int, self.ends[2 * i : 2 * i + 2])
        return Example(tuple(self.tokens[start:middle].tolist()), (tuple(self.tokens[middle:end].tolist()),))


class Prepared(Mapping[str, Corpus]):
    """The splits of a prepared folder, each checked and opened when it is asked for.

    `kept` is what a run has kept of the folder: with it the folder must still hold what the run was trained on.
    """

    def __init__(self, folder: Path, *, kept: Path | None = None):
        self.folder, self.kept = folder, kept or folder
        self.about = _about(self.kept)
        self.tokenizer = Subwords.load(self.kept / "tokenizer.json")
        self._checked = False

    def __iter__(self) -> Iterator[str]:
        return iter(self.about["pairs"])

    def __len__(self) -> int:
        return len(self.about["pairs"])

    def __getitem__(self, split: str) -> Corpus:
        if split not in self.about["pairs"]:
            raise KeyError(split)
        if not self._checked:
            if _about(self.folder) != self.about:
                raise UserError(f"{self.folder} holds other data than {self.kept} was made with; put the old data back")
            verify(self.folder)
            self._checked = True
        return Corpus(self.folder, split)

    def keep(self, folder: Path) -> None:
        """What a run needs to go on without the data: how to read and write text, and what the data was."""
        folder.mkdir()
        for name in ("about.json", "tokenizer.json"):
            shutil.copyfile(self.folder / name, folder / name)


def prepare(
    output: Path, *, text: str, validation: str | None, test: str | None, vocabulary: int, max_length: int
) -> dict[str, Any]:
    """Makes the folder `output` from parallel text, as `text_pairs` reads it; what it says of itself is returned.

    Without texts of their own, validation (2 %) and test (10 %) are taken from `text` by the hash of the source. The
    subwords are those of the training pairs. Pairs of more than `max_length` tokens on a side, the end counted, are
    left out. UserError leaves nothing behind.
    """
    if max_length < 2:
        raise UserError(f"max_length must be at least 2, a token and the end, got {max_length}")
    if output.exists():
        raise UserError(f"{output} is already there; give another --output or remove it")
    texts = {"train": text, "validation": validation, "test": test}
    written = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        written.mkdir(parents=True)
        about = _write(written, texts, vocabulary, max_length)
        (written / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        seal(written)
        written.rename(output)
        sync(output.parent)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; give another --output") from None
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return about


def lengths(max_length: int) -> tuple[int, ...]:
    """To which rows are padded: each a half or a third longer than the one before, the last one `max_length`."""
    steps = itertools.takewhile(lambda n: n < max_length, (n << k for k in itertools.count(2) for n in (2, 3)))
    return (*steps, max_length)


def _write(folder: Path, texts: dict[str, str | None], vocabulary: int, max_length: int) -> dict[str, Any]:
    faults = {split: Counter() for split in SPLITS}
    trained = (side for split, pair in _split_pairs(texts, faults) if split == "train" for side in pair)
    tokenizer = Subwords.train(trained, size=vocabulary)
    tokenizer.save(folder / "tokenizer.json")
    counts: Counter[str] = Counter()
    with _Writers(folder) as writers:
        pairs = _split_pairs(texts, {split: Counter() for split in SPLITS})
        while chunk := list(itertools.islice(pairs, _CHUNK)):
            sources, targets = (tokenizer.encode_all([pair[side] for _, pair in chunk]) for side in (0, 1))
            for (split, _), source, target in zip(chunk, sources, targets, strict=True):
                if max(len(source), len(target) + 1) > max_length:
                    faults[split][TOO_LONG] += 1
                else:
                    writers.add(split, source, target)
                    counts[split] += 1
    for split in SPLITS:
        if not counts[split]:
            left = ", ".join(f"{number} {fault}" for fault, number in faults[split].items()) or "there were no lines"
            raise UserError(f"no pair is left for {split}: {left}; give other text, or another --max-length")
    return {
        "format": FORMAT,
        "command": shlex.join(["isoformer", *sys.argv[1:]]),
        "texts": texts,
        "vocabulary": len(tokenizer),
        "max_length": max_length,
        "pairs": {split: counts[split] for split in SPLITS},
        "left_out": {split: dict(sorted(found.items())) for split, found in faults.items()},
        "versions": versions("tokenizers"),
    }


def _split_pairs(
    texts: dict[str, str | None], faults: dict[str, Counter[str]]
) -> Iterator[tuple[str, tuple[str, str]]]:
    own = [split for split, where in texts.items() if where is not None]
    for split, where in texts.items():
        if where is None:
            continue
        for pair in text_pairs(where, faults[split]):
            chosen = split_by_hash(pair[0]) if split == "train" else split
            yield (split if chosen in own else chosen), pair


class _Writers:
    """The files of all splits, appended to."""

    def __init__(self, folder: Path):
        self.files = {
            split: [(folder / f"{split}.{kind}").open("wb") for kind in ("tokens", "ends")] for split in SPLITS
        }
        self.written: dict[str, int] = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> "_Writers":
        return self

    def __exit__(self, *_: object) -> None:
        for files in self.files.values():
            for file in files:
                file.flush()
                os.fsync(file.fileno())
                file.close()

    def add(self, split: str, source: list[int], target: list[int]) -> None:
        tokens, ends = self.files[split]
        tokens.write(np.asarray(source + target, _TOKENS).tobytes())
        middle = self.written[split] + len(source)
        self.written[split] = middle + len(target)
        ends.write(np.asarray([middle, self.written[split]], _ENDS).tobytes())


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "about.json"
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no prepared data, {path.name} cannot be read: {error}; `isoformer prepare` makes it"
        ) from None
    if about.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {about.get('format')!r}, this version reads {FORMAT}; prepare the data again"
        )
    return about


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
