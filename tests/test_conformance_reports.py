"""The kit's three reports, its command and its pytest plugin."""

import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from conformance import report, suite
from conformance.adapters import Sinusoid
from conformance.cli import app
from conformance.law import judge
from conformance.laws import laws_for
from conformance.museum import EXHIBITS
from conformance.museum.right import numpy_attention
from tests.conftest import ROOT

pytest_plugins = ["pytester"]

MINE = """
import numpy as np
from conformance import oracle
from conformance.adapters import Sinusoid

def good(*, length, d_model):
    return oracle.sinusoidal(np.arange(length), d_model)

def halves(*, length, d_model):
    table = good(length=length, d_model=d_model)
    return np.concatenate([table[:, ::2], table[:, 1::2]], axis=-1)

right = Sinusoid("right", good)
other = Sinusoid("halves", halves)
wrong = Sinusoid("<wrong>", lambda *, length, d_model: 2 * good(length=length, d_model=d_model))
everything = (right, other, wrong)
number = 7
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_adapters.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_adapters", raising=False)
    return tmp_path


@pytest.fixture
def columns(mine):
    return suite.conform(suite.load("mine_adapters:everything"))


def test_targets_are_found_by_the_name_that_gives_them_back(mine):
    subjects = suite.load("mine_adapters:everything")
    assert [s.target for s in subjects] == [f"mine_adapters:{name}" for name in ("right", "other", "wrong")]
    assert suite.load("mine_adapters:wrong") == subjects[2:]


def test_verdicts_of_the_three_are_told_apart(columns):
    first = [column.verdicts[0].status for column in columns]
    assert first == ["holds", "differs", "defect"]
    assert {v.status for v in columns[0].verdicts} == {"holds", "not offered"}


def test_the_text_has_a_row_for_each_law_and_a_line_for_each_difference(columns):
    console = Console(width=160, record=True, file=io.StringIO())
    report.as_text(columns, ["torch"], console)
    text = console.export_text()
    (row,) = (line for line in text.splitlines() if line.startswith("│ sines stand in even"))
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["✓", "≠", "✗"]
    assert "≠ halves: sines stand in even columns and cosines in odd: differs by design: all sines stand before" in text
    assert "✗ <wrong>: sin squared plus cos squared is one: the squared length of a row differs by" in text
    assert "torch: not installed" in text
    assert "hypothesis 6." in text


def test_the_json_holds_every_verdict_with_its_snippet(columns):
    found = json.loads(json.dumps(report.as_json(columns, ["torch"])))
    assert found["not installed"] == ["torch"]
    names = [implementation["name"] for implementation in found["implementations"]]
    assert names == ["right", "halves", "<wrong>"]
    verdict = found["implementations"][2]["verdicts"][0]
    assert verdict["status"] == "defect"
    assert "import mine_adapters as target" in verdict["snippet"]
    assert "adapter(length=" in verdict["snippet"]
    assert len(found["implementations"][0]["verdicts"]) == len(laws_for(columns[0].subject.adapter))


class Page(HTMLParser):
    """Tags that are open, and what the page needs from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.needs, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "html"):
            self.open.append(tag)
        self.needs += [value for name, value in attrs if name in ("src", "href")]
        self.needs += [tag] if tag == "script" else []
        self.cells += [dict(attrs).get("class")] if tag == "td" else []

    def handle_endtag(self, tag):
        assert tag == "html" or self.open.pop() == tag


def test_the_page_stands_alone_in_light_and_dark(columns):
    text = report.as_page(columns, ["torch"])
    page = Page()
    page.feed(text)
    assert not page.open
    assert not page.needs
    assert page.cells[:4] == [None, "holds", "differs", "defect"]
    assert "prefers-color-scheme: dark" in text
    assert "&lt;wrong&gt;" in text
    assert "<wrong>" not in text
    assert "torch: not installed" in text


