"""What a recipe asks of its reader and of the host, and what came of its mistakes, all by program."""

import ast
import hashlib
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.mistakes import RECIPES, Outcome, mistakes, tried
from bench.recipes import Batches

FRAMEWORKS = {"nnx": "nnx", "equinox": "eqx"}
"""The name by which each framework is imported."""


class Recipe(NamedTuple):
    """One file of bench/recipes, read and run."""

    task: str
    frontend: str
    title: str
    statements: int  # without imports, docstrings and mistakes
    names: list[str]  # of the framework, as in nnx.jit
    nesting: int  # blocks, lambdas and comprehensions around the innermost expression
    host_seconds: float  # median time outside of XLA's compiler: Python, tracing, dispatch
    compile_seconds: float
    result: str  # sha256 of what it returns
    outcomes: list[Outcome]


def recipe_names() -> list[str]:
    """As in train_step_nnx, by task."""
    return sorted(path.stem for path in RECIPES.glob("*_*.py") if path.stem != "__init__")


def measured(name: str, *, runs: int = 3) -> Recipe:
    """The recipe, run several times, and each of its mistakes, run once.

    One that wants more devices than there are runs in a process of its own.
    """
    module = load(name)
    if getattr(module, "DEVICES", 1) > jax.device_count():
        return _measured_alone(name, runs)
    times = []
    for _ in range(runs):
        if runs > 1:  # one run is for what it gives, several are for its time
            jax.clear_caches()
        times.append(_timed(module))
    task, _, frontend = name.rpartition("_")
    return Recipe(
        task=task,
        frontend=frontend,
        title=(module.__doc__ or "").partition("\n")[0],
        **_read(Path(str(module.__file__)).read_text(), FRAMEWORKS[frontend]),
        host_seconds=statistics.median(host for host, _, _ in times),
        compile_seconds=statistics.median(compiling for _, compiling, _ in times),
        result=fingerprint(times[0][2]),
        outcomes=[tried(run) for run in mistakes(module)],
    )


def load(name: str) -> ModuleType:
    """The module of that name, with the devices it asks for if none are in use yet."""
    return importlib.import_module(f"bench.recipes.{name}")


def fingerprint(result: Any) -> str:
    """The sha256 of a tree's names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(result):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def demonstrate(file: str) -> None:
    """Runs one recipe and its mistakes, and prints what came of them: the main program of each recipe."""
    module = load(Path(file).stem)
    if getattr(module, "DEVICES", 1) > 1:
        jax.config.update("jax_num_cpu_devices", module.DEVICES)
    print(module.__doc__)
    print(module.recipe(Batches()))
    for run in mistakes(module):
        found = tried(run)
        print(f"\n{found.mistake}\n  {found.outcome}: {found.message}")


def _timed(module: ModuleType) -> tuple[float, float, Any]:
    """Seconds outside of and inside of XLA's compiler, and the result."""
    compiling = 0.0

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal compiling
        compiling += duration_secs if event == "/jax/core/compile/backend_compile_duration" else 0.0

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        start = time.perf_counter()
        result = jax.block_until_ready(module.recipe(Batches()))
        taken = time.perf_counter() - start
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return taken - compiling, compiling, result


def _measured_alone(name: str, runs: int) -> Recipe:
    code = (
        "import jax, json, sys; from bench import ergonomics; "
        f"jax.config.update('jax_num_cpu_devices', ergonomics.load({name!r}).DEVICES); "
        f"print(json.dumps(ergonomics.measured({name!r}, runs={runs})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=RECIPES.parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed in a process of its own:\n{done.stderr}")
    found = Recipe(*json.loads(done.stdout))
    return found._replace(outcomes=[Outcome(*outcome) for outcome in found.outcomes])


def _read(text: str, framework: str) -> dict[str, Any]:
    """What the recipe's source holds beside its mistakes."""
    kept = [node for node in ast.parse(text).body if not _aside(node)]
    nodes = [node for top in kept for node in ast.walk(top)]
    dotted = (ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute))
    names = {name for name in dotted if name.startswith(f"{framework}.") and "(" not in name and "[" not in name}
    longest = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    return {
        "statements": sum(isinstance(node, ast.stmt) and not _docstring(node) for node in nodes),
        "names": sorted(longest),
        "nesting": max((_depth(top) for top in kept), default=0),
    }


def _aside(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return any(ast.unparse(decorator).startswith("mistake(") for decorator in node.decorator_list)
    return isinstance(node, ast.Import | ast.ImportFrom | ast.If) or _docstring(node)


def _docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


_BLOCKS = (
    ast.FunctionDef, ast.ClassDef, ast.With, ast.For, ast.If, ast.Try, ast.Lambda, ast.ListComp, ast.SetComp,
    ast.DictComp, ast.GeneratorExp,
)  # fmt: skip


def _depth(node: ast.AST) -> int:
    inner = max((_depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, _BLOCKS)
