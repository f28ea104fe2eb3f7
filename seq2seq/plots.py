"""Figures: curves, and heat-maps of attention and of encodings."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seq2seq.metrics import Curve


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
    path: Path, weights: Mapping[str, np.ndarray], queries: Sequence[str], keys: Sequence[str], *, title: str
) -> None:
    """One row a layer and one column a head, from `[N, T, S]` weights by layer name."""
    heads = next(iter(weights.values())).shape[0]
    figure = Figure(
        figsize=(1 + 0.32 * len(keys) * heads, 1 + 0.32 * len(queries) * len(weights)), layout="constrained"
    )
    grid = figure.subplots(len(weights), heads, squeeze=False, sharex=True, sharey=True)
    for row, (name, layer) in zip(grid, weights.items(), strict=True):
        for head, (axes, head_weights) in enumerate(zip(row, layer, strict=True)):
            axes.imshow(head_weights, vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"{name}, head {head}", fontsize=7)
            axes.set_xticks(range(len(keys)), keys)
            axes.set_yticks(range(len(queries)), queries)
            axes.tick_params(labelsize=7, length=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def plot_absolute_encodings(path: Path, tables: Mapping[str, np.ndarray]) -> None:
    """One panel a name, of its `[L, D]` table: positions down, features across."""
    figure = Figure(figsize=(5 * len(tables), 4), layout="constrained")
    for axes, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        _signed(figure, axes, table)
        axes.set_title(name, fontsize=8)
        axes.set(xlabel="feature", ylabel="position")
    figure.savefig(path, dpi=150)


def plot_relative_encodings(path: Path, logits: Mapping[str, np.ndarray]) -> None:
    """One row a name and one column a head, of its `[N, T, S]` logits: queries down, keys across."""
    heads = max(value.shape[0] for value in logits.values())
    figure = Figure(figsize=(1 + 2.2 * heads, 0.5 + 2.2 * len(logits)), layout="constrained")
    grid = figure.subplots(len(logits), heads, squeeze=False, sharex=True, sharey=True)
    for row, (name, value) in zip(grid, logits.items(), strict=True):
        for head, (axes, head_logits) in enumerate(zip(row, value, strict=True)):
            _signed(figure, axes, head_logits)
            axes.set_title(f"{name}, head {head}", fontsize=7)
            axes.tick_params(labelsize=7)
    figure.supxlabel("key", fontsize=8)
    figure.supylabel("query", fontsize=8)
    figure.savefig(path, dpi=150)


def _signed(figure: Figure, axes: Axes, values: np.ndarray) -> None:
    """A heat-map in which white is 0."""
    farthest = float(np.abs(values).max(initial=0.0)) or 1.0
    image = axes.imshow(values, vmin=-farthest, vmax=farthest, cmap="RdBu", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)