def test_markdown_has_the_same_cells(columns):
    lines = report.as_markdown(columns, ["torch"]).splitlines()
    assert "| law | right | halves | <wrong> |" in lines
    assert "| --- | :-: | :-: | :-: |" in lines
    assert "| sines stand in even columns and cosines in odd | ✓ | ≠ | ✗ |" in lines
    assert lines[-1] == "torch: not installed"
    assert "adapter = target.wrong" in lines
    (exhibit,) = (e for e in EXHIBITS if e.number == 25)
    kills = [suite.Kill(exhibit, ()), suite.kill(exhibit), suite.Kill(exhibit, exhibit.laws, exhibit.laws)]
    rows = report.kills_as_markdown(kills).splitlines()
    assert "NOT by an odd width is" in rows[2]
    assert "without its last column (as another convention) | 0 more |" in rows[4]
    assert rows[3].endswith("| an odd width is the next even table without its last column | 0 more |")


def test_the_kill_matrix_names_what_was_missed():
    (exhibit,) = (e for e in EXHIBITS if e.number == 25)
    kill = suite.kill(exhibit)
    assert kill.rejected_by == exhibit.laws
    assert not kill.missed
    survivor = suite.Kill(exhibit, ())
    assert survivor.missed == exhibit.laws
    console = Console(width=200, record=True, file=io.StringIO())
    report.kills_as_text([kill, survivor], console)
    text = console.export_text()
    assert "NOT by an odd width" in text
    assert report.kills_as_json([kill])[0]["number"] == 25
    page = Page()
    page.feed(report.kills_as_page([kill, survivor]))
    assert [c for c in page.cells if c] == ["holds", "defect"]


# the command


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_the_command_writes_all_three_and_tells_by_its_exit_code(mine, tmp_path):
    done = run("mine_adapters:everything", "--json", str(tmp_path / "r.json"), "--page", str(tmp_path / "r.html"))
    assert done.exit_code == 1, done.output
    assert "sines stand" in done.output
    assert json.loads((tmp_path / "r.json").read_text())["implementations"][1]["verdicts"][0]["status"] == "differs"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert run("mine_adapters:right", "mine_adapters:other", "--max-examples", "3").exit_code == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "a target must be pkg.module:adapter, got 'nowhere'"),
        ("no_such_module:x", "needs the module no_such_module, which is not to be found"),
        ("./mine_adapters.py:right", "a target must be pkg.module:adapter, got './mine_adapters.py:right'"),
        ("mine_adapters:number", "got int; the adapters of mine_adapters are right, other, wrong"),
        ("mine_adapters:missing", "mine_adapters has no 'missing'; its adapters are right, other, wrong"),
        ("lacking:x", "needs the module numppy by "),
        ("misspelt:x", "cannot be imported, "),
        ("misspelt:x", "Sinusoid 'x' can do ['odd widht'], which is unknown; perhaps 'odd width' is meant; the flags"),
        ("unreadable:x", "raises SyntaxError: "),
    ],
)
def test_an_unknown_target_is_one_error_and_exit_code_2(mine, target, message):
    (mine / "lacking.py").write_text("import numppy")
    (mine / "unreadable.py").write_text("x = (")
    (mine / "misspelt.py").write_text("from conformance.adapters import *\nx = Sinusoid('x', print, {'odd widht'})")
    done = run(target)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", "")


def test_a_file_that_could_not_be_written_is_said_before_anything_is_judged(mine, tmp_path):
    for option in ("--json", "--page"):
        done = run("mine_adapters:right", option, str(tmp_path / "nowhere" / "r.json"))
        assert done.exit_code == 2
        assert "which is not there" in " ".join(done.output.replace("│", " ").split())
        assert "sines stand" not in done.output


def test_a_named_target_has_its_snippets_below_the_table_as_they_are_pasted(mine):
    done = run("mine_adapters:wrong", "--max-examples", "3")
    assert "called with length=1, d_model=2" in done.output
    code = done.output[done.output.index("import numpy as np") :].partition("\n\n✗")[0]
    exec(code, {})


