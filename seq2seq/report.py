"""The comparison's report: one table on the screen, and as files with its curves and pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from seq2seq.errors import UserError
from seq2seq.machine import machine, versions
from seq2seq.plots import plot_attention, plot_curves

PICTURES = ("loss", "wer", "attention")
TITLES = {"nnx": "Flax NNX", "equinox": "Equinox"}


class Report:
    """Collects what is known, and can be written at any moment."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot hold a report: {error.strerror}; give another --output") from None
        for name in PICTURES:  # those of an earlier report would pass for this one's
            (folder / f"{name}.png").unlink(missing_ok=True)
        self.folder = folder
        self.agreed = True
        self.interrupted = False
        self.about: dict[str, Any] = {}
        self.notes: list[str] = []
        self.rows: list[tuple[str, str, str]] = []
        self.samples: list[tuple[str, str, str]] = []  # word, pronunciation, what the dictionary has
        self.losses: dict[str, list[float]] = {name: [] for name in TITLES}
        self.error_rates: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in TITLES}

    def both(self, what: str, text: str) -> None:
        """A row that is about the two together."""
        self.rows.append((what, text, text))

    def each(self, what: str, values: dict[str, Any], form: str) -> None:
        """A row with a value for each, formatted by `form`."""
        self.rows.append((what, form.format(values["nnx"]), form.format(values["equinox"])))

    def attention(self, weights: dict[str, np.ndarray], queries: list[str], keys: list[str], *, title: str) -> None:
        """Saves the heat-map at once."""
        plot_attention(self.folder / "attention.png", weights, queries, keys, title=title)

    def write(self, console: Console) -> None:
        """Prints the table and saves report.md, results.json and the curves."""
        table = Table("", *TITLES.values(), title="The same Transformer in two frameworks")
        for what, first, second in self.rows:
            table.add_row(what, first, second)
        if self.rows:
            console.print(table)
        for word, said, meant in self.samples:
            console.print(f"{word}: {said}   (dictionary: {meant})", highlight=False, markup=False)
        for note in self.notes:
            console.print(note, style="bold", highlight=False, markup=False)
        if any(self.losses.values()):
            curves = {TITLES[name]: (range(1, len(values) + 1), values) for name, values in self.losses.items()}
            plot_curves(self.folder / "loss.png", curves, ylabel="training loss (nats a token)")
        if self.error_rates["nnx"][0]:
            curves = {TITLES[name]: values for name, values in self.error_rates.items() if values[0]}
            plot_curves(self.folder / "wer.png", curves, ylabel="word error rate on held-out words")
        (self.folder / "results.json").write_text(json.dumps(self._results(), indent=2) + "\n")
        (self.folder / "report.md").write_text(self._markdown())
        console.print(f"Report, curves and attention: {self.folder / 'report.md'}")

    def _results(self) -> dict[str, Any]:
        packages = ("jax", "jaxlib", "flax", "equinox", "optax", "numpy")
        return {
            "agreed": self.agreed,
            "interrupted": self.interrupted,
            "about": self.about,
            "machine": machine(),
            "versions": versions(*packages),
            "table": [dict(zip(("what", *TITLES), row, strict=True)) for row in self.rows],
            "samples": self.samples,
            "losses": self.losses,
            "error_rates": self.error_rates,
            "notes": self.notes,
        }

    def _markdown(self) -> str:
        lines = ["# The same Transformer in Flax NNX and in Equinox", ""]
        lines += [f"{key}: {value}  " for key, value in self.about.items()]
        lines += ["", *(f"**{note}**\n" for note in self.notes)]
        lines += [f"| | {' | '.join(TITLES.values())} |", "| --- | --- | --- |"]
        lines += [f"| {what} | {first} | {second} |" for what, first, second in self.rows]
        if self.samples:
            lines += ["", "| word | pronunciation | dictionary |", "| --- | --- | --- |"]
            lines += [f"| {' | '.join(sample)} |" for sample in self.samples]
        for name in PICTURES:
            if (self.folder / f"{name}.png").exists():
                lines += ["", f"![{name}]({name}.png)"]
        return "\n".join(lines) + "\n"
