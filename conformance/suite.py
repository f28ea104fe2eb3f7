"""Runs the laws: targets to adapters, adapters to columns of verdicts, the museum to its kill matrix."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from conformance.adapters import Adapter
from conformance.law import Verdict, judge
from conformance.laws import laws_for
from conformance.museum.exhibit import Exhibit

PEERS = ("jax_nn", "flax_nnx", "eqx_nn", "torch_sdpa")
SHIPPED = tuple(f"conformance.subjects.{name}:adapters" for name in ("ours", "runs", *PEERS))
OPTIONAL = ("flax", "equinox", "torch", "optax", "grain", "orbax")
RIGHT = (
    *(f"conformance.museum.right:{name}_attention" for name in ("numpy", "blocked")),
    "conformance.museum.jax_right:jax_attention",
    "conformance.museum.caches:right",
    "conformance.museum.runs:right",
    *(f"conformance.museum.decoding:right_{name}" for name in ("search", "sampling")),
    "conformance.subjects.ours:adapters",
)


class TargetError(Exception):
    """A target that names no adapter; the message says what to give instead."""


@dataclass(frozen=True)
class Subject:
    """An adapter, and the expression that gives it back: `pkg.module:name`."""

    adapter: Adapter
    target: str


@dataclass(frozen=True)
class Column:
    """All verdicts on one adapter."""

    subject: Subject
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Kill:
    """Which laws rejected an exhibit, and whether those that must are among them."""

    exhibit: Exhibit
    rejected_by: tuple[str, ...]
    by_convention: tuple[str, ...] = ()  # of them, those that named it another convention

    @property
    def missed(self) -> tuple[str, ...]:
        return tuple(law for law in self.exhibit.laws if law not in self.rejected_by)


def load(target: str) -> list[Subject]:
    """The adapters of `pkg.module:name`, where the name is one adapter or a sequence of them.

    The module may lie in the folder where one is.
    """
    module_name, _, name = target.partition(":")
    if not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise TargetError(f"a target must be pkg.module:adapter, got {target!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        needed = "" if module_name.startswith(error.name or "?") else f" by {_place_of(error)}"
        raise TargetError(
            f"the target {target!r} needs the module {error.name}{needed}, which is not to be found; "
            "run where it can be imported, or install it"
        ) from error
    except Exception as error:
        raise TargetError(
            f"the target {target!r} cannot be imported, {_place_of(error)} raises {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        raise TargetError(f"{module_name} has no {name!r}; its adapters are {_offered(module)}")
    found = getattr(module, name)
    adapters = [found] if isinstance(found, Adapter) else list(found) if isinstance(found, tuple | list) else []
    if not adapters or not all(isinstance(adapter, Adapter) for adapter in adapters):
        raise TargetError(
            f"{target!r} must be an adapter of conformance.adapters or a tuple of them, got {type(found).__name__}; "
            f"the adapters of {module_name} are {_offered(module)}"
        )
    return [
        Subject(adapter, f"{module_name}:{_name_of(adapter, module) or f'{name}[{i}]'}")
        for i, adapter in enumerate(adapters)
    ]


def _offered(module: ModuleType) -> str:
    return ", ".join(name for name, x in vars(module).items() if isinstance(x, Adapter)) or "none"


def _place_of(error: Exception) -> str:
    """Where it was raised, not counting Python's own import."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}"


def _name_of(adapter: Adapter, module: ModuleType) -> str | None:
    return next((name for name, x in vars(module).items() if x is adapter), None)


def shipped() -> tuple[list[Subject], list[str]]:
    """Ours and the peers', and the packages that are not installed."""
    subjects, absent = [], []
    for target in SHIPPED:
        try:
            subjects += load(target)
        except TargetError as error:
            absent.append(_absent_package(error))
    return subjects, absent


def _absent_package(error: TargetError) -> str:
    """The optional package for want of which a target cannot be imported; raises any other error again."""
    cause = error.__cause__
    package = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
    if package not in OPTIONAL:
        raise error
    return package


def conform(
    subjects: list[Subject], *, max_examples: int = 25, progress: Callable[[str], None] = lambda text: None
) -> list[Column]:
    """Judges each by all laws of its kind."""
    columns = []
    for subject in subjects:
        verdicts = []
        for law in laws_for(subject.adapter):
            progress(f"{subject.adapter.name}: {law.name}")
            verdicts.append(judge(law, subject.adapter, max_examples=max_examples))
        columns.append(Column(subject, tuple(verdicts)))
    return columns


def right() -> list[Subject]:
    """Implementations that must pass every law: ours, and some that share no line with them; PyTorch's where it is."""
    subjects = [subject for target in RIGHT for subject in load(target)]
    try:
        subjects += load("conformance.museum.torch_right:torch_attention")
    except TargetError as error:
        _absent_package(error)
    return subjects


def kills(*, max_examples: int = 25, progress: Callable[[str], None] = lambda text: None) -> Iterator[Kill]:
    """The kill matrix, a row at a time."""
    from conformance.museum import EXHIBITS

    for exhibit in EXHIBITS:
        progress(f"museum {exhibit.number}: {exhibit.defect}")
        yield kill(exhibit, max_examples=max_examples)


def kill(exhibit: Exhibit, *, max_examples: int = 25) -> Kill:
    """Judges one exhibit by all laws of its kind; nothing is made small."""
    verdicts = [judge(law, exhibit.adapter, max_examples=max_examples, shrinks=0) for law in laws_for(exhibit.adapter)]
    rejected = [v for v in verdicts if v.status not in ("holds", "not offered")]
    conventions = tuple(v.law.name for v in rejected if v.status == "differs")
    return Kill(exhibit, tuple(v.law.name for v in rejected), conventions)
