"""What the benches found, as the tables that the report's pages show."""

import ast
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

from bench.figures import FRONTENDS
from bench.kept import Kept
from conformance.report import LEGEND, SIGNS


class Table(NamedTuple):
    """A head and rows of text."""

    head: list[str]
    rows: list[list[str]]


def tables(kept: Mapping[str, Kept]) -> dict[str, Any]:
    """All of them, by the names that the templates know."""
    recipes = kept["recipes"].results
    return {
        "agreement": _agreement(kept["agreement"].results),
        "by_length": {name: _by_length(kept[name].results, name) for name in ("speed", "memory")},
        "compile": _compile(kept["compile"].results),
        "dispatch": _dispatch(kept["dispatch"].results),
        "tasks": [_task(name, list(pair)) for name, pair in groupby(recipes, key=lambda one: one["task"])],
        "outcomes": _outcomes(recipes),
        "laws": _laws(kept["conformance"].results),
        "kept_laws": _kept_laws(kept["conformance"].results),
        "broken": _broken(kept["conformance"].results),
        "legend": LEGEND,
        "step": {r["frontend"]: _function(r["source"], "train_step") for r in recipes if r["task"] == "train_step"},
        "signs": SIGNS,
        "packages": list(dict.fromkeys(name for one in kept.values() for name in one.versions)),
    }  # fmt: skip


def _agreement(results: list[dict[str, Any]]) -> Table:
    configs = list(dict.fromkeys(one["config"] for one in results))
    rows = []
    for what, how in dict.fromkeys((one["what"], one["how"]) for one in results):
        found = {one["config"]: one for one in results if one["what"] == what}
        rows.append([what, how, *(_agreed(found[config]) for config in configs)])
    return Table(["", "compared as", *configs], rows)


def _agreed(one: dict[str, Any]) -> str:
    if not one["equal"]:
        return f"✗ {one['difference'] or ', '.join(f'{n} {v[:8]}' for n, v in one['sha256'].items())}"
    return f"✓\u00a0{next(iter(one['sha256'].values()))[:8]}" if one["sha256"] else "✓"


def _by_length(results: list[dict[str, Any]], name: str) -> dict[str, Table]:
    lengths = sorted({one["length"] for one in results})
    unit, show = {
        "speed": ("ms", lambda one: f"{1000 * one['least']:,.2f}"),
        "memory": ("MiB", lambda one: f"{one['bytes'] / 2**20:,.1f}"),
    }[name]
    tables = {}
    for kind in dict.fromkeys(one["kind"] for one in results):
        found = {(one["implementation"], one["length"]): show(one) for one in results if one["kind"] == kind}
        rows = [
            [implementation, *(found[implementation, length] for length in lengths)]
            for implementation in dict.fromkeys(implementation for implementation, _ in found)
        ]
        tables[kind] = Table([f"{kind}, {unit}", *(f"T = {n:,}" for n in lengths)], rows)
    return tables


def _compile(results: list[dict[str, Any]]) -> Table:
    depths = sorted({one["layers"] for one in results})
    found = {(one["frontend"], one["scan"], one["layers"]): one["compile_s"] for one in results}
    rows = []
    for frontend, scan in dict.fromkeys((frontend, scan) for frontend, scan, _ in found):
        times = [found[frontend, scan, n] for n in depths]
        name = f"{FRONTENDS[frontend][0]}, {'scan' if scan else 'loop'}"
        rows.append([name, *(f"{time:.1f}" for time in times), f"{times[-1] / times[0]:.2f}"])
    return Table(["CPU seconds", *(f"{n} + {n} layers" for n in depths), f"{depths[-1]} / {depths[0]}"], rows)


def _dispatch(results: list[dict[str, Any]]) -> dict[str, Table]:
    sizes = sorted({one["parameters"] for one in results})
    tables = {}
    for job in dict.fromkeys(one["job"] for one in results):
        found = {(one["style"], one["parameters"]): one for one in results if one["job"] == job}
        rows = [
            [style, *(f"{found[style, n]['median']:,.0f} µs · {found[style, n]['ratio']:.3g} x" for n in sizes)]
            for style in dict.fromkeys(style for style, _ in found)
        ]
        tables[job] = Table([job, *(f"{n} arrays" for n in sizes)], rows)
    return tables


# recipes


def _task(name: str, pair: list[dict[str, Any]]) -> dict[str, Any]:
    """Both sides, NNX first: what the template shows of each."""
    pair.sort(key=lambda one: one["frontend"] == "equinox")
    return {
        "name": name,
        "sides": [one | {"framework": FRONTENDS[one["frontend"]][0], "code": _parts(one)} for one in pair],
    }


def _parts(recipe: dict[str, Any]) -> dict[str, str]:
    """The recipe's source without docstring and mistakes; the mistakes by name."""
    lines, tree = recipe["source"].splitlines(), ast.parse(recipe["source"])
    names = {outcome["name"] for outcome in recipe["outcomes"]}
    parts, first = {}, len(lines) + 1
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            start = min(decorator.lineno for decorator in node.decorator_list)
            parts[node.name] = "\n".join(lines[start - 1 : node.end_lineno])
            first = min(first, start)
    return parts | {"recipe": "\n".join(lines[tree.body[0].end_lineno or 0 : first - 1]).strip()}


def _function(source: str, name: str) -> str:
    """One function of a module, decorators included."""
    (node,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    first = min(decorator.lineno for decorator in node.decorator_list)
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def _outcomes(recipes: list[dict[str, Any]]) -> Table:
    """How many mistakes ended how."""
    found = [(one["frontend"], outcome["outcome"]) for one in recipes for outcome in one["outcomes"]]
    classes = ("refused at construction", "refused at the call", "refused late", "wrong with a warning",
               "silently wrong", "harmless")  # fmt: skip
    rows = [[one, *(str(found.count((frontend, one))) for frontend in FRONTENDS)] for one in classes]
    rows.append(["all", *(str(sum(name == frontend for name, _ in found)) for frontend in FRONTENDS)])
    return Table(["what happened", *(title for title, _ in FRONTENDS.values())], rows)


# conformance


def _laws(results: dict[str, Any]) -> dict[str, Table]:
    """Laws by implementation, by kind."""
    tables = {}
    for kind in dict.fromkeys(one["kind"] for one in results["implementations"]):
        group = [one for one in results["implementations"] if one["kind"] == kind]
        rows = [
            [verdicts[0]["law"], *(verdict["status"] for verdict in verdicts)]
            for verdicts in zip(*(one["verdicts"] for one in group), strict=True)
        ]
        tables[kind] = Table(["law", *(one["name"] for one in group)], rows)
    return tables


def _kept_laws(results: dict[str, Any]) -> Table:
    """How many laws each implementation keeps."""
    rows = []
    for one in results["implementations"]:
        found = [verdict["status"] for verdict in one["verdicts"]]
        rows.append([one["name"], one["kind"], *(str(found.count(status)) for status in SIGNS)])
    return Table(["implementation", "laws of", *SIGNS], rows)


def _broken(results: dict[str, Any]) -> list[dict[str, str]]:
    """Every verdict that needs words."""
    return [
        verdict | {"sign": SIGNS[verdict["status"]], "name": one["name"]}
        for one in results["implementations"]
        for verdict in one["verdicts"]
        if "snippet" in verdict
    ]
