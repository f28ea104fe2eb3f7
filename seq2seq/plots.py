"""Pictures: curves and attention heat-maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


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
