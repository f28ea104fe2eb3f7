"""Mutation testing of core/: is each small fault in a source file noticed by some test of that file?

    python -m tests.mutate [files...] [--sample N] [--seed S] [--json FILE] [--changed BASE] [--since REPORT]

A fork server: the parent imports everything once but never starts a JAX backend, so that it may fork; each child
installs one mutated module under the import hook of conftest.py and runs the tests that reach the mutated statement,
the likeliest to notice first. Everything runs in a copy of the working tree. How to read it: docs/mutation.md.
"""

import argparse
import ast
import copy
import gc
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENTS = ROOT / "tests/mutation_equivalents.txt"
_ATTENTION = [f"tests/test_attention{part}.py" for part in ("", "_oracle", "_input")]
TESTS = {
    "core/attention.py": [*_ATTENTION, "tests/test_step_attention.py"],
    "core/blockwise.py": ["tests/test_blockwise.py", "tests/test_attention_input.py"],
    "core/cache.py": ["tests/test_cache.py", "tests/test_step_attention.py"],
    "core/decoding.py": [f"tests/test_{name}.py" for name in ("decoding", "constraints", "sampling")],
    "core/grid.py": ["tests/test_masks.py", "tests/test_blockwise.py"],
    "core/logits.py": _ATTENTION,
    "core/masks.py": ["tests/test_masks.py", "tests/test_blockwise.py"],
}
"""Where the tests of a file are not tests/test_<file>.py alone."""
PASS_MARK, COUNTED_FROM = 0.95, 200
"""The score that a run must reach if it has so many mutants; fewer say too little."""

_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
_ARITHMETIC |= {ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
_DROPPED = (ast.Mult, ast.Div, ast.BitAnd, ast.BitOr)  # the scale, or one of two masks
_COMPARISONS = {
    **{ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE]},
    **{ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]},
    **{ast.In: [ast.NotIn], ast.NotIn: [ast.In]},
}
_PARTNERS = ["any all", "argmax argmin", "max min", "maximum minimum", "mean sum", "ones zeros", "repeat tile"]
_PARTNERS += ["sin cos", "triu tril", "floor ceil", "logical_or logical_and", "ones_like zeros_like"]
_RENAMED = {a: b for pair in map(str.split, _PARTNERS) for a, b in (pair, pair[::-1])}
_UNWRAPPED = {"stop_gradient", "optimization_barrier", "checkpoint", "sqrt", "square"}  # f(x) becomes x
_UNCALLED = {"astype", "swapaxes", "copy", "conj"}  # x.f(...) becomes x
_POSITION = re.compile(r"(^|_)(index|length|lengths|offset|start|position|positions|added|step)$")
_TRANSPOSED = re.compile(r"(^|_)(mask|bias|allowed)$")


@dataclass(frozen=True)
class Mutant:
    """One fault. Its text tells it from the others, wherever it moves in its file."""

    file: str
    function: str
    operator: str
    before: str  # the statement, or the head of a compound one
    after: str
    line: int
    lines: tuple[int, ...]  # of the statement; none for code that runs at import
    source: str  # of the whole mutated module

    def __str__(self) -> str:
        """Its paragraph in the list of equivalents."""
        return f"{self.file} | {self.function or 'module'} | {self.operator}\n- {self.before}\n+ {self.after}"


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    outcome: str  # killed, timeout, survived, or error: the runner's own
    by: str | None  # the test that noticed
    seconds: float


