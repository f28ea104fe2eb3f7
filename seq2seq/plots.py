"""Figures: curves, and heat-maps of attention and of encodings.

A heat-map whose path ends in .svg suits light and dark pages: its ground is transparent, its ink of middle brightness.
"""

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

from seq2seq.metrics import Curve

Labels = Sequence[str] | Mapping[str, Sequence[str]]
"""Names of queries or keys, in all layers alike or by layer name."""
INK, BLUE, RUST, GREY = "#7d8590", "#3a7ec8", "#c45f22", "#808080"
LARGEST = 20.0  # inches, of all maps of a picture together
_LETTER, _LINE = 0.067, 0.12  # inches that one takes in 8 points
_SETTINGS: dict[Any, Any] = {"text.parse_math": False, "axes.titlesize": 9, "axes.titlelocation": "left"}
_PAGE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "isoformer", "image.interpolation": "none", "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
_STRENGTH = np.abs(np.linspace(-1, 1, 511))[:, None]
_SIDES = np.repeat([to_rgb(RUST), to_rgb(BLUE)], (255, 256), axis=0)
SIGNED = ListedColormap(np.hstack([_SIDES, _STRENGTH])).with_extremes(bad=GREY)
"""Rust below 0, clear at 0, blue above; what is not finite is grey."""
WEIGHTS = ListedColormap(np.hstack([_SIDES, _STRENGTH])[255:]).with_extremes(bad=GREY)
"""The half of it from 0 up."""


