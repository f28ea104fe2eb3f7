"""`python -m bench` prints the tables of all benches in short forms; NAME, those of one; all, those of full length.

`--json FILE` keeps what a bench found, as `report` reads it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench import forms
from bench.kept import about, keep

app = typer.Typer(
    help=__doc__,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    invoke_without_command=True,
)
Json = Annotated[Path | None, typer.Option("--json", help="A file for what was found, and on which machine.")]
Lengths = Annotated[list[int] | None, typer.Option("--length", min=1, help="T = S; may be given more than once.")]
Causal = Annotated[bool, typer.Option("--causal/--full", help="Whether queries see only what is before.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="How often each is measured.")]
Layers = Annotated[list[int] | None, typer.Option(min=1, help="Of encoder and decoder; may be given more than once.")]


@app.callback()
def short(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        for name in forms.FORMS:
            forms.run(name, short=True)


@app.command(name="all")
def everything(kept: Annotated[Path, typer.Option(help="The folder for what is found.")] = Path("runs/bench")) -> None:
    """All benches at full length, for hours; what they find is kept."""
    for name in forms.FORMS:
        forms.run(name, short=False, kept=kept)


@app.command()
def agreement(json: Json = None) -> None:
    """Where the frontends are one program, and give the same bits."""
    from bench.agreement import comparisons, tables

    found = comparisons()
    _show(tables(found), found, json)


@app.command()
def speed(
    lengths: Lengths = None,
    rounds: Rounds = None,
    causal: Causal = True,
    json: Json = None,
) -> None:
    """Attention of one layer beside the peers, forward and with its gradient, by length."""
    from bench.speed import LENGTHS, ROUNDS, attention_times, tables

    found = attention_times(lengths or LENGTHS, rounds=rounds or ROUNDS, causal=causal)
    _show(tables(found), found, json)


@app.command()
def modules(
    lengths: Lengths = None,
    rounds: Rounds = None,
    causal: Causal = True,
    json: Json = None,
) -> None:
    """Attention modules with their projections beside the frameworks' own, by length."""
    from bench.modules import LENGTHS, module_times
    from bench.speed import ROUNDS, tables

    found = module_times(lengths or LENGTHS, rounds=rounds or ROUNDS, causal=causal)
    _show(tables(found, title="attention modules"), found, json)


@app.command()
def memory(lengths: Lengths = None, json: Json = None) -> None:
    """The memory that attention takes, by length."""
    from bench.memory import LENGTHS, attention_memory, tables

    found = attention_memory(lengths or LENGTHS)
    _show(tables(found), found, json)


@app.command()
def compile(layers: Layers = None, rounds: Rounds = None, json: Json = None) -> None:
    """What a train step costs before it runs, by depth, in a loop and in a scan."""
    from bench.compile_time import DEPTHS, ROUNDS, compilations, tables

    found = compilations(layers or DEPTHS, rounds=rounds or ROUNDS)
    _show(tables(found), found, json)


@app.command()
def train(
    sizes: Annotated[list[str] | None, typer.Option("--size", help="small or base; may be given twice.")] = None,
    rounds: Rounds = None,
    json: Json = None,
) -> None:
    """A whole training step beside PyTorch's."""
    from bench.train_step import SIZES, step_times, tables

    found = step_times(sizes or tuple(SIZES), rounds=rounds)
    _show(tables(found), found, json)


@app.command()
def dispatch(layers: Layers = None, rounds: Rounds = None, json: Json = None) -> None:
    """What a call costs the host, by style of call and number of arrays."""
    from bench.dispatch import LAYERS, ROUNDS, dispatch_costs, tables

    found = dispatch_costs(layers or LAYERS, rounds=rounds or ROUNDS)
    _show(tables(found), found, json)


@app.command()
def decode(rounds: Rounds = None, json: Json = None) -> None:
    """Tokens a second, greedy and by beams, beside CTranslate2 and Marian with the same weights and outputs."""
    from bench.decode import ROUNDS, decode_speeds, tables

    found = decode_speeds(rounds=rounds or ROUNDS)
    _show(tables(found), found, json)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def recipes(context: typer.Context) -> None:
    """What the recipes take, and what came of their mistakes."""
    from bench.recipe_tables import main

    main(context.args)


@app.command()
def conformance(
    max_examples: Annotated[int, typer.Option(min=1, help="Cases that each law is tried on.")] = 25,
    json: Json = None,
) -> None:
    """Which implementation keeps which law: `isoformer conform`, with the machine beside the verdicts."""
    from conformance import report, suite

    subjects, absent = suite.shipped()
    columns = suite.conform(subjects, max_examples=max_examples)
    report.as_text(columns, absent, Console())
    _keep(report.as_json(columns, absent), json)


@app.command()
def report(
    kept: Annotated[Path, typer.Option(help="The folder of what the benches found.")] = Path("runs/bench"),
    output: Annotated[Path | None, typer.Option(help="The folder for the pages.", show_default="--kept")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all again, not only what is missing.")] = False,
) -> None:
    """Measures what is missing, in short forms, and writes report.html and report.md."""
    from bench.report import measure, write

    measure(kept, fresh=fresh)
    for page in write(kept, output or kept):
        print(page)


def _show(tables: Sequence[Table], found: Sequence[Any], json: Path | None) -> None:
    console = Console(width=200)
    for table in tables:
        console.print(table)
    _keep([one._asdict() for one in found], json)


def _keep(results: Any, json: Path | None) -> None:
    found = about(results, arguments=sys.argv[1:])
    Console().print(f"{found.machine}, load {found.load}, {found.versions}", highlight=False)
    if json:
        keep(json, found)


if __name__ == "__main__":
    app(prog_name="python -m bench")