def name_of(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return getattr(node, "attr", getattr(node, "id", ""))


def variants(node: ast.AST, parent: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Each operator that applies to a node, and what it makes of it."""

    def changed(operator: str, **fields) -> tuple[str, ast.AST]:
        new = copy.copy(node)
        for field, value in fields.items():
            setattr(new, field, value)
        return operator, new

    match node:
        case ast.BinOp(left, op, right) | ast.AugAssign(left, op, right):
            if type(op) in _ARITHMETIC:
                yield changed("arithmetic", op=_ARITHMETIC[type(op)]())
            if isinstance(node, ast.BinOp) and isinstance(op, _DROPPED):
                yield "drop-right", left
                if isinstance(op, ast.BitAnd | ast.BitOr):
                    yield "drop-left", right
            if isinstance(op, ast.MatMult):
                yield changed("swap-operands", left=right, right=left)
        case ast.Compare(_, ops, _):
            for i, op in enumerate(ops):
                for other in _COMPARISONS.get(type(op), []):
                    yield changed("compare", ops=[*ops[:i], other(), *ops[i + 1 :]])
        case ast.BoolOp(op, values):
            yield changed("boolean", op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield ("drop-condition", rest[0]) if len(rest) == 1 else changed("drop-condition", values=rest)
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            yield "constant", ast.Constant(-value + 1)
            yield "constant", ast.Constant(-value - 1)
        case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
            yield "drop-unary", operand
        case ast.Constant(bool() as value):
            if getattr(parent, "arg", "") != "strict":  # of zip: an assertion
                yield "constant", ast.Constant(not value)
        case ast.Constant(int() | float() as value) if not isinstance(parent, ast.UnaryOp):
            yield "constant", ast.Constant(value + 1)
            if value:
                yield "constant", ast.Constant(value - 1)
        case ast.If() | ast.IfExp() | ast.While():
            for value in (True, False):
                if not (value and isinstance(node, ast.While)):
                    yield changed(f"if-{value}".lower(), test=ast.Constant(value))
        case ast.comprehension(ifs=[_, *_]):
            yield changed("drop-condition", ifs=[])
        case ast.Expr(ast.Call()):
            yield "drop-statement", ast.Pass()
        case ast.Call(func, args, keywords):
            yield from _calls(func, args, keywords, changed)
        case ast.Attribute(value, "T"):
            yield "drop-transpose", value
    if isinstance(node, ast.Attribute) and node.attr in _RENAMED:
        yield changed("rename", attr=_RENAMED[node.attr])
    loaded = isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
    if loaded and isinstance(parent, ast.BinOp | ast.Call | ast.Compare | ast.keyword | ast.Subscript):
        if _POSITION.search(name_of(node)) and node is not getattr(parent, "func", None):
            yield "offset", ast.BinOp(node, ast.Add(), ast.Constant(1))
        if _TRANSPOSED.search(name_of(node)) and not isinstance(parent, ast.Compare):
            yield "transpose", ast.parse(f"{ast.unparse(node)}.swapaxes(-1, -2)", mode="eval").body


def _calls(func: ast.expr, args: list[ast.expr], keywords: list[ast.keyword], changed) -> Iterator[tuple[str, ast.AST]]:
    name = name_of(func)
    for i, keyword in enumerate(keywords):
        if keyword.arg not in (None, "strict"):
            yield changed("drop-keyword", keywords=keywords[:i] + keywords[i + 1 :])
    if name == "where" and len(args) == 3:
        yield changed("swap-where", args=[args[0], args[2], args[1]])
    elif name not in ("isinstance", "getattr", "hasattr", "issubdtype"):
        for i, pair in enumerate(itertools.pairwise(args)):
            if all(isinstance(x, ast.Name | ast.Attribute) for x in pair):
                yield changed("swap-arguments", args=[*args[:i], *pair[::-1], *args[i + 2 :]])
    if name == "einsum" and args and isinstance(args[0], ast.Constant) and len(args[0].value) > 1:
        yield changed("swap-axes", args=[ast.Constant(args[0].value[:-2] + args[0].value[:-3:-1]), *args[1:]])
    if name in _UNWRAPPED and args:
        yield "unwrap", args[0]
    if name in _UNCALLED and isinstance(func, ast.Attribute):
        yield "unwrap", func.value
    if isinstance(func, ast.Name) and name in ("min", "max", "any", "all"):
        yield changed("rename", func=ast.Name(_RENAMED[name], ast.Load()))


def _only_types(statement: ast.AST) -> bool:
    """A type alias: nothing at run time depends on what it says."""
    value = getattr(statement, "value", None)
    union = isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    return union or isinstance(value, ast.Subscript) or name_of(getattr(value, "func", None)) in ("TypeVar", "Literal")


def _head(statement: ast.stmt) -> str:
    """A statement without the statements inside of it, on one line however it is laid out."""
    bare = copy.copy(statement)
    for field in ("body", "orelse", "finalbody", "handlers"):
        if hasattr(bare, field):
            setattr(bare, field, [])
    return " ".join(ast.unparse(bare).splitlines())


class Site(NamedTuple):
    """A node and where it hangs: in which functions, in which statement, and on which parent."""

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None
    scope: tuple[str, ...]
    statement: ast.stmt

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def sites(parent: ast.AST, scope: tuple[str, ...], statement: ast.stmt | None) -> Iterator[Site]:
    """All below a node but annotations, type aliases, imports and the text of messages."""
    for field, value in ast.iter_fields(parent):
        for i, node in enumerate(value if isinstance(value, list) else [value]):
            skipped = field in ("annotation", "returns", "ctx") or not isinstance(node, ast.AST)
            if skipped or isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom):
                continue
            inside = node if isinstance(node, ast.stmt) else statement
            if scope or not isinstance(inside, ast.Assign | ast.AnnAssign) or not _only_types(inside):
                yield Site(node, parent, field, i if isinstance(value, list) else None, scope, inside)
                names = (*scope, node.name) if isinstance(node, ast.FunctionDef | ast.ClassDef) else scope
                yield from sites(node, names, inside)


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of a file, each once, in the order of its lines."""
    tree, found = ast.parse(source), {}
    for site in sites(tree, (), None):
        statement, before = site.statement, _head(site.statement)
        first_inside = min((s.lineno for s in getattr(statement, "body", [])), default=statement.end_lineno + 1)
        runs = site.scope and not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        lines = tuple(range(statement.lineno, max(first_inside, statement.lineno + 1))) if runs else ()
        line = getattr(site.node, "lineno", statement.lineno)
        for operator, new in variants(site.node, site.parent):
            site.put(new)
            after, text = _head(new if site.node is statement else statement), ast.unparse(tree)
            site.put(site.node)
            found.setdefault(text, Mutant(file, ".".join(site.scope), operator, before, after, line, lines, text))
    return sorted(found.values(), key=lambda mutant: mutant.line)


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def set_alarm(seconds: float) -> None:
    """Ends the process, even in a loop of compiled code, after so many seconds of work, or ten times as long."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


class Trial:
    """The pytest plugin of one child: which tests, in which order, and which of them failed or ran which lines."""

    def __init__(self, limits: dict[str, float] | None = None, record: Path | None = None):
        self.limits, self.record = limits, str(record)
        self.reached: dict[str, set[int]] = defaultdict(set)
        self.seconds: dict[str, float] = Counter()
        self.failed: str | None = None
        self._recording = record is not None

    def pytest_configure(self) -> None:
        import hypothesis
        import jax

        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failure is enough: no shrinking
        hypothesis.settings.register_profile("trial", hypothesis.settings.get_profile("mutation"), phases=phases)
        hypothesis.settings.load_profile("trial")

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.limits is not None:
            order = {test: i for i, test in enumerate(self.limits)}
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtest_setup(self, item) -> None:
        if self.limits is not None:
            set_alarm(self.limits[item.nodeid])
        if not self._recording:
            return
        import jax

        jax.clear_caches()  # what an earlier test has compiled would not run its lines again
        lines = self.reached[item.nodeid]

        def local(frame, event, _):
            if event == "line":
                lines.add(frame.f_lineno)
            return local

        sys.settrace(lambda frame, *_: local if frame.f_code.co_filename == self.record else None)

    def pytest_runtest_teardown(self) -> None:
        sys.settrace(None)


def needs(file: str) -> set[str]:
    """The files of core/ that a file imports, directly or not, and itself."""
    found, pending = set(), [file]
    while pending:
        if (file := pending.pop()) not in found:
            found.add(file)
            names = re.findall(r"^\s*(?:from|import) (core\.\w+)", Path(file).read_text(), re.M)
            pending += [name.replace(".", "/") + ".py" for name in names]
    return found


class Server:
    """Forks the children that try the mutants of one file; files that it needs are imported, none that need it.

    To import those and then drop them would not do: beartype remembers classes by their names.
    """

    def __init__(self, file: str, source: str):
        self.file, self.source, self.module = file, source, module_of(file)
        self.tests = TESTS.get(file, [f"tests/test_{Path(file).stem}.py"])
        self.kills: Counter[str] = Counter()
        for other in sorted(needs(file) - {file}):
            importlib.import_module(module_of(other))
        assert self.module not in sys.modules, f"{file} is imported already"
        gc.freeze()  # children need not look through what was here before them
        baseline, report = self._fork(source, record=Path(file).resolve())
        if baseline != 0:
            raise SystemExit(f"{' '.join(self.tests)} fail without any mutation: {report.get('failed', baseline)}")
        if self._fork(source + "\nraise AssertionError('a control')")[0] == 0:
            raise SystemExit(f"{' '.join(self.tests)} do not import the mutated {file}")
        self.reached: dict[str, set[int]] = {test: set(lines) for test, lines in report["reached"].items()}
        self.seconds: dict[str, float] = report["seconds"]

    def attempt(self, mutant: Mutant) -> Result:
        """The tests that reach the statement, those that are quick or have noticed much first; then the others."""
        start, order = time.time(), lambda test: self.seconds[test] / (1 + self.kills[test])
        chosen = [test for test, lines in self.reached.items() if lines & set(mutant.lines)]
        for tests in (chosen, self.reached.keys() - set(chosen)):
            if tests:
                limits = {test: 5 + 5 * self.seconds[test] for test in sorted(tests, key=order)}
                status, report = self._fork(mutant.source, limits)
                if status != 0:
                    self.kills[report.get("failed", "")] += 1
                    outcome = "killed" if status in (1, 2) or status < 0 else "error"  # 2: it cannot be imported
                    outcome = "timeout" if status in (-signal.SIGPROF, -signal.SIGALRM) else outcome
                    return Result(mutant, outcome, report.get("failed"), time.time() - start)
        return Result(mutant, "survived", None, time.time() - start)

    def _fork(self, source: str, limits: dict[str, float] | None = None, record: Path | None = None):
        """Exit status of a child, and what it reported before."""
        descriptor, out = tempfile.mkstemp(suffix=".json")
        assert not sys.modules["jax._src.xla_bridge"].backends_are_initialized(), "an import started a JAX backend"
        child = os.fork()
        if child == 0:
            try:
                if not os.environ.get("MUTATE_SHOW"):
                    null = os.open(os.devnull, os.O_RDWR)
                    for stream in (0, 1, 2):
                        os.dup2(null, stream)
                set_alarm(600 if limits is None else 60)
                os._exit(self._child(source, limits, record, Path(out)))
            finally:
                os._exit(70)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(descriptor) as file:
            text = file.read()
        os.unlink(out)
        return status, json.loads(text) if text else {}

    def _child(self, source: str, limits: dict[str, float] | None, record: Path | None, out: Path) -> int:
        import pytest

        sys.meta_path.insert(0, Mutated(self.module, source))
        trial = Trial(limits, record)
        quiet = ["-x", "-q", "--tb=short" if os.environ.get("MUTATE_SHOW") else "--tb=no", "--assert=plain"]
        status = int(pytest.main([*quiet, "-p", "no:cacheprovider", "-p", "no:xdist", *self.tests], plugins=[trial]))
        reached = {test: sorted(lines) for test, lines in trial.reached.items()}
        out.write_text(json.dumps({"failed": trial.failed, "seconds": trial.seconds, "reached": reached}))
        return status


class Mutated:
    """An import hook in front of conftest's: its loader instruments the mutated text instead of the file's."""

    def __init__(self, module: str, source: str):
        self.module, self.source = module, source

    def find_spec(self, name: str, path=None, target=None):
        if name != self.module:
            return None
        spec = next(s for f in sys.meta_path if f is not self and (s := f.find_spec(name, path, target)))
        loader, file = spec.loader, spec.origin
        loader.get_code = lambda _: loader.source_to_code(self.source.encode(), file)
        return spec


def changed_lines(file: str, base: str) -> set[int]:
    """The lines of the working tree that `git diff BASE` shows as new."""
    diff = subprocess.check_output(["git", "diff", "-U0", base, "--", file], cwd=ROOT, text=True)
    hunks = re.findall(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", diff, re.M)
    return {int(start) + i for start, count in hunks for i in range(int(count or 1))}


def equivalents() -> list[str]:
    """The mutants of the list: a head, `- before`, `+ after` and, which must be there, a reason. # is a comment."""
    text = re.sub(r"^#.*\n", "", EQUIVALENTS.read_text(), flags=re.M)
    paragraphs = [paragraph.strip().splitlines() for paragraph in text.split("\n\n") if paragraph.strip()]
    for lines in paragraphs:
        if [line[:2] for line in lines[1:3]] != ["- ", "+ "] or len(lines) < 4:
            raise SystemExit(f"{EQUIVALENTS.name}: {lines[0]!r} needs a line '- ', a line '+ ' and a reason")
    return ["\n".join(lines[:3]) for lines in paragraphs]


def snapshot() -> Path:
    """A copy of the working tree, and the process in it: files may be edited meanwhile."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    place = Path(tempfile.mkdtemp(prefix="mutate-")).resolve()
    for name in listed.splitlines():
        with suppress(FileNotFoundError):  # deleted and not yet committed
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    os.chdir(place)
    sys.path[0] = str(place)
    sys.modules.pop("tests", None)
    return place


def warm_up() -> None:
    """Imports all that children need, and no JAX backend: its threads would not survive a fork."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "HYPOTHESIS_PROFILE": "mutation", "NPROC": "1"}
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache/mutation")
    for name in ("chex", "equinox", "flax.nnx", "hypothesis.extra.numpy", "jax.test_util", "optax", "pytest"):
        importlib.import_module(name)
    importlib.import_module("tests.conftest")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="default: core/*.py")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--json", type=lambda name: Path(name).resolve(), help="write every mutant and its outcome here"
    )
    parser.add_argument("--changed", metavar="BASE", help="only mutants of lines that differ from this commit")
    parser.add_argument(
        "--since", type=lambda name: Path(name).resolve(), help="a report whose killed and listed mutants stay so"
    )
    options = parser.parse_args()
    listed, place = equivalents(), snapshot()
    try:
        return run(options, listed)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(place, ignore_errors=True)


