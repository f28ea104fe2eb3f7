"""The verdicts as text, as JSON and as one page."""

import html
import importlib.metadata
import platform
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from conformance.law import Verdict
from conformance.snippet import snippet
from conformance.suite import Column, Kill

SIGNS = {"holds": "✓", "differs": "≠", "defect": "✗", "raises": "!", "not offered": "-"}
STYLES = {"holds": "green", "differs": "yellow", "defect": "red", "raises": "red", "not offered": "dim"}
LEGEND = "✓ holds   ≠ differs by design, by a named convention   ✗ defect   ! raises   - not offered"
LONG = 3000
"""Characters above which Markdown leaves a snippet to the other forms."""
PACKAGES = ("jax", "flax", "equinox", "torch", "numpy", "hypothesis")


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def by_kind(columns: list[Column]) -> list[tuple[str, list[Column]]]:
    """Columns of one kind stand in one table."""
    kinds = list(dict.fromkeys(column.subject.adapter.kind for column in columns))
    order = sorted(columns, key=lambda column: kinds.index(column.subject.adapter.kind))
    return [(kind, list(group)) for kind, group in groupby(order, key=lambda column: column.subject.adapter.kind)]


def notes(columns: list[Column]) -> list[tuple[Column, Verdict]]:
    """All verdicts that need words."""
    return [(c, v) for c in columns for v in c.verdicts if v.status in ("differs", "defect", "raises")]


def explained(verdict: Verdict) -> str:
    """The convention that was followed, or what went wrong."""
    if verdict.status == "differs":
        return f"differs by design: {verdict.convention}"
    return verdict.failure.message if verdict.failure else ""


def as_text(columns: list[Column], absent: list[str], console: Console, *, snippets: bool = False) -> None:
    """Prints a table for each kind, and below it what differs, in the smallest case; with `snippets` code for it."""
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()), highlight=False)
    for kind, group in by_kind(columns):
        table = Table(title=f"Laws of {kind}", caption=LEGEND)
        table.add_column("law", overflow="fold")
        for number, column in enumerate(group, 1):
            table.add_column(str(number), justify="center", min_width=1)
            console.print(f"{number} {column.subject.adapter.name}", highlight=False)
        for verdicts in zip(*(column.verdicts for column in group), strict=True):
            cells = (f"[{STYLES[v.status]}]{SIGNS[v.status]}[/]" for v in verdicts)
            table.add_row(verdicts[0].law.name, *cells)
        console.print(table)
        for column, verdict in notes(group):
            console.print(_said(column, verdict), style=STYLES[verdict.status], markup=False, highlight=False)
            if verdict.failure is not None:
                console.print(f"    {verdict.failure.configuration}", markup=False, highlight=False)
                if snippets:
                    code = snippet(column.subject.target, verdict)
                    console.print(f"\n{code}", markup=False, highlight=False, soft_wrap=True)
    for package in absent:
        console.print(f"{package}: not installed", style="dim", highlight=False)


def as_json(columns: list[Column], absent: list[str]) -> dict[str, Any]:
    """Everything, snippets included."""
    return {
        "versions": versions(),
        "not installed": absent,
        "implementations": [
            {
                "name": column.subject.adapter.name,
                "kind": column.subject.adapter.kind,
                "target": column.subject.target,
                "verdicts": [_as_json(column, verdict) for verdict in column.verdicts],
            }
            for column in columns
        ],
    }


def _as_json(column: Column, verdict: Verdict) -> dict[str, Any]:
    found: dict[str, Any] = {"law": verdict.law.name, "status": verdict.status}
    if verdict.failure is not None:
        found |= {"convention": verdict.convention, "message": verdict.failure.message}
        found["configuration"] = verdict.failure.configuration
        found["snippet"] = snippet(column.subject.target, verdict)
    return found


STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --warn: #9a6700; --bad: #cf222e; --dim: #777; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --warn: #d29922; --bad: #f85149; --dim: #999; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: center; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } pre { overflow-x: auto; padding: .6rem; background: #8881; }
.holds { color: var(--good); } .differs { color: var(--warn); } .defect, .raises { color: var(--bad); }
.not-offered { color: var(--dim); } details { margin: .3rem 0; }
"""


def as_page(columns: list[Column], absent: list[str]) -> str:
    """One HTML page that needs no other file and no script."""
    parts = [f"<p>{html.escape(', '.join(f'{n} {v}' for n, v in versions().items()))}</p>", f"<p>{LEGEND}</p>"]
    for kind, group in by_kind(columns):
        heads = "".join(f"<th>{html.escape(column.subject.adapter.name)}</th>" for column in group)
        rows = "".join(
            f"<tr><td>{html.escape(verdicts[0].law.name)}</td>{''.join(map(_cell, verdicts))}</tr>"
            for verdicts in zip(*(column.verdicts for column in group), strict=True)
        )
        parts.append(
            f"<h2>Laws of {kind}</h2><div class=scroll><table><tr><th>law</th>{heads}</tr>{rows}</table></div>"
        )
        parts += [_details(column, verdict) for column, verdict in notes(group)]
    parts += [f"<p>{html.escape(package)}: not installed</p>" for package in absent]
    return _page("Conformance", "".join(parts))


def _cell(verdict: Verdict) -> str:
    title = html.escape(explained(verdict) or verdict.status, quote=True)
    return f'<td class="{verdict.status.replace(" ", "-")}" title="{title}">{SIGNS[verdict.status]}</td>'


def _details(column: Column, verdict: Verdict) -> str:
    code = html.escape(snippet(column.subject.target, verdict))
    opened = f"<details><summary class={verdict.status}>{html.escape(_summary(column, verdict))}</summary>"
    return f"{opened}<pre>{code}</pre></details>"


def _said(column: Column, verdict: Verdict) -> str:
    return f"{SIGNS[verdict.status]} {column.subject.adapter.name}: {verdict.law.name}: {explained(verdict)}"


def _summary(column: Column, verdict: Verdict) -> str:
    said = _said(column, verdict)
    return said if verdict.failure is None else f"{said} ({verdict.failure.configuration})"


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}</html>\n"
    )


def as_markdown(columns: list[Column], absent: list[str]) -> str:
    """The tables for a README, and below each what differs, with a snippet that opens."""
    lines = [", ".join(f"{name} {version}" for name, version in versions().items()), "", LEGEND]
    for kind, group in by_kind(columns):
        lines += ["", f"**Laws of {kind}**", ""]
        lines += _rows(["law", *(column.subject.adapter.name for column in group)])
        for verdicts in zip(*(column.verdicts for column in group), strict=True):
            lines += _rows([verdicts[0].law.name, *(SIGNS[v.status] for v in verdicts)])[:1]
        for column, verdict in notes(group):
            summary, code = html.escape(_summary(column, verdict)), snippet(column.subject.target, verdict).rstrip()
            lines += ["", "<details>", f"<summary>{summary}</summary>"]
            lines += ["", "```python", code, "```"] if len(code) <= LONG else ["", "Its arrays are long: see `--json`."]
            lines += ["", "</details>"]
    lines += ["", *(f"{package}: not installed" for package in absent)] if absent else []
    return "\n".join(lines) + "\n"


def _rows(cells: list[str]) -> list[str]:
    """A row, and the rule that stands below it if it is the first."""
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return [f"| {' | '.join(escaped)} |", f"| --- |{' :-: |' * (len(cells) - 1)}"]


# the kill matrix


def _rejections(kill: Kill) -> str:
    """By each of the laws that must: rejected as a defect, as another convention, or not."""
    shown = []
    for law in kill.exhibit.laws:
        convention = " (as another convention)" if law in kill.by_convention else ""
        shown.append(f"{law}{convention}" if law in kill.rejected_by else f"NOT by {law}")
    return "; ".join(shown)


def kills_as_text(kills: list[Kill], console: Console) -> None:
    """Each exhibit with the laws that rejected it; those that had to stand first."""
    table = Table(title="The museum: one wrong implementation a row, and the laws that reject it")
    for name in ("#", "defect", "source", "rejected by", "and by"):
        table.add_column(name)
    for kill in kills:
        named = _rejections(kill)
        others = len([law for law in kill.rejected_by if law not in kill.exhibit.laws])
        style = "red" if kill.missed else None
        row = (str(kill.exhibit.number), kill.exhibit.defect, kill.exhibit.source, named, f"{others} more")
        table.add_row(*row, style=style)
    console.print(table)


def kills_as_json(kills: list[Kill]) -> list[dict[str, Any]]:
    """The whole matrix."""
    return [
        {
            "number": kill.exhibit.number,
            "defect": kill.exhibit.defect,
            "source": kill.exhibit.source,
            "must be rejected by": list(kill.exhibit.laws),
            "rejected by": list(kill.rejected_by),
            "of them, as another convention": list(kill.by_convention),
        }
        for kill in kills
    ]


def kills_as_page(kills: list[Kill]) -> str:
    """One HTML page: exhibits by laws."""
    rows = "".join(
        f"<tr><td>{kill.exhibit.number}. {html.escape(kill.exhibit.defect)}</td>"
        f"<td>{html.escape(kill.exhibit.source)}</td>"
        f'<td class="{"defect" if kill.missed else "holds"}">{html.escape(_rejections(kill))}</td>'
        f"<td>{html.escape('; '.join(law for law in kill.rejected_by if law not in kill.exhibit.laws))}</td></tr>"
        for kill in kills
    )
    heads = "<tr><th>defect</th><th>source</th><th>must be rejected by</th><th>also rejected by</th></tr>"
    return _page("The bug museum", f"<div class=scroll><table>{heads}{rows}</table></div>")


def kills_as_markdown(kills: list[Kill]) -> str:
    """The kill matrix for a README: the laws that must reject, and how many more do."""
    lines = _rows(["museum", "source", "rejected by", "and by"])
    for kill in kills:
        named = _rejections(kill)
        others = len(set(kill.rejected_by) - set(kill.exhibit.laws))
        cells = [f"{kill.exhibit.number}. {kill.exhibit.defect}", kill.exhibit.source, named, f"{others} more"]
        lines += _rows(cells)[:1]
    return "\n".join(lines) + "\n"
