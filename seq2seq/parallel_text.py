"""Parallel text as its owner has it: tab-separated, or two aligned files; bad lines are counted, not guessed at."""

import glob
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from seq2seq.errors import UserError

EMPTY, NOT_UTF8, NOT_TWO = "an empty side", "not UTF-8", "not two columns"


def text_pairs(where: str, faults: Counter[str]) -> Iterator[tuple[str, str]]:
    """Source and target of each good line, in order, one line in memory at a time; the others are counted by fault.

    `where` is a tab-separated file or a glob of such, or two aligned files or globs with a comma between. UserError if
    a file cannot be read, or if two files are not aligned: line i of one must translate line i of the other.
    """
    sides = [_files(side) for side in where.split(",")]
    if len(sides) == 1:
        for path in sides[0]:
            for line in _lines(path):
                yield from _pair(line.split(b"\t"), faults)
        return
    if len(sides) != 2 or len(sides[0]) != len(sides[1]):
        counts = " and ".join(str(len(side)) for side in sides)
        raise UserError(f"two aligned files, or as many on both sides of the comma, are needed: {where} names {counts}")
    for first, second in zip(*sides, strict=True):
        for number, columns in enumerate(itertools.zip_longest(_lines(first), _lines(second)), 1):
            if None in columns:
                shorter = first if columns[0] is None else second
                raise UserError(
                    f"{first} and {second} are not aligned: {shorter} ends before line {number} of the other; "
                    "line by line they must belong together"
                )
            yield from _pair(list(columns), faults)


def _pair(columns: list[bytes], faults: Counter[str]) -> Iterator[tuple[str, str]]:
    try:
        texts = [column.decode().strip() for column in columns]
    except UnicodeDecodeError:
        faults[NOT_UTF8] += 1
        return
    if len(texts) != 2:
        faults[NOT_TWO if any(texts) else EMPTY] += 1
    elif not all(texts):
        faults[EMPTY] += 1
    else:
        yield texts[0], texts[1]


def _files(pattern: str) -> list[Path]:
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))] or [Path(pattern)]
    for path in found:
        if not path.is_file():
            raise UserError(f"{path} is no file; give a file, a glob, or two aligned files with a comma between")
    return found


def _lines(path: Path) -> Iterator[bytes]:
    # a line ends at a line feed alone: other characters that Unicode lets end a line would misalign two files
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                yield (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).rstrip(b"\r\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