def chosen_mutants(options: argparse.Namespace) -> dict[str, list[Mutant]]:
    """By file, those that others need before them."""
    files = options.files or sorted(str(p) for p in Path().glob("core/*.py") if p.stem != "__init__")
    mutants = [
        m for file in sorted(files, key=lambda f: len(needs(f))) for m in mutants_of(file, Path(file).read_text())
    ]
    if options.changed:
        changed = {file: changed_lines(file, options.changed) for file in files}
        mutants = [m for m in mutants if changed[m.file] & {m.line, *m.lines}]
    if options.sample is not None:
        kept = random.Random(options.seed).sample(range(len(mutants)), min(options.sample, len(mutants)))
        mutants = [mutants[i] for i in sorted(kept)]
    return {file: list(group) for file, group in itertools.groupby(mutants, key=lambda m: m.file)}


def known_before(report: Path, listed: list[str]) -> dict[str, Result]:
    """The mutants that a report says were killed, and the survivors that are listed.

    Where tests have only been added, the first still are; of the others a run without a report tells.
    """
    found = [
        Result(Mutant(**row["mutant"], lines=(), source=""), row["outcome"], row["by"], row["seconds"])
        for row in json.loads(report.read_text())["results"]
    ]
    return {str(r.mutant): r for r in found if r.outcome in ("killed", "timeout") or str(r.mutant) in listed}


