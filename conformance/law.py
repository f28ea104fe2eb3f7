"""What a law is, and how an implementation is judged by it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from conformance.adapters import Adapter

Check = Callable[[Any, Any], None]
Status = Literal["holds", "differs", "defect", "raises", "not offered"]
EVERY_HEALTH_CHECK: list[HealthCheck] = list(HealthCheck)  # pyright: ignore[reportAssignmentType]
SHRINKS = 60
"""Examples spent on making a failure small."""


class Violation(AssertionError):  # noqa: N818
    """A law does not hold; the message says what came and what was wanted."""


@dataclass(frozen=True)
class Law:
    """What must hold for every case. A convention is another behaviour that is well defined, and its own check."""

    name: str
    kind: type[Adapter]
    needs: frozenset[str]
    cases: Callable[[Any], SearchStrategy]
    check: Check
    conventions: dict[str, Check] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    max_examples: int | None = None
    about: str = ""


@dataclass(frozen=True)
class Call:
    """One call of the implementation: what went in and what came out."""

    method: str
    arrays: tuple
    options: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Failure:
    """The smallest case that broke a law, the calls made, and what was wrong with their results."""

    case: Any
    message: str
    calls: tuple[Call, ...]
    raised: bool

    @property
    def configuration(self) -> str:
        """What went into the last call: shapes of arrays, and all else as it was."""
        if not self.calls:
            return f"case {self.case!r}"
        call = self.calls[-1]
        arrays, options = map(described, call.arrays), (f"{k}={described(x)}" for k, x in call.options.items())
        return f"{call.method or 'called'} with {', '.join([*arrays, *options])}"


@dataclass(frozen=True)
class Verdict:
    """Of one implementation by one law."""

    law: Law
    status: Status
    convention: str | None = None
    failure: Failure | None = None


def law(
    kind: type[Adapter],
    *needs: str,
    cases: Callable[[Any], SearchStrategy],
    conventions: dict[str, Check] | None = None,
    lacks: tuple[str, ...] = (),
    max_examples: int | None = None,
) -> Callable[[Check], Law]:
    """Makes a law of a check; its name is the function's, read as a sentence.

    It is judged where the adapter has all flags of `needs` and none of `lacks`.
    """
    if unknown := (set(needs) | set(lacks)) - kind.flags.keys():
        raise ValueError(f"{kind.__name__} has no flags {sorted(unknown)}")

    def made(check: Check) -> Law:
        return Law(
            name=check.__name__.replace("_", " "),
            kind=kind,
            needs=frozenset(needs),
            cases=cases,
            check=check,
            conventions=conventions or {},
            lacks=frozenset(lacks),
            max_examples=max_examples,
            about=(check.__doc__ or "").strip(),
        )

    return made


def judge(law: Law, adapter: Adapter, *, max_examples: int = 25, shrinks: int = SHRINKS) -> Verdict:
    """holds; differs by design, where one convention held in every case; or a defect, with its smallest case."""
    if not law.needs <= adapter.can or law.lacks & adapter.can:
        return Verdict(law, "not offered")
    max_examples = min(max_examples, law.max_examples or max_examples)
    cases = law.cases(adapter)
    failure = smallest_failure(law.check, adapter, cases, max_examples=max_examples, shrinks=shrinks)
    if failure is None:
        return Verdict(law, "holds")
    for name, convention in law.conventions.items():
        if smallest_failure(convention, adapter, cases, max_examples=max_examples, shrinks=0) is None:
            return Verdict(law, "differs", name, failure)
    return Verdict(law, "raises" if failure.raised else "defect", None, failure)


def smallest_failure(
    check: Check, adapter: Adapter, cases: SearchStrategy, *, max_examples: int, shrinks: int
) -> Failure | None:
    """None if the check passes in all cases that Hypothesis makes, the same ones in every run."""
    smallest: tuple[int, Failure] | None = None
    left = shrinks

    @settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrinks else [])],
        suppress_health_check=EVERY_HEALTH_CHECK,
        report_multiple_bugs=False,
    )
    @given(cases)
    def search(case):
        nonlocal smallest, left
        if smallest is not None:
            left -= 1
        if left < 0:
            raise _EnoughError
        failure = failure_of(check, adapter, case)
        if failure is not None:
            if smallest is None or size(case) <= smallest[0]:
                smallest = size(case), failure
            raise _FoundError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Hypothesis, that a case is long
            search()
    except (_FoundError, _EnoughError):
        pass
    return None if smallest is None else smallest[1]


def failure_of(check: Check, adapter: Adapter, case: Any) -> Failure | None:
    """None if the check passes in this case."""
    recorder = Recorder(adapter)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(recorder, case)
    except Violation as violation:
        return Failure(case, str(violation), tuple(recorder.calls), raised=False)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Failure(case, f"{type(error).__name__}: {lines[0][:300]}", tuple(recorder.calls), raised=True)
    return None


class Recorder:
    """An adapter that writes down its calls."""

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self.calls: list[Call] = []

    def __getattr__(self, name):
        value = getattr(self._adapter, name)
        return (
            self._recorded(name, value)
            if name in ("eager", "careful", "mapped", "pull_back", "load", "full")
            else value
        )

    def __call__(self, *arrays, **options):
        return self._recorded("", self._adapter)(*arrays, **options)

    def _recorded(self, method, function):
        def call(*arrays, **options):
            try:
                result = function(*arrays, **options)
            except Exception as error:
                self.calls.append(Call(method, arrays, options, error))
                raise
            self.calls.append(Call(method, arrays, options, result))
            return result

        return call


def described(x: Any) -> str:
    """An array by its dtype and shape, a number as it is, and what is neither by its type."""
    if isinstance(x, np.ndarray):
        return f"{x.dtype}{list(x.shape)}"
    if isinstance(x, tuple) and all(isinstance(item, int) for item in x):
        return str(x)
    return str(x) if isinstance(x, np.generic | int | float | str | None) else type(x).__name__


class _FoundError(Exception):
    pass


class _EnoughError(BaseException):
    """Ends Hypothesis' search: it is no Exception, so that it is not taken for a failure of its own."""