def test_the_module_may_lie_in_the_folder_where_one_is(mine):
    """As in a shell, where nothing puts it on the path."""
    path = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    target = ("mine_adapters:right", "--max-examples", "1")
    for command in (
        ("-c", "from conformance.cli import app; app()", *target),
        ("-P", "-m", "conformance.cli", *target),
    ):
        subprocess.run([sys.executable, *command], cwd=mine, env=path, check=True, capture_output=True)


def test_the_museum_takes_no_targets():
    done = run("--museum", "mine_adapters:right")
    assert done.exit_code == 2
    assert "--museum judges the kit by its own exhibits" in done.output


def test_what_is_not_installed_is_named_and_not_an_error(monkeypatch):
    def load(target):
        if "torch" in target:
            raise suite.TargetError from ModuleNotFoundError("No module named 'torch'", name=missing)
        return [suite.Subject(numpy_attention, target)]

    monkeypatch.setattr(suite, "load", load)
    missing = "torch"
    subjects, absent = suite.shipped()
    assert absent == ["torch"]
    assert len(subjects) == len(suite.SHIPPED) - 1
    assert len(suite.right()) == len(suite.RIGHT)
    missing = "another"
    for call in (suite.shipped, suite.right):
        with pytest.raises(suite.TargetError):
            call()


# the plugin

PLUGIN = ("-p", "conformance.pytest_plugin", "-p", "no:cacheprovider")


def outcomes(pytester, *arguments):
    result = pytester.runpytest_subprocess(*PLUGIN, *arguments)
    counts = result.parseoutcomes()
    counts.pop("warnings", None)
    return result, counts


@pytest.fixture
def project(pytester, monkeypatch):
    pytester.makepyfile(mine_adapters=MINE, test_other="def test_other():\n    pass\n")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{pytester.path}")
    return pytester


def test_each_law_is_a_test(project):
    result, counts = outcomes(project, "--conform", "mine_adapters:right")
    assert counts == {"passed": 3, "skipped": 1}
    assert result.ret == 0


def test_conventions_are_expected_failures_and_defects_show_their_snippet(project):
    result, counts = outcomes(project, "--conform", "mine_adapters:everything", "-ra", "--conform-max-examples", "5")
    assert counts == {"passed": 5, "skipped": 3, "xfailed": 1, "failed": 3}
    result.stdout.fnmatch_lines(["*XFAIL*differs by design: all sines stand before all cosines"])
    result.stdout.fnmatch_lines(["*adapter = target.wrong"])


def test_skips_and_xfails_are_read_from_files(project):
    (project.path / "skips").write_text("# comment\n\n*:wrong::sines*\n")
    (project.path / "xfails").write_text("*:wrong::*\n")
    _, counts = outcomes(
        project, "--conform", "mine_adapters:wrong", "--conform-skips", "skips", "--conform-xfails", "xfails"
    )
    assert counts == {"skipped": 2, "xfailed": 2}


def test_with_paths_the_other_tests_run_too(project):
    _, counts = outcomes(project, "--conform", "mine_adapters:right", "test_other.py")
    assert counts == {"passed": 4, "skipped": 1}


@pytest.mark.parametrize("wrong", [("mine_adapters:number",), ("mine_adapters:right", "--conform-max-examples", "0")])
def test_an_unknown_target_or_number_of_cases_is_a_usage_error(project, wrong):
    result = project.runpytest_subprocess(*PLUGIN, "--conform", *wrong)
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_unused_the_plugin_imports_nothing(project):
    code = (
        "import sys, pytest\n"
        "code = pytest.main(['-q', '-p', 'no:hypothesispytest', '-p', 'conformance.pytest_plugin', 'test_other.py'])\n"
        "print([m for m in ('jax', 'conformance.law', 'conformance.adapters') if m in sys.modules])\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project.path, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_judgement_does_not_depend_on_the_errors_numpy_shows():
    """Overflow on the way is no warning that fails a law."""
    overflowing = Sinusoid("overflow", lambda *, length, d_model: np.exp(np.full((length, d_model), 1e4)))
    (law, *_) = laws_for(overflowing)
    assert judge(law, overflowing).status == "defect"
