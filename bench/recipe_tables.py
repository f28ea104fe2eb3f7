"""`python -m bench recipes`: what the recipes cost and what came of their mistakes, as tables, data and a page."""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.ergonomics import FRAMEWORKS, Recipe, measured, recipe_names
from bench.kept import about, keep
from bench.mistakes import RECIPES
from seq2seq.machine import machine, versions

_PAGE = """# Recipes: the same tasks in NNX and in Equinox

Each task stands in two files of `bench/recipes`, `<task>_nnx.py` and `<task>_equinox.py`, to be read side by side. A
recipe works on a tiny model of ours, asserts at its end what it claims, and returns a small result, which is equal **in
bits** between the two. Below it stand the mistakes that people make. All of them are run by the tests; run one by

    python -m bench.recipes.freeze_nnx

and all, with times, by `python -m bench recipes`. `python -m bench recipes --page docs/recipes.md` writes this page.

`graph_and_tree` has one file alone: only NNX has two modes, and Equinox's modules are always trees. `other_framework`
is a pair that crosses over: an NNX model under Equinox's filters, and an Equinox model inside an NNX module. An
attention function of one's own is swapped in by wrapping every attention: the configuration takes no function.

## What a task takes

Counted by program, without imports, docstrings and mistakes: statements; different names of the framework (`nnx.…`,
`eqx.…`); how deep blocks, lambdas and comprehensions nest; seconds on the host outside of XLA's compiler, for the whole
recipe, its assertions included, from cold in one process ({runs}). These are counts, not grades: read the two files.

{sizes}

## What happens when one slips

What was seen is computed, never typed in. A recipe draws batches of data; an exception before the first is *refused at
construction*, with the first *at the call*, after more *late*. If what failed is the recipe's own closing assertion,
nobody would have noticed: *silently wrong* (or *wrong with a warning*). *harmless*: the claim holds nevertheless, here.
The last column is where users met it.

{totals}

{outcomes}

{machine}
"""


def main(arguments: Sequence[str]) -> None:
    """Measures all recipes, or those named, and prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench recipes", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="as freeze_nnx")
    parser.add_argument("--json", type=Path, help="a file for the data")
    parser.add_argument("--page", type=Path, help="a file for the page, in Markdown")
    parser.add_argument("--runs", type=int, default=3, help="how often each recipe is run")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(recipe_names())):
        parser.error(f"there are no recipes {unknown}; there are {recipe_names()}")
    recipes = [measured(name, runs=options.runs) for name in options.names or recipe_names()]
    console = Console()
    console.print(_rich("What a task takes", SIZES, sizes(recipes)))
    console.print(_rich("What happens when one slips", OUTCOMES[:-1], [row[:-1] for row in outcomes(recipes)]))
    if options.json:
        keep(options.json, about([_plain(recipe) for recipe in recipes], arguments=["recipes", *arguments]))
    if options.page:
        options.page.write_text(page(recipes, runs=options.runs))


SIZES = ("task", "frontend", "statements", "names", "nesting", "host")
OUTCOMES = ("task", "frontend", "mistake", "what happened", "message", "seen")


def sizes(recipes: Sequence[Recipe]) -> list[tuple[str, ...]]:
    """A row for each recipe."""
    return [
        (r.task, r.frontend, str(r.statements), str(len(r.names)), str(r.nesting), f"{r.host_seconds:.2f} s")
        for r in recipes
    ]


def outcomes(recipes: Sequence[Recipe]) -> list[tuple[str, ...]]:
    """A row for each mistake."""
    return [(r.task, r.frontend, o.mistake, o.outcome, o.message, o.seen) for r in recipes for o in r.outcomes]


def totals(recipes: Sequence[Recipe]) -> list[tuple[str, ...]]:
    """How many mistakes ended how, by frontend."""
    found = [(r.frontend, o.outcome) for r in recipes for o in r.outcomes]
    classes = sorted({outcome for _, outcome in found})
    return [(outcome, *(str(found.count((frontend, outcome))) for frontend in FRAMEWORKS)) for outcome in classes]


def page(recipes: Sequence[Recipe], *, runs: int) -> str:
    """docs/recipes.md."""
    linked = [(f"[{r.task}](../bench/recipes/{r.task}_{r.frontend}.py)", *row[1:]) for r, row in _rows(recipes)]
    short = [(*row[:4], _code(row[4]), row[5]) for row in outcomes(recipes)]
    shown = ", ".join(f"{name} {value}" for name, value in _machine().items())
    tables = {"sizes": _markdown(SIZES, linked), "outcomes": _markdown(OUTCOMES, short)}
    tables["totals"] = _markdown(("what happened", *FRAMEWORKS), totals(recipes))
    times = "one run" if runs == 1 else f"median of {runs} runs"
    return _PAGE.format(runs=times, machine=f"Measured with {shown}.", **tables)


def _machine() -> dict[str, str]:
    packages = versions("jax", "flax", "equinox", "optax")
    return {"python": platform.python_version()} | packages | {"cores": str(machine()["cores"])}


def _rows(recipes: Sequence[Recipe]) -> zip:
    return zip(recipes, sizes(recipes), strict=True)


def _plain(recipe: Recipe) -> dict:
    """With the source, so that what was measured can be shown beside it."""
    source = (RECIPES / f"{recipe.task}_{recipe.frontend}.py").read_text()
    return recipe._asdict() | {"source": source, "outcomes": [outcome._asdict() for outcome in recipe.outcomes]}


def _code(message: str, length: int = 140) -> str:
    """A message in a cell: short, its bars and ticks not Markdown's."""
    text = message if len(message) <= length else message[: length - 1] + "…"
    return f"`{text.replace('`', chr(39))}`" if text else ""


def _markdown(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _rich(title: str, head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table