def plot_curves(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, ylabel: str) -> None:
    """One line a name, of its (steps, values); later ones are dashed, so that equal lines both show."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, (steps, values)) in enumerate(curves.items()):
        axes.plot(steps, values, label=name, linewidth=3 - 2 * min(i, 1), linestyle="-" if i == 0 else "--")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def plot_training(path: Path, runs: Mapping[str, Mapping[str, Curve]]) -> None:
    """Loss and token accuracy of each run: thin in training, with points in validation."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for i, (name, curves) in enumerate(runs.items()):
            for metric, style in ((what, {"alpha": 0.5, "linewidth": 1}), (f"validation_{what}", {"marker": "o"})):
                if metric in curves:
                    label = f"{name}, {'validation' if metric != what else 'training'}"
                    axes.plot(*curves[metric], label=label, color=f"C{i}", markersize=4, **style)
        axes.set(xlabel="step", ylabel="loss (nats a token)" if what == "loss" else "token accuracy")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def plot_attention(
    path: Path, weights: Mapping[str, np.ndarray], queries: Labels, keys: Labels, *, title: str = ""
) -> None:
    """One row a layer and one column a head, from `[N, T, S]` weights by layer name; layers of one head, three a row.

    Cells shrink until the maps together are `LARGEST` across and down, or a map is half an inch; where names of queries
    or keys no longer fit, every n-th is shown. ValueError for no layers, differing heads, and names of another number.
    """
    maps = _maps("weights", weights, "give those of a layer by its name, of one sequence of the batch")
    rows_named = {name: _names("queries", queries, name, value.shape[1]) for name, value in maps.items()}
    columns_named = {name: _names("keys", keys, name, value.shape[2]) for name, value in maps.items()}
    heads, most_queries, most_keys = np.max([value.shape for value in maps.values()], axis=0).tolist()
    single = heads == 1
    columns = min(3, len(maps)) if single else heads
    rows = -(-len(maps) * heads // columns)
    cell = min(0.25, LARGEST / (columns * most_keys), LARGEST / (rows * most_queries))
    cell = max(cell, 0.5 / max(most_queries, most_keys))

    lines = [line for name in maps for line in name.split("\n")]
    caption = 0.08 * max(map(len, lines))
    width = max(most_keys * cell, caption if single else 0.6)
    query, key = (_LETTER * max(len(n) for ns in named.values() for n in ns) for named in (rows_named, columns_named))
    margin, upright = 0.3 + query, key > cell
    gap = 0.2 + query if single else 0.1
    above = 0.1 + 0.15 * max(name.count("\n") + (1 if single else 2) for name in maps)
    pitch = above + most_queries * cell + (key if upright else _LINE) + 0.15
    across = max(margin + columns * (width + gap), margin + caption, 4.0 if title else 0.0)
    heading = textwrap.wrap(title, int(across / 0.1))
    top = 0.1 + 0.2 * len(heading)
    strongest = _farthest(np.concatenate([value.ravel() for value in maps.values()]))
    with _figure(path, across, top + rows * pitch + 0.2) as figure:
        figure.text(0.5, 1 - 0.05 / figure.get_figheight(), "\n".join(heading), ha="center", va="top", fontsize=11)
        _sides(figure, f"key · clear 0, blue {strongest:.2g}")
        for i, (name, head) in enumerate((name, head) for name in maps for head in range(heads)):
            row, column = divmod(i, columns)
            x, y = margin + column * (width + gap), top + row * pitch + above
            queries_here, keys_here = maps[name].shape[1:]
            axes = _axes(figure, x, y, keys_here * cell, queries_here * cell)
            axes.imshow(maps[name][head], vmin=0, vmax=strongest, cmap=WEIGHTS, aspect="auto")
            axes.set_title(name if single else _caption(name, head))
            _name(axes.xaxis, columns_named[name], cell)
            _name(axes.yaxis, rows_named[name] if single or head == 0 else (), cell)
            axes.tick_params("x", labelrotation=90 if upright else 0)
            if cell > 0.1:
                axes.set_xticks(np.arange(0.5, keys_here - 1), minor=True)
                axes.set_yticks(np.arange(0.5, queries_here - 1), minor=True)
                axes.grid(which="minor", color=INK, alpha=0.45, linewidth=0.5)
            axes.tick_params(which="both", labelsize=8, length=0, pad=2)


def plot_absolute_encodings(path: Path, tables: Mapping[str, np.ndarray]) -> None:
    """One panel a name, of its `[L, D]` table: positions down, features across. ValueError for no tables, or others."""
    if not tables:
        raise ValueError(
            "tables must be [L, D] by name, at least one, got none; encodings that act on logits are drawn by "
            "plot_relative_encodings"
        )
    shown = {name: _values("tables", name, table, "[L, D]") for name, table in tables.items()}
    with _figure(path, 7.5, 2.7 * len(shown)) as figure:
        for row, (name, table) in enumerate(shown.items()):
            axes = _axes(figure, 0.6, 0.3 + 2.7 * row, 6.2, 1.95)
            _signed(figure, axes, table, (6.9, 0.3 + 2.7 * row, 1.95))
            axes.set_title(name)
            axes.set_xlabel("feature", fontsize=8)
            axes.set_ylabel("position", fontsize=8)


def plot_relative_encodings(path: Path, logits: Mapping[str, np.ndarray]) -> None:
    """One row a name and one column a head, of its `[N, T, S]` logits: queries down, keys across.

    ValueError for no logits, and for differing heads.
    """
    maps = _maps("logits", logits, "encodings that are added to vectors are drawn by plot_absolute_encodings")
    heads, side, pitch = len(next(iter(maps.values()))), 1.3, 2.0
    across = max(0.55 + 1.8 * heads, 0.6 + 0.08 * max(map(len, maps)))
    with _figure(path, across, pitch * len(maps) + 0.2) as figure:
        _sides(figure, "key")
        for row, (name, value) in enumerate(maps.items()):
            for head, head_logits in enumerate(value):
                x, y = 0.55 + 1.8 * head, 0.4 + pitch * row
                axes = _axes(figure, x, y, side, side)
                _signed(figure, axes, head_logits, (x + side + 0.05, y, side))
                axes.set_title(_caption(name, head))
                if head:
                    axes.tick_params("y", labelleft=False)


def _maps(what: str, maps: Mapping[str, np.ndarray], remedy: str) -> dict[str, np.ndarray]:
    if not maps:
        raise ValueError(f"{what} must be [N, T, S] by layer name, of at least one layer, got none; {remedy}")
    shown = {name: _values(what, name, value, "[N, T, S]") for name, value in maps.items()}
    first, *others = shown
    for name in others:
        if len(shown[name]) != len(shown[first]):
            raise ValueError(
                f"{what} of all layers must have as many heads, got {len(shown[first])} in {first!r} and "
                f"{len(shown[name])} in {name!r}; draw them in pictures of their own"
            )
    return shown


def _values(what: str, name: str, values: np.ndarray, axes: str) -> np.ndarray:
    found = np.asarray(values, np.float32)
    if found.ndim != axes.count(",") + 1 or 0 in found.shape:
        raise ValueError(
            f"{what} must be {axes}, none of them 0, got {name!r} of shape {found.shape}; take one sequence of a "
            "batch, and one position at least"
        )
    return found


def _names(what: str, labels: Labels, layer: str, size: int) -> list[str]:
    """The layer's names, the long ones cut."""
    if isinstance(labels, Mapping) and layer not in labels:
        raise ValueError(f"{what} by layer must name those of each, got none for {layer!r}; add them, or give one list")
    names = labels[layer] if isinstance(labels, Mapping) else labels
    if len(names) != size:
        raise ValueError(
            f"{what} must be a name each, got {len(names)} names for the {size} {what} of {layer!r}; give as many as "
            "its [N, T, S] weights have, by layer name where layers differ"
        )
    return [name if len(name) <= 16 else f"{name[:15]}…" for name in names]


@contextlib.contextmanager
def _figure(path: Path, across: float, down: float) -> Iterator[Figure]:
    """A figure of so many inches, written to the path at the end; of 6000 pixels at most."""
    page = path.suffix == ".svg"
    with mpl.rc_context(_SETTINGS | (_PAGE if page else {})):
        figure = Figure(figsize=(across, down))
        yield figure
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type")) if page else None  # the same bytes every time
        figure.savefig(path, dpi=min(150, 6000 / max(across, down)), transparent=page, metadata=unsaid)


def _axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes by inches from the top left."""
    across, down = figure.get_size_inches()
    return figure.add_axes((x / across, 1 - (y + height) / down, width / across, height / down))


def _caption(name: str, head: int) -> str:
    return f"head {head}" if head else f"{name}\nhead 0"


def _sides(figure: Figure, below: str) -> None:
    across, down = figure.get_size_inches()
    figure.text(0.5, 0.05 / down, below, ha="center", va="bottom", fontsize=8)
    figure.text(0.05 / across, 0.5, "query", ha="left", va="center", fontsize=8, rotation=90)


def _name(axis: Axis, names: Sequence[str], cell: float) -> None:
    """As many of the names as there is room for, at equal steps."""
    step = int(np.ceil(_LINE / cell))
    axis.set_ticks(range(0, len(names), step), names[::step])


def _farthest(values: np.ndarray) -> float:
    """What has the full colour: the largest size, or 1 where all are 0."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0


def _signed(figure: Figure, axes: Axes, values: np.ndarray, scale: tuple[float, float, float]) -> None:
    """A heat-map in which clear is 0, and at inches (x, y) its scale of some height."""
    farthest = _farthest(values)
    axes.imshow(values, vmin=-farthest, vmax=farthest, cmap=SIGNED, aspect="auto")
    axes.tick_params(labelsize=7, length=2)
    bar = _axes(figure, *scale[:2], 0.07, scale[2])
    steps = np.linspace(farthest, -farthest, 101)[:, None]
    bar.imshow(steps, cmap=SIGNED, aspect="auto", extent=(0, 1, -farthest, farthest))
    bar.set_xticks(())
    bar.yaxis.tick_right()
    bar.set_yticks((-farthest, 0, farthest), [f"{-farthest:.2g}", "0", f"{farthest:.2g}"], fontsize=7)
    bar.tick_params(length=2, pad=1)