def killed_of(results: list[Result]) -> float:
    """The share of mutants that some test noticed."""
    return sum(r.outcome in ("killed", "timeout") for r in results) / max(len(results), 1)


def write_report(file: Path, results: list[Result]) -> None:
    """After each mutant, so that `--since` may go on from a run that was stopped."""
    rows = [asdict(r) | {"seconds": round(r.seconds, 3)} for r in results]
    for row in rows:
        del row["mutant"]["source"], row["mutant"]["lines"]
    file.write_text(json.dumps({"score": killed_of(results), "results": rows}, indent=1) + "\n")


def run(options: argparse.Namespace, listed: list[str]) -> int:
    """Tries the mutants that were asked for; 0 if enough are killed and every survivor is listed."""
    chosen, before = chosen_mutants(options), {} if options.since is None else known_before(options.since, listed)
    warm_up()
    results: list[Result] = []
    for file, mutants in chosen.items():
        start, server, counts = time.time(), Server(file, Path(file).read_text()), Counter()
        for mutant in mutants:
            results.append(result := before.get(str(mutant)) or server.attempt(mutant))
            counts[result.outcome] += 1
            if options.json:
                write_report(options.json, results)
            if result.outcome != "killed":
                note = ", not listed" if result.outcome == "survived" and str(mutant) not in listed else ""
                print(f"{result.outcome}{note} (line {mutant.line})\n{mutant}\n", flush=True)
        seconds = time.time() - start
        outcomes = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("killed", "timeout", "survived", "error"))
        print(f"{file}: {len(mutants)} mutants, {outcomes}, {seconds:.0f} s\n", flush=True)
    tried, alive = {str(r.mutant) for r in results}, [r for r in results if r.outcome in ("survived", "error")]
    survivors = [str(r.mutant) for r in alive]
    unlisted = [text for text in survivors if text not in listed]
    if options.sample is None and options.changed is None:  # then a listed one that was not tried is gone
        tried |= {text for text in listed if text.split(" |")[0] in chosen}
    wrong = [text for text in listed if text in tried and text not in survivors]
    score = killed_of(results)
    print(f"{len(results)} mutants, {score:.1%} killed, {len(alive)} not, {len(unlisted)} of them not listed")
    print(*(f"listed as equivalent, but killed or gone:\n{text}" for text in wrong), sep="\n")
    return int((score < PASS_MARK and len(results) >= COUNTED_FROM) or bool(unlisted) or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
