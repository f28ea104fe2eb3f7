"""Planted mistakes: each is run, and classed by what happened.

A recipe draws batches of data; how many it had drawn when an exception came says when a mistake was refused:
before any, at construction; with the first, at the call; after more, late. If what failed is an assertion of the
recipe itself, nobody noticed before: the mistake was silent, or only a warning told of it.
"""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from bench.recipes import Batches

Run = Callable[[Batches], Any]
Class = Literal[
    "refused at construction", "refused at the call", "refused late", "wrong with a warning", "silently wrong",
    "harmless",
]  # fmt: skip
RECIPES = Path(__file__).parent / "recipes"


class Outcome(NamedTuple):
    """What came of one mistake; `message` is what its maker would have seen, or what the recipe's assertion found."""

    name: str
    mistake: str
    seen: str
    outcome: Class
    message: str


def mistake(seen: str = "") -> Callable[[Run], Run]:
    """Marks a function that does a recipe wrongly; its docstring says what is wrong, `seen` where users met it."""

    def marked(run: Run) -> Run:
        run.__dict__["seen"] = seen
        return run

    return marked


def mistakes(recipe: ModuleType) -> list[Run]:
    """The mistakes that a recipe's module plants, in the order of the file."""
    return [run for run in vars(recipe).values() if "seen" in getattr(run, "__dict__", {})]


def tried(run: Run) -> Outcome:
    """The mistake, run on fresh data."""
    batches = Batches()
    about = run.__name__, " ".join((run.__doc__ or "").split()), run.__dict__["seen"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            run(batches)
        except Exception as error:
            return Outcome(*about, _class(error, batches.drawn, bool(told)), _message(error, told))
    return Outcome(*about, "harmless", _warning(told))


def _class(error: Exception, drawn: int, warned: bool) -> Class:
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, AssertionError) and raised_in.parent == RECIPES:
        return "wrong with a warning" if warned else "silently wrong"
    if drawn == 0:
        return "refused at construction"
    return "refused at the call" if drawn == 1 else "refused late"


def _message(error: Exception, told: list[warnings.WarningMessage]) -> str:
    """What was raised; of a recipe's own assertion, what was warned of before it."""
    if isinstance(error, AssertionError) and told:
        return _warning(told)
    return f"{type(error).__name__}: {_first_line(str(error))}"


def _warning(told: list[warnings.WarningMessage]) -> str:
    return "".join(f"{type(warning.message).__name__}: {_first_line(str(warning.message))}" for warning in told[:1])


def _first_line(text: str) -> str:
    """With the second, if the first only leads to it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
