"""A pytest plugin: each law on each adapter is a test.

    pytest --conform pkg.module:adapter [--conform-skips FILE] [--conform-xfails FILE] [--conform-max-examples N]

Without paths only the laws are run. The files hold one `fnmatch` pattern a line, for names as pytest shows them;
`#` begins a comment. Nothing of the kit is imported unless `--conform` is given.
"""

from fnmatch import fnmatch
from pathlib import Path
from typing import cast

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conform", "the laws of attention, by isoformer")
    group.addoption("--conform", action="append", default=[], metavar="TARGET", help="an adapter, pkg.module:name")
    group.addoption("--conform-skips", metavar="FILE", help="patterns of laws to skip")
    group.addoption("--conform-xfails", metavar="FILE", help="patterns of laws that are known to fail")
    group.addoption("--conform-max-examples", type=_count, default=25, metavar="N", help="cases for each law")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError  # argparse says which option, and what came
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--conform") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    targets = config.getoption("--conform")
    if not targets:
        return
    from conformance.laws import laws_for
    from conformance.suite import TargetError, load

    skips, xfails = (_patterns(config.getoption(name)) for name in ("--conform-skips", "--conform-xfails"))
    for target in targets:
        try:
            subjects = load(target)
        except TargetError as error:
            raise pytest.UsageError(str(error)) from None
        for subject in subjects:
            for law in laws_for(subject.adapter):
                name = f"{subject.target}::{law.name.replace(' ', '_')}"
                item = LawItem.from_parent(session, name=name, law=law, adapter=subject.adapter, target=subject.target)
                if any(fnmatch(name, pattern) for pattern in skips):
                    item.add_marker(pytest.mark.skip(reason="in --conform-skips"))
                if any(fnmatch(name, pattern) for pattern in xfails):
                    item.add_marker(pytest.mark.xfail(reason="in --conform-xfails"))
                items.append(item)


def _patterns(file: str | None) -> list[str]:
    lines = Path(file).read_text().splitlines() if file else []
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


class LawItem(pytest.Item):
    """One law on one adapter. Not offered: skipped. Differs by design: an expected failure."""

    def __init__(self, *, law, adapter, target, **more):
        super().__init__(**more)
        self.law, self.adapter, self.target = law, adapter, target
        self.max_examples = cast(int, self.config.getoption("--conform-max-examples"))

    def runtest(self) -> None:
        from conformance.law import judge
        from conformance.snippet import snippet

        verdict = judge(self.law, self.adapter, max_examples=self.max_examples)
        if verdict.status == "not offered":
            pytest.skip("not offered")
        if verdict.status == "differs":
            pytest.xfail(f"differs by design: {verdict.convention}")
        if verdict.failure is not None:
            failure = verdict.failure
            raise LawBrokenError(f"{failure.message}\n{failure.configuration}\n\n{snippet(self.target, verdict)}")

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if isinstance(excinfo.value, LawBrokenError) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return Path(self.target), 0, self.name


class LawBrokenError(Exception):
    """A law does not hold; the message holds a snippet."""
