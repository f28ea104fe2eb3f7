"""`isoformer conform`: the laws, for any implementation."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from conformance import report, suite


def _writable(path: Path | None) -> Path | None:
    """Before minutes are spent on what could not be written."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{path} needs the folder {path.parent}, which is not there; make it first")
    return path


def conform(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters as pkg.module:name, or a tuple of them.", show_default="this project's and the peers'"
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=_writable, help="Write everything, snippets included.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(callback=_writable, help="Write one page, HTML or, for a name in .md, Markdown.")
    ] = None,
    max_examples: Annotated[int, typer.Option(min=1, help="Cases that each law is tried on.")] = 25,
    museum: Annotated[
        bool, typer.Option("--museum", help="Judge the kit itself: known bugs must be rejected, right ones must pass.")
    ] = False,
) -> None:
    """Run the laws of attention and its neighbours against any implementation.

    Exit code 1: a target that was named has a defect, or the museum a survivor.
    """
    console = Console()
    try:
        if museum and targets:
            raise suite.TargetError(
                "--museum judges the kit by its own exhibits, got targets as well; give one of both"
            )
        subjects, absent = _subjects(targets, museum)
        with console.status("starting") as status:
            columns = suite.conform(subjects, max_examples=max_examples, progress=status.update)
            kills = list(suite.kills(max_examples=max_examples, progress=status.update)) if museum else []
    except suite.TargetError as error:
        Console(stderr=True).print(f"isoformer: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    report.as_text(columns, absent, console, snippets=bool(targets))
    if museum:
        report.kills_as_text(kills, console)
    if json_file is not None:
        content = report.as_json(columns, absent) | ({"museum": report.kills_as_json(kills)} if museum else {})
        json_file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if page is not None:
        markdown = page.suffix == ".md"
        if museum:
            page.write_text(report.kills_as_markdown(kills) if markdown else report.kills_as_page(kills))
        else:
            page.write_text((report.as_markdown if markdown else report.as_page)(columns, absent))
    bad = any(verdict.status in ("defect", "raises") for column in columns for verdict in column.verdicts)
    survivors = any(kill.missed for kill in kills)
    raise typer.Exit(1 if survivors or (bad and (museum or targets)) else 0)


def _subjects(targets: list[str] | None, museum: bool) -> tuple[list[suite.Subject], list[str]]:
    if museum:
        return suite.right(), []
    if not targets:
        return suite.shipped()
    return [subject for target in targets for subject in suite.load(target)], []


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(conform)

if __name__ == "__main__":
    app()
