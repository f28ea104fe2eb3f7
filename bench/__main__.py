"""`python -m bench [dispatch|compile|recipes] [FILE.json]` prints the tables, and saves them if a file is named."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import recipe_tables
from bench.speed import LENGTHS, attention_times
from seq2seq.machine import machine, versions

BENCHES = ("dispatch", "compile")


def main() -> None:
    """One of the benches by its name; by default attention of one layer, forward and with its gradient, by length."""
    if sys.argv[1:2] == ["recipes"]:
        recipe_tables.main(sys.argv[2:])
        return
    if sys.argv[1:2] and sys.argv[1] in BENCHES:
        _bench(sys.argv[1], sys.argv[2:])
        return
    console, results = Console(), []
    for length in LENGTHS:
        for name, times in attention_times(length).items():
            results.append({"length": length, "implementation": name, **times})
    for kind in ("forward", "forward + backward"):
        table = Table("T = S", "implementation", "median", "ours / theirs", title=f"attention, {kind}")
        for length in LENGTHS:
            rows = [row for row in results if row["length"] == length]
            ours = rows[0][kind]
            for row in rows:
                ratio = f"{ours / row[kind]:.2f}"
                table.add_row(str(length), row["implementation"], f"{1000 * row[kind]:.2f} ms", ratio)
        console.print(table)
    about = versions("jax") | machine()
    console.print(f"interleaved in one process, outputs checked against each other first; {about}", highlight=False)
    _keep(sys.argv[1:], about, results)


def _bench(name: str, rest: list[str]) -> None:
    console, about = Console(width=200), versions("jax", "flax", "equinox") | machine()
    if name == "dispatch":
        from bench.dispatch import LAYERS, dispatch_costs, tables

        results = [cost for layers in LAYERS for cost in dispatch_costs(layers)]
        shown = tables(results)
    else:
        from bench.compile_time import compilations, table

        results = compilations()
        shown = [table(results)]
    for one in shown:
        console.print(one)
    console.print(f"interleaved in one process, medians (with spread); {about}", highlight=False)
    _keep(rest, about, [one._asdict() for one in results])


def _keep(files: list[str], about: dict[str, str | int], results: list[dict]) -> None:
    if files:
        Path(files[0]).write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
