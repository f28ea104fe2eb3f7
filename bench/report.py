"""`python -m bench report`: what the benches found, as one HTML page and as Markdown."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from bench import figures, forms
from bench.figures import Plot
from bench.findings import findings
from bench.kept import Kept, load
from bench.tables import tables

SECTIONS = ("agreement", "speed", "memory", "compile", "dispatch", "recipes", "conformance")
"""The benches of which the report tells, in its order."""
PLOTS = {
    "speed": figures.speed, "memory": figures.memory, "compile": figures.compile_time, "dispatch": figures.dispatch,
}  # fmt: skip
PAGE = Path(__file__).parent / "page"


def measure(folder: Path, *, fresh: bool = False) -> None:
    """Runs the short form of each bench whose results the folder lacks."""
    for name in SECTIONS:
        if fresh or not (folder / f"{name}.json").exists():
            forms.run(name, short=True, kept=folder)


def write(folder: Path, output: Path) -> list[Path]:
    """The pages, from what the folder holds; the plots of the Markdown lie beside it."""
    kept = {name: load(folder / f"{name}.json") for name in SECTIONS}
    plots = {name: draw(kept[name]) for name, draw in PLOTS.items()}
    about = {"kept": kept, "plots": plots, "findings": findings(kept)}
    pictures = output / "report"
    pictures.mkdir(parents=True, exist_ok=True)
    for plot in (plot for some in plots.values() for plot in some):
        (pictures / f"{plot.name}.svg").write_text(figures.alone(plot.svg) + "\n")
    pages = [output / "report.html", output / "report.md"]
    pages[0].write_text(as_html(**about))
    pages[1].write_text(as_markdown(**about))
    return pages


def as_html(kept: Mapping[str, Kept], plots: Mapping[str, Sequence[Plot]], findings: Sequence[Any]) -> str:
    """One file that needs no other, and no script."""
    return _template("report.html", autoescape=True).render(
        **tables(kept), kept=kept, plots=plots, findings=findings, style=(PAGE / "report.css").read_text(),
        light=_formatter("default").get_style_defs(".code"), dark=_formatter("github-dark").get_style_defs(".code"),
    )  # fmt: skip


def as_markdown(kept: Mapping[str, Kept], plots: Mapping[str, Sequence[Plot]], findings: Sequence[Any]) -> str:
    """The same without the code of the recipes, which lie beside it in the repository."""
    return _template("report.md", autoescape=False).render(**tables(kept), kept=kept, plots=plots, findings=findings)


def _template(name: str, *, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["code"] = lambda text: highlight(text, PythonLexer(), _formatter("default"))
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    environment.filters["indented"] = lambda text: textwrap.indent(text, "    ")
    return environment.get_template(name)


def _formatter(style: str) -> HtmlFormatter:
    return HtmlFormatter(style=style, cssclass="code")
