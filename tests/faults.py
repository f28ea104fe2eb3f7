"""Faults of a disk and ends of a process, at each call that changes a folder.

`python -m tests.faults` is a process that starts no JAX backend, so that it can fork one that is killed within
milliseconds, again and again.
"""

import builtins
import contextlib
import dataclasses
import faulthandler
import functools
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import weights as weight_files
from seq2seq import checkpoints
from seq2seq.runs import Run

_PATHS = ("mkdir", "rename", "replace", "remove", "unlink", "rmdir", "link", "symlink", "truncate", "chmod", "utime")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Call(NamedTuple):
    """`write` is met when one half of the text is written."""

    number: int
    name: str
    path: str  # below the folder


class Watch:
    """The calls by which Python, in any thread, changes a folder or forces it to the disk; `before` each is told of."""

    def __init__(self, folder: Path, before: Callable[[Call], object]):
        self.folder, self.before = os.path.realpath(folder), before
        self.calls: list[Call] = []
        self.resting = 0
        self._lock = threading.Lock()

    def note(self, name: str, path: Any, dir_fd: int | None = None) -> None:
        if isinstance(path, int):
            place = os.readlink(f"/proc/self/fd/{path}")
        else:
            above = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            place = os.path.abspath(os.path.join(above, os.fspath(path)))
        if self.resting or not place.startswith(self.folder):
            return
        with self._lock:
            call = Call(len(self.calls), name, os.path.relpath(place, self.folder))
            self.calls.append(call)
        self.before(call)

    @contextlib.contextmanager
    def rest(self) -> Iterator[None]:
        """Nothing is noted."""
        self.resting += 1
        try:
            yield
        finally:
            self.resting -= 1


