"""The report's plots, as SVG for light and dark pages: ink has the colour of the text, lines have middle tones."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.kept import Kept

INK = "#010203"
"""Stands for the colour of the text."""
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3d7edb", "#c96f12", "#2e9960", "#d3504c", "#9a68c9", "#808080"
FRONTENDS = {"nnx": ("NNX", BLUE), "equinox": ("Equinox", ORANGE)}
STANDALONE = (
    "svg{color:#1f2328;background:#fff}@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}"
)
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "isoformer", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


class Line(NamedTuple):
    """One curve: how it is drawn, and what it is called."""

    label: str
    colour: str
    style: str
    points: Mapping[int, float]  # by what stands on the x axis


class Plot(NamedTuple):
    """One picture, with the sentence that stands for it where it cannot be seen."""

    name: str
    title: str
    alt: str
    svg: str  # to stand in a page; a file of its own is `alone(svg)`


ATTENTIONS = {
    "isoformer, materialised": (RED, "-"), "isoformer, blockwise": (GREEN, "-"), "jax.nn": (PURPLE, "--"),
    "flax.nnx": (BLUE, ":"), "torch": (GREY, "-."),
}  # fmt: skip
"""What the plots of attention show; `isoformer` alone is one of the first two, by the size."""
CALLS = {
    "jax.jit, flat list": (GREY, "-"), "nnx.jit": (BLUE, "-"), "nnx.jit, tree mode": (BLUE, "--"),
    "nnx.cached_partial": (BLUE, ":"), "nnx_impl.compiled": (GREEN, "-."), "nnx_impl.Trainer's way": (GREEN, "-."),
    "eqx.filter_jit": (ORANGE, "-"), "equinox_impl.compiled": (RED, ":"), "equinox_impl.Trainer's way": (RED, ":"),
}  # fmt: skip
"""Which ways of making a call the plots show; the tables have all of them."""


def speed(kept: Kept) -> list[Plot]:
    """Attention by length: a picture of forward, one of forward and backward."""
    return _attention("time", kept, lambda one: one["least"], seconds)


def memory(kept: Kept) -> list[Plot]:
    """The same of memory."""
    return _attention("memory", kept, lambda one: one["bytes"] / 2**20, lambda value, _=None: f"{value:,.5g} MiB")


def compile_time(kept: Kept) -> list[Plot]:
    """By depth, in a loop and in a scan."""
    lines = []
    for name, (title, colour) in FRONTENDS.items():
        for scan, style in ((False, "-"), (True, "--")):
            points = {one["layers"]: one["compile_s"] for one in kept.results
                      if (one["frontend"], one["scan"]) == (name, scan)}  # fmt: skip
            lines.append(Line(f"{title}, {'scan' if scan else 'loop'}", colour, style, points))
    title = "CPU seconds to compile a train step"
    return [_plot("compile", title, lines, "layers of the encoder, and of the decoder", seconds, log=False)]


def dispatch(kept: Kept) -> list[Plot]:
    """Of each job a picture, by the number of parameters."""
    plots = []
    for job in dict.fromkeys(one["job"] for one in kept.results):
        lines = []
        for style, look in CALLS.items():
            points = {one["parameters"]: 1e-6 * one["median"] for one in kept.results
                      if (one["job"], one["style"]) == (job, style)}  # fmt: skip
            lines += [Line(style, *look, points)] if points else []
        title = f"the host's time for a {job}"
        plots.append(_plot(f"dispatch-{job.replace(' ', '-')}", title, lines, "arrays of parameters", seconds))
    return plots


def alone(svg: str) -> str:
    """As a file, which brings its colours along."""
    return svg.replace(">", f"><style>{STANDALONE}</style>", 1)


def _attention(what: str, kept: Kept, value: Callable[[dict], float], form: Callable[..., str]) -> list[Plot]:
    plots = []
    for kind in dict.fromkeys(one["kind"] for one in kept.results):
        lines = []
        for implementation, look in ATTENTIONS.items():
            points = {one["length"]: value(one) for one in kept.results
                      if (one["implementation"], one["kind"]) == (implementation, kind)}  # fmt: skip
            lines += [Line(implementation, *look, points)] if points else []
        name = f"{what}-{kind.replace(' + ', '-')}"
        plots.append(_plot(name, f"{what} of attention, {kind}", lines, "length T = S", form))
    return plots


def _plot(name: str, title: str, lines: Sequence[Line], xlabel: str, form: Callable[..., str], *, log=True) -> Plot:
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.8, 3.9), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            look = {"color": line.colour, "linestyle": line.style, "linewidth": 2, "marker": "o", "markersize": 4}
            axes.plot(list(line.points), list(line.points.values()), label=line.label, **look)
        ticks = sorted({x for line in lines for x in line.points})
        if log:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(form))
        axes.set_xlabel(xlabel)
        axes.grid(color=GREY, alpha=0.35, linewidth=0.7)
        figure.legend(loc="outside lower center", ncols=2, handlelength=3.2)
        written = io.StringIO()
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    last = ticks[-1]
    ends = ", ".join(f"{line.label} {form(line.points[last])}" for line in lines if last in line.points)
    alt = f"{title[0].upper()}{title[1:]}. At {xlabel} {last:,}: {ends}."
    return Plot(name, title, alt, _embedded(written.getvalue(), name, alt))


def _embedded(text: str, name: str, alt: str) -> str:
    """The svg element alone, with ids of its own, its ink the colour of the text, and a description."""
    svg = text[text.index("<svg") :].strip()
    svg = re.sub(r'\bid="|(?<=url\()#|(?<=href=")#', lambda found: f"{found[0]}{name}-", svg)
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)


def seconds(value: float, _: object = None) -> str:
    """In the unit that suits it."""
    if value >= 1 or value == 0:
        return f"{value:.3g} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"
