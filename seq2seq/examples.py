"""What a model learns from: a source and what counts as right, as numbers."""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

Source = tuple[Any, ...]
"""Numbers of symbols, or vectors of floats."""


class Example(NamedTuple):
    """A source and every target that counts as right, without special symbols."""

    source: Source
    targets: tuple[tuple[int, ...], ...]


class Pair(NamedTuple):
    """One source and one of its targets."""

    source: Source
    target: tuple[int, ...]


class Pairs(Sequence[Pair]):
    """Every target of every example with its source; made when asked for, so examples may be more than memory holds."""

    def __init__(self, examples: Sequence[Example], *, one_target: bool = False):
        self.examples = examples
        self._places = (
            None if one_target else [(i, j) for i, example in enumerate(examples) for j in range(len(example.targets))]
        )

    def __len__(self) -> int:
        return len(self.examples) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, number: int) -> Pair: ...
    @overload
    def __getitem__(self, number: slice) -> list[Pair]: ...
    def __getitem__(self, number: int | slice) -> Pair | list[Pair]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        i, j = (number, 0) if self._places is None else self._places[number]
        example = self.examples[i]
        return Pair(example.source, example.targets[j])