@contextlib.contextmanager
def watch(folder: Path, before: Callable[[Call], object] = lambda call: None) -> Iterator[Watch]:
    """`before` may raise OSError, or end the process."""
    watched, undo = Watch(folder, before), contextlib.ExitStack()

    def replace(module: Any, name: str, new: Callable) -> None:
        undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, new)

    def by_path(name: str, original: Callable) -> Callable:
        @functools.wraps(original)
        def call(path, *args, **kwargs):
            watched.note(name, path, kwargs.get("dir_fd", kwargs.get("src_dir_fd")))
            return original(path, *args, **kwargs)

        return call

    def opened(original: Callable) -> Callable:
        @functools.wraps(original)
        def call(file, mode="r", *args, **kwargs):
            writes = set("wax+") & set(mode)
            if writes and not isinstance(file, int):
                watched.note("open", file)
            result = original(file, mode, *args, **kwargs)
            if writes:
                result.write = functools.partial(halves, result, result.write)
            return result

        return call

    def halves(file, write, data):
        write(data[: len(data) // 2])
        file.flush()
        watched.note("write", file.fileno())
        write(data[len(data) // 2 :])
        return len(data)

    def os_open(path, flags, *args, original=os.open, **kwargs):
        if flags & _WRITING:
            watched.note("open", path, kwargs.get("dir_fd"))
        return original(path, flags, *args, **kwargs)

    with undo:
        for name in _PATHS:
            replace(os, name, by_path(name, getattr(os, name)))
        for name in ("fsync", "fdatasync", "ftruncate", "write"):
            replace(os, name, by_path(name, getattr(os, name)))
        replace(os, "open", os_open)
        replace(io, "open", opened(io.open))
        replace(builtins, "open", opened(builtins.open))
        yield watched


class Disk:
    """What a power cut may leave of a folder: what was forced to the disk, and any part of what was not.

    Files and folders are known by their inodes; of each either what it was when it was last forced is left, or what it
    is now.
    """

    def __init__(self, root: Path):
        self.root = root
        self.forced: dict[int, Any] = {}  # the bytes of a file, or of a folder the name, inode and kind of each entry
        self.held: list[int] = []  # open, so that no number is given twice
        self.forcing: Path | None = None
        for path in [root, *root.rglob("*")]:
            self._force(path)

    def before(self, call: Call) -> None:
        """To be told of every call."""
        self.done()
        if call.name == "fsync":
            self.forcing = Path(os.path.normpath(self.root / call.path))

    def done(self) -> None:
        """The last call has been made."""
        if self.forcing:
            self._force(self.forcing)
        self.forcing = None

    def trees(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Nested {name: bytes or tree}: of what was not forced nothing is left, all, one folder, all but it, some."""
        now = {path.stat().st_ino: self._content(path) for path in [self.root, *self.root.rglob("*")]}
        known = now | self.forced
        changed = [inode for inode in known if now.get(inode) != self.forced.get(inode)]
        folders = [inode for inode in changed if isinstance(known[inode], frozenset)]
        chosen = [set(), set(changed), *({inode} for inode in folders), *(set(changed) - {inode} for inode in folders)]
        chosen += [{inode for inode in changed if rng.random() < 0.5} for _ in range(5)]
        for new in chosen:
            yield self._tree(self.root.stat().st_ino, True, new, now)

    def forced_tree(self) -> dict[str, Any]:
        """What is sure to be there."""
        return self._tree(self.root.stat().st_ino, True, set(), {})

    def close(self) -> None:
        for descriptor in self.held:
            os.close(descriptor)

    def _force(self, path: Path) -> None:
        self.forced[path.stat().st_ino] = self._content(path)

    def _content(self, path: Path) -> Any:
        self.held.append(os.open(path, os.O_RDONLY))
        if not path.is_dir():
            return path.read_bytes()
        return frozenset((entry.name, entry.inode(), entry.is_dir()) for entry in os.scandir(path))

    def _tree(self, inode: int, is_folder: bool, new: set[int], now: dict[int, Any]) -> Any:
        if not is_folder:
            content = self.forced.get(inode, b"")
            return now.get(inode, content) if inode in new else content  # a file that was removed keeps what was in it
        entries = (now if inode in new else self.forced).get(inode, frozenset())
        return {name: self._tree(found, folder, new, now) for name, found, folder in sorted(entries)}


def write_tree(folder: Path, tree: dict[str, Any]) -> None:
    """The files of such a tree."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(folder / name, content)
        else:
            (folder / name).write_bytes(content)


LOSSES = {1: 0.5, 2: 1.0, 3: 0.25, 4: 0.125}
"""Of the steps that are saved here: a run that keeps one beside the latest has 1 and 2, and then 3 alone."""


def about(step: int) -> dict[str, float]:
    """What is said beside the arrays."""
    return {"validation_loss": LOSSES[step]}


def state(step: int) -> dict[str, dict[str, Any]]:
    """Other numbers for every step."""
    rng = np.random.default_rng(step)
    return {
        "weights": {
            "a.kernel": rng.standard_normal((3, 4)).astype("float32"),
            "b": rng.standard_normal(2).astype("float16"),
        },
        "optimizer": {"0.count": np.int32(step), "0.mu": rng.standard_normal(5).astype("float32")},
    }


@contextlib.contextmanager
def arrays_at_hand(folder: Path | None, watched: Watch | None = None) -> Iterator[None]:
    """Instead of Orbax a copy of what it wrote, if there is one, which is fast, and whose calls are not noted."""
    original = checkpoints._write_arrays

    def copy(path: Path, _: Any) -> None:
        with watched.rest() if watched else contextlib.nullcontext():
            shutil.copytree(str(folder), path)

    checkpoints._write_arrays = copy if folder else original
    try:
        yield
    finally:
        checkpoints._write_arrays = original


# what a forked process does


def save(folder: str, step: int, at: int | None, how: str, arrays: str | None) -> list[Call]:
    """The checkpoint of a step; at that call, or for None at all, this process is killed or stops."""

    def before(call: Call) -> None:
        if at in (call.number, None) and how:
            os.kill(os.getpid(), signal.Signals[how])

    run, hand = Run.open(Path(folder)), Path(arrays) if arrays else None
    with run.training(), watch(run.folder, before) as watched, arrays_at_hand(hand, watched):
        run.save(step, state(step), about(step))
    return watched.calls


def save_within(folder: str, step: int, limit: int, deadly: bool) -> str:
    """No file may become longer than the limit; whoever tries, in C++ too, gets an error or is killed half-way."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    run = Run.open(Path(folder))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        run.save(step, state(step), about(step))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def collect(folder: str, at: int | None) -> list[Call]:
    """What a crash has left is removed; at that call this process is killed."""
    run, before = Run.open(Path(folder)), lambda call: call.number == at and os.kill(os.getpid(), signal.SIGKILL)
    with watch(run.folder, before) as watched, run.training():
        pass
    return watched.calls


def save_weights(path: str, step: int, at: int | None) -> list[Call]:
    """A file of weights over another; at that call this process is killed."""
    before = lambda call: call.number == at and os.kill(os.getpid(), signal.SIGKILL)
    with watch(Path(path).parent, before) as watched:
        weight_files.save(path, state(step)["optimizer"], metadata={"step": str(step)})
    return watched.calls


def audit(folder: str, step: int) -> tuple[list[str], list[str]]:
    """What a save by Orbax calls, as watched here, and as Python's own audit reports it."""
    seen, on = [], threading.Event()

    def hook(event: str, args: tuple) -> None:
        if not on.is_set():
            return
        if event == "open" and (args[2] & _WRITING):
            seen.append(("open", args[0]))
        elif event in {f"os.{name}" for name in _PATHS}:
            seen.append((event.removeprefix("os."), args[0]))

    run = Run.open(Path(folder))
    sys.addaudithook(hook)
    with watch(Path(folder)) as watched:
        on.set()
        run.save(step, state(step), about(step))
        on.clear()
    below = sorted(f"{name} {Path(os.fsdecode(path)).name}" for name, path in seen if not isinstance(path, int))
    noted = [call for call in watched.calls if call.name not in ("write", "fsync")]
    named = {"unlink": "remove", "replace": "rename"}  # as the audit has it
    return sorted(f"{named.get(call.name, call.name)} {Path(call.path).name}" for call in noted), below


_JOBS = {job.__name__: job for job in (save, save_within, collect, save_weights, audit)}


def _serve() -> None:
    child, pipe = 0, -1
    for line in sys.stdin:
        request = json.loads(line)
        if request["job"] == "signal":
            os.kill(child, request["number"])
            if request["after"] is not None:
                time.sleep(request["after"])
                os.kill(child, signal.SIGKILL)
        else:
            pipe, end = os.pipe()
            child = os.fork()
            if child == 0:
                _work(end, _JOBS[request.pop("job")], request)
            os.close(end)
        answer: dict[str, Any] = {}
        while not answer:
            _, status = os.waitpid(child, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                answer = {"stopped": True}
            else:
                with open(pipe) as file:
                    said = file.read()
                answer = {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else json.loads(said)
        print(json.dumps(answer), flush=True)


def _work(end: int, job: Callable, arguments: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(60, exit=True)  # rather than wait for ever
    try:
        answer = {"result": job(**arguments)}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    os.write(end, json.dumps(answer).encode())
    os._exit(0)


@dataclasses.dataclass
class Forks:
    """Processes that do a job each, one at a time."""

    process: subprocess.Popen[str]

    def ask(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Its `result`, or the `signal` that has ended it, or that it has `stopped`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"job": job, **arguments}), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def send(self, number: int, *, kill_after: float | None = None) -> dict[str, Any]:
        """A signal to the process that has stopped."""
        return self.ask("signal", number=number, after=kill_after)


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    """Started once: what takes long are the imports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Forks(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


if __name__ == "__main__":
    _serve()