def size(case: Any) -> int:
    """How many numbers a case holds."""
    if isinstance(case, dict):
        return sum(map(size, case.values()))
    if isinstance(case, tuple | list):
        return sum(map(size, case))
    return case.size if isinstance(case, np.ndarray) else 1


# what checks are made of


def require(condition: Any, message: str) -> None:
    """Violation with the message unless the condition holds everywhere."""
    if not np.all(condition):
        raise Violation(message)


def same_bits(got: np.ndarray, wanted: np.ndarray, what: str = "the output") -> None:
    """Equal shapes, dtypes and numbers; NaN equals NaN."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        raise Violation(f"{what} must be {wanted.dtype}{list(wanted.shape)}, got {got.dtype}{list(got.shape)}")
    equal = (got == wanted) | ((got != got) & (wanted != wanted))
    if not equal.all():
        raise Violation(f"{what} must be equal in every bit: {_first(~equal, got, wanted)}")


def within(got: Any, wanted: Any, bound: Any, what: str = "the output") -> None:
    """|got - wanted| <= bound everywhere."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape:
        raise Violation(f"{what} must have shape {list(wanted.shape)}, got {list(got.shape)}")
    difference = np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64))
    wrong = ~(difference <= bound)
    if wrong.any():
        worst = np.where(wrong, np.nan_to_num(difference, nan=np.inf), -1.0)
        cell = tuple(int(i) for i in np.unravel_index(worst.argmax(), worst.shape))
        allowed = np.broadcast_to(bound, difference.shape)[cell]
        raise Violation(
            f"{what} differs by {difference[cell]:.3g} at {cell}: got {got[cell]}, "
            f"wanted {wanted[cell]:.9g}, at most {allowed:.2g} apart"
        )


def refuses(call: Callable[[], Any], what: str) -> None:
    """The call raises."""
    try:
        result = call()
    except Exception:
        return
    shown = f"{result.dtype}{list(result.shape)}" if isinstance(result, np.ndarray) else type(result).__name__
    raise Violation(f"{what} must be refused, got {shown} without an error")


def _first(wrong: np.ndarray, got: np.ndarray, wanted: np.ndarray) -> str:
    cell = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"at {cell} got {got[cell]}, wanted {wanted[cell]} ({int(wrong.sum())} of {wrong.size} differ)"
