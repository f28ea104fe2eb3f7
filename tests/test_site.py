"""The site: its notebooks run, its pictures are the script's, each name and page is in it, and each link leads."""

import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest

import core
import equinox_impl
import nnx_impl
from tests.conftest import ROOT
from tests.svg import seen

matplotlib.use("agg")

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted((DOCS / "notebooks").glob("*.ipynb"))}


def cells(notebook, kind="code"):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page):
    """The headings of a page as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
@pytest.mark.parametrize("frontend", ["nnx", "equinox"])
def test_a_notebook_runs(frontend, capsys):
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # as in a notebook
        for code in cells(NOTEBOOKS[frontend]):
            exec(code.replace("STEPS = 400", "STEPS = 12"), names)
    shown = capsys.readouterr().out
    assert "step  10" in shown
    assert "equal: True" in shown
    assert names["losses"][-1] < names["losses"][0]
    names["plt"].close("all")


def test_the_two_notebooks_show_the_same_numbers():
    printed = {}
    for frontend, notebook in NOTEBOOKS.items():
        assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
        assert not any(output["output_type"] == "error" for output in outputs)
        text = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
        printed[frontend] = text[text.index("  1024  decoder") :]  # what comes before is the tree, each in its own way
    assert printed["nnx"] == printed["equinox"]
    assert "accuracy 1.0000" in printed["nnx"]


@pytest.fixture
def script():
    """docs/draw.py, as a module."""
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawings_are_those_of_the_script(script, tmp_path):
    script.IMAGES = tmp_path
    (tmp_path / "tour").mkdir()
    (tmp_path / "encodings").mkdir()
    for draw in (*script.DRAWINGS, script.encodings):
        draw()
    for made in tmp_path.glob("*/*.svg"):
        kept = DOCS / "images" / made.relative_to(tmp_path)
        (texts, images), (kept_texts, kept_images) = seen(made), seen(kept)
        assert texts == kept_texts, f"{made.name}: make pictures"
        for image, kept_image in zip(images, kept_images, strict=True):  # of rounded numbers
            np.testing.assert_allclose(image, kept_image, atol=0.01, err_msg=f"{made.name}: make pictures")
    for name in ("two_trees", "model", "attention"):
        assert (tmp_path / f"tour/{name}.svg").read_text() == (DOCS / f"images/tour/{name}.svg").read_text()


def test_the_heat_maps_are_drawn_as_the_command_line_draws_them(script, monkeypatch):
    drawn = {}
    for function in ("plot_attention", "plot_absolute_encodings", "plot_relative_encodings"):
        monkeypatch.setattr(
            script, function, lambda path, *maps, name=function: drawn.update({path.stem: (name, maps)})
        )
    monkeypatch.setattr(script, "gallery", lambda length: ({"learned": length}, {"t5": length}))
    monkeypatch.setattr(script, "reverser", lambda reverser=script.reverser: reverser(0))  # untrained
    for draw in (script.masks, script.dead_row, script.encodings, script.looked):
        draw()
    assert {name: function.removeprefix("plot_") for name, (function, _) in drawn.items()} == {
        **dict.fromkeys(("masks", "weights", "reverse"), "attention"),
        "learned": "absolute_encodings", "t5": "relative_encodings",
    }  # fmt: skip
    weights, queries, keys = drawn["reverse"][1]
    for name, value in weights.items():
        assert value.shape == (1, len(queries[name]), len(keys[name]))
        np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-5)
    assert [cells.sum() for cells in drawn["masks"][1][0].values()] == [36, 48, 33, 21, 39, 21]
    assert not drawn["weights"][1][0]["row 3 may see nothing"][0, 3].any()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+://", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        assert ROOT in found.parents or found == ROOT, target
        assert not anchor or anchor in anchors(found), target


def test_every_page_stands_in_the_contents():
    listed = re.findall(r"^(?:[^<\n]+ <)?([\w/]+)>?$", (DOCS / "index.md").read_text(), re.M)
    pages = {
        path.relative_to(DOCS).with_suffix("").as_posix()
        for path in DOCS.rglob("*")
        if path.suffix in (".md", ".ipynb")
    }
    assert pages - {"index"} == set(listed)


def test_every_public_name_stands_in_the_reference():
    modules = {f"core.{module.name}" for module in pkgutil.iter_modules(core.__path__)}
    assert set(re.findall(r"automodule:: (\S+)", (DOCS / "api/core.md").read_text())) == modules
    for package in (nnx_impl, equinox_impl):
        text = (DOCS / f"api/{package.__name__}.md").read_text()
        named = re.findall(r"auto(?:class|function|data):: (\S+)", text)
        assert sorted([*named, "TransformerConfig"]) == sorted(package.__all__)


def test_every_recipe_stands_side_by_side():
    linked = set(re.findall(r"bench/recipes/(\w+)\.py", (DOCS / "side_by_side.md").read_text()))
    assert linked == {path.stem for path in (ROOT / "bench/recipes").glob("*_*.py") if not path.stem.startswith("__")}


def test_the_figures_that_help_to_choose_are_those_that_were_measured():
    recipes, speed = (DOCS / "recipes.md").read_text(), (DOCS / "performance.md").read_text()
    counts = {}
    for task, frontend, *numbers in re.findall(r"^\| \[(\w+)\]\S+ \| (\w+) \| (\d+) \| (\d+) \|", recipes, re.M):
        counts.setdefault(task, {})[frontend] = [int(number) for number in numbers]
    pairs = {task: found for task, found in counts.items() if len(found) == 2}
    total = {
        frontend: [sum(column) for column in zip(*(p[frontend] for p in pairs.values()), strict=True)]
        for frontend in ("nnx", "equinox")
    }
    both = {task: (found["nnx"][0], found["equinox"][0]) for task, found in pairs.items()}
    mistakes = dict(re.findall(r"^\| (harmless|refused.*?|silently wrong|wrong.*?) \| (\d+ \| \d+) \|", recipes, re.M))
    by_frontend = list(zip(*(map(int, row.split(" | ")) for row in mistakes.values()), strict=True))
    silent = mistakes["silently wrong"].split(" | ")
    fewer = (
        sum(a < b for a, b in both.values()),
        sum(a > b for a, b in both.values()),
        sum(a == b for a, b in both.values()),
    )
    said = (DOCS / "choosing.md").read_text()
    for claim in (
        f"{len(pairs)} tasks take {total['nnx'][0]} statements, {total['equinox'][0]} in Equinox",
        f"use {total['equinox'][1]} names of the framework, {total['nnx'][1]} in NNX",
        "LoRA {} statements to {}".format(*both["lora"]),
        "freezing {} to {}".format(*both["freeze"]),
        "averages {} to {}".format(*both["ema"]),
        "framework's layers {} to {}".format(*both["framework_layers"]),
        "attention maps {1} statements to {0}".format(*both["attention_maps"]),
        f"{silent[1]} of {sum(by_frontend[1])} stay silent; in NNX {silent[0]} of {sum(by_frontend[0])}",
        "Of {} tasks that stand in both, NNX has\n  fewer statements in {}, Equinox in {}, and {} are equal".format(
            len(pairs), *fewer
        ),
    ):
        assert claim in said, claim
    for time in re.findall(r"\d[\d.]* (?:µs|ms|s)\b", said):
        assert time in speed or time == "100 ms", time


@pytest.mark.docs
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-M", "html", DOCS, tmp_path, "--fail-on-warning", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in Path(tmp_path).rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"((?:https?:)?//[^\"]+)", page.read_text())
        fetched += re.findall(
            r"<link[^>]*rel=\"(?:stylesheet|preload)\"[^>]*href=\"((?:https?:)?//[^\"]+)", page.read_text()
        )
        assert not fetched, f"{page.name}: {fetched}"


@pytest.mark.docs
def test_a_broken_link_fails_the_build(tmp_path):
    pytest.importorskip("sphinx")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/conf.py").write_text((DOCS / "conf.py").read_text().replace("html_static_path", "_"))
    (tmp_path / "docs/index.md").write_text("# A page\n\n[to another](missing.md)\n")
    command = [sys.executable, "-m", "sphinx", "-M", "html", "docs", "out", "--fail-on-warning", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "missing.md" in done.stderr
