"""Runs the laws: targets to adapters, adapters to columns of verdicts, the museum to its kill matrix."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from conformance.adapters import Adapter
from conformance.law import Verdict, judge
from conformance.laws import laws_for
from conformance.museum.exhibit import Exhibit

PEERS = ("jax_nn", "flax_nnx", "eqx_nn", "torch_sdpa")
SHIPPED = tuple(f"conformance.subjects.{name}:adapters" for name in ("ours", *PEERS))
OPTIONAL = ("flax", "equinox", "torch")


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

    @property
    def missed(self) -> tuple[str, ...]:
        return tuple(law for law in self.exhibit.laws if law not in self.rejected_by)


def load(target: str) -> list[Subject]:
    """The adapters of `pkg.module:name`, where the name is one adapter or a sequence of them."""
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise TargetError(f"a target must be pkg.module:adapter, got {target!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise
        raise TargetError(
            f"the target {target!r} needs the module {error.name}, which is not to be found; "
            "run where it can be imported, or install it"
        ) from None
    found = getattr(module, name, None)
    adapters = [found] if isinstance(found, Adapter) else list(found) if isinstance(found, tuple | list) else []
    if not adapters or not all(isinstance(adapter, Adapter) for adapter in adapters):
        offered = [n for n, x in vars(module).items() if isinstance(x, Adapter)]
        raise TargetError(
            f"{target!r} must be an adapter of conformance.adapters or a tuple of them, got {type(found).__name__}; "
            f"{module_name} has {', '.join(offered) or 'none'}"
        )
    return [
        Subject(adapter, f"{module_name}:{_name_of(adapter, module) or f'{name}[{i}]'}")
        for i, adapter in enumerate(adapters)
    ]


def _name_of(adapter: Adapter, module: ModuleType) -> str | None:
    return next((name for name, x in vars(module).items() if x is adapter), None)


def shipped() -> tuple[list[Subject], list[str]]:
    """Ours and the peers', and the packages that are not installed."""
    subjects, absent = [], []
    for target in SHIPPED:
        try:
            subjects += load(target)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in OPTIONAL:
                raise
            absent.append(package)
    return subjects, absent


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


def right_attentions() -> list[Subject]:
    """Implementations that share no line and must pass every law; PyTorch's where it is installed."""
    subjects = load("conformance.museum.right:numpy_attention") + load("conformance.museum.right:blocked_attention")
    try:
        subjects += load("conformance.museum.torch_right:torch_attention")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
    return subjects + load("conformance.subjects.ours:attention")


def kills(*, max_examples: int = 25, progress: Callable[[str], None] = lambda text: None) -> Iterator[Kill]:
    """The kill matrix, a row at a time."""
    from conformance.museum import EXHIBITS

    for exhibit in EXHIBITS:
        progress(f"museum {exhibit.number}: {exhibit.defect}")
        yield kill(exhibit, max_examples=max_examples)


def kill(exhibit: Exhibit, *, max_examples: int = 25) -> Kill:
    """Judges one exhibit by all laws of its kind; nothing is made small."""
    verdicts = (judge(law, exhibit.adapter, max_examples=max_examples, shrinks=0) for law in laws_for(exhibit.adapter))
    return Kill(exhibit, tuple(v.law.name for v in verdicts if v.status not in ("holds", "not offered")))
