"""What the tables say on "NNX or Equinox?": each line computed, with a link to where it comes from."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from bench.figures import seconds
from bench.kept import Kept

NOISE = 1.1
"""Times and shares that differ by less than a tenth count as the same, and times whose spreads overlap."""
Less = Literal["nnx", "equinox", "the same", "they differ"]


class Finding(NamedTuple):
    """One question, the answer of each, and which of them is less; less is better in all of these."""

    question: str
    nnx: str
    equinox: str
    less: Less
    section: str


def findings(kept: Mapping[str, Kept]) -> list[Finding]:
    """All of them, in the order of the report."""
    return [
        *_agreement(kept["agreement"].results),
        *_dispatch(kept["dispatch"].results),
        *_compile(kept["compile"].results),
        *_recipes(kept["recipes"].results),
        *_conformance(kept["conformance"].results),
    ]


def _agreement(results: list[dict[str, Any]]) -> list[Finding]:
    made, programs = [], [one for one in results if one["how"] == "program text"]
    for question, which, what in (
        ("Do they compute the same numbers?", results, "comparisons equal"),
        ("Does a step cost the same once it runs?", programs, "programs equal"),
    ):
        equal = sum(one["equal"] for one in which)
        text = f"{equal} of {len(which)} {what}"
        made.append(Finding(question, text, text, "the same" if equal == len(which) else "they differ", "agreement"))
    return made


def _dispatch(results: list[dict[str, Any]]) -> list[Finding]:
    """By the framework's own jit, by the fastest style of its own, and by what this project offers instead."""
    size, made = statistics.median_low({one["parameters"] for one in results}), []
    for job in ("forward", "train step"):
        styles = {one["style"]: one for one in results if (one["job"], one["parameters"]) == (job, size)}
        ours = "compiled" if job == "forward" else "Trainer's way"
        nnx, equinox = (
            min((one for style, one in styles.items() if style.startswith(prefix)), key=lambda one: one["median"])
            for prefix in ("nnx.", "eqx.")
        )
        for how, sides in (
            ("by the framework's own jit", (styles["nnx.jit"], styles["eqx.filter_jit"])),
            ("by the fastest way that the framework offers", (nnx, equinox)),
            ("by what this project offers", (styles[f"nnx_impl.{ours}"], styles[f"equinox_impl.{ours}"])),
        ):
            texts = [
                f"{one['style']}: {seconds(1e-6 * one['median'])}, {one['ratio']:,.1f} x a flat list" for one in sides
            ]
            spreads = [(one["low"], one["high"]) for one in sides]
            question = f"Host's time of a {job}, {how}, {size} parameter arrays"
            made.append(_timing(question, texts, [one["median"] for one in sides], spreads, "dispatch"))
    return made


def _compile(results: list[dict[str, Any]]) -> list[Finding]:
    deepest, made = max(one["layers"] for one in results), []
    for scan in (False, True):
        deep = [one for one in results if (one["layers"], one["scan"]) == (deepest, scan)]
        sides = [one for name in ("nnx", "equinox") for one in deep if one["frontend"] == name]
        form = "scan" if scan else "loop"
        question = f"CPU time to compile a train step of {deepest} + {deepest} layers, in a {form}"
        times, spreads = [one["compile_s"] for one in sides], [one["spread"] for one in sides]
        made.append(_timing(question, [f"{time:.1f} s" for time in times], times, spreads, "compile"))
    return made


def _recipes(results: list[dict[str, Any]]) -> list[Finding]:
    """Of the tasks that both frameworks know."""
    by_frontend = [{r["task"]: r for r in results if r["frontend"] == name} for name in ("nnx", "equinox")]
    shared = sorted(by_frontend[0].keys() & by_frontend[1].keys())
    nnx, equinox = ([side[task] for task in shared] for side in by_frontend)
    statements = [sum(r["statements"] for r in side) for side in (nnx, equinox)]
    order = [a["statements"] - b["statements"] for a, b in zip(nnx, equinox, strict=True)]
    fewer = [sum(apart < 0 for apart in order), sum(apart > 0 for apart in order)]
    names = [len({name for r in side for name in r["names"]}) for side in (nnx, equinox)]
    texts = [f"{total}; fewer in {n} tasks" for total, n in zip(statements, fewer, strict=True)]
    made = [
        _finding(f"Statements to write {len(shared)} common tasks", texts, statements, "recipes"),
        _finding("Names of the framework to know for them", [str(number) for number in names], names, "recipes"),
    ]
    outcomes = [[outcome["outcome"] for r in side for outcome in r["outcomes"]] for side in (nnx, equinox)]
    for question, classes in (
        ("Planted mistakes that run to a wrong result", ("silently wrong", "wrong with a warning")),
        ("Planted mistakes refused only after the first batch", ("refused late",)),
    ):
        counts = [sum(outcome in classes for outcome in side) for side in outcomes]
        texts = [f"{count} of {len(side)}" for count, side in zip(counts, outcomes, strict=True)]
        shares = [count / len(side) for count, side in zip(counts, outcomes, strict=True)]
        made.append(_finding(question, texts, shares, "recipes", noise=NOISE))
    return made


def _conformance(results: dict[str, Any]) -> list[Finding]:
    """Of each framework's own module of attention."""
    by_name = {one["name"]: [v["status"] for v in one["verdicts"]] for one in results["implementations"]}
    own = [by_name[name] for name in ("nnx.MultiHeadAttention", "eqx.nn.MultiheadAttention")]
    broken = [sum(status in ("defect", "raises") for status in side) for side in own]
    texts = [
        f"{bad} of {sum(status != 'not offered' for status in side)} that apply"
        for bad, side in zip(broken, own, strict=True)
    ]
    question = "Laws that the framework's own multi-head attention breaks"
    return [_finding(question, texts, broken, "conformance")]


def _timing(
    question: str, texts: Sequence[str], times: Sequence[float], spreads: Sequence[Sequence[float]], section: str
) -> Finding:
    """What is measured with noise: where the spreads overlap, nothing can be said."""
    (first_low, first_high), (second_low, second_high) = spreads
    overlap = first_low <= second_high and second_low <= first_high
    return _finding(question, texts, times, section, noise=math.inf if overlap else NOISE)


def _finding(
    question: str, texts: Sequence[str], values: Sequence[float], section: str, *, noise: float = 1.0
) -> Finding:
    """Of NNX and of Equinox, in this order."""
    less: Less = "nnx" if values[0] < values[1] else "equinox"
    if max(values) <= noise * min(values):
        less = "the same"
    return Finding(question, texts[0], texts[1], less, section)
