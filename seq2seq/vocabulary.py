"""Text to numbers and back: whole symbols for the small tasks, byte-level subwords for any text."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from core.decoding import BOS, EOS, PAD
from seq2seq.errors import UserError

SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
"""The first three of every vocabulary: padding, beginning and end."""


class Vocabulary(Protocol):
    """What a task needs of one."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> tuple[int, ...]:
        """The numbers of a text, without special ones. UserError for what the vocabulary does not know."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first end."""
        ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """A label for each number before the first end."""
        ...


def before_end(ids: Iterable[int]) -> tuple[int, ...]:
    """The numbers before the first end symbol."""
    return tuple(itertools.takewhile(lambda i: i != EOS, map(int, ids)))


class Symbols:
    """Every symbol has its number. Symbols of a text stand side by side, or with `separator` between them."""

    def __init__(self, symbols: Iterable[str], *, separator: str = " "):
        self.symbols = [*SPECIAL, *sorted(symbols)]
        self.separator = separator
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> tuple[int, ...]:
        """UserError for a symbol that is not there."""
        found = text.split() if self.separator else text.lower()
        try:
            return tuple(self._ids[symbol] for symbol in found)
        except KeyError as error:
            known = " ".join(self.symbols[len(SPECIAL) :])
            raise UserError(f"the task has no symbol {error.args[0]!r}; it knows: {known}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """`<?>` for a number that stands for none."""
        return self.separator.join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The symbols one by one."""
        return [self.symbols[i] if 0 <= i < len(self) else "<?>" for i in before_end(ids)]


class Subwords:
    """Byte-level byte-pair encoding (Sennrich et al. 2016): every text has numbers, and comes back in every byte."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.encode_special_tokens = True  # a text that says <eos> is text
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterator[str], *, size: int) -> "Subwords":
        """Learns `size` subwords, or as many as the texts have; they are read once, one at a time."""
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        smallest = len(SPECIAL) + len(alphabet)
        if size < smallest:
            raise UserError(f"a vocabulary holds every byte and {len(SPECIAL)} special symbols, {smallest}, got {size}")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> "Subwords":
        """UserError for a file that is not what `save` wrote."""
        try:
            found = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is no tokenizer: {error}; prepare the data again") from None
        if any(found.token_to_id(name) != number for name, number in SPECIAL.items()):
            raise UserError(f"{path} is a tokenizer of another kind: it must begin with {', '.join(SPECIAL)}")
        return cls(found)

    def save(self, path: Path) -> None:
        """As the tokenizers library's own JSON."""
        self.tokenizer.save(str(path))

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> tuple[int, ...]:
        """Never fails: what is no whole subword is its bytes."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of many texts, faster."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Special symbols and numbers of no subword say nothing; bytes that are not UTF-8 become U+FFFD."""
        known = [i for i in before_end(ids) if len(SPECIAL) <= i < len(self)]
        return self.tokenizer.decode(known, skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each subword by itself."""
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in before_end(ids)]
