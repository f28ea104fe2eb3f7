"""`python -m bench [FILE.json]` prints the tables, and saves them if a file is named; `python -m bench recipes`."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import recipe_tables
from bench.speed import LENGTHS, attention_times


def main() -> None:
    """Attention of one layer, forward and with its gradient, by length."""
    if sys.argv[1:2] == ["recipes"]:
        recipe_tables.main(sys.argv[2:])
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
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "jax": version("jax")}
    console.print(f"interleaved in one process, outputs checked against each other first; {machine}", highlight=False)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
