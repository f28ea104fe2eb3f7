"""Runs of training: what is saved and loaded goes on as if it had never stopped."""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from conformance.adapters import Run
from conformance.law import law, require, same_bits

STEPS = 5


class Case(NamedTuple):
    """From which seed, and after how many steps it stops."""

    seed: int
    after: int


cases = lambda run: st.tuples(st.integers(0, 1000), st.integers(1, STEPS - 2))


def stopped(run, case: Case, folder: Path):
    """Saved into the folder after so many steps; the state goes on."""
    _, state = run(run.start(case.seed), case.after)
    run.save(folder, state)
    return state


def goes_on(run, state, case: Case, what: str) -> None:
    """The losses of the other steps are those of a run that never stopped."""
    whole, _ = run(run.start(case.seed), STEPS)
    require(np.isfinite(whole), f"the losses must be finite, got {whole}")
    rest, _ = run(state, STEPS - case.after)
    same_bits(rest, whole[case.after :], f"the losses of {what} after {case.after} steps")


@law(Run, cases=cases, max_examples=2)
def a_run_that_stops_goes_on_to_the_same_losses(run, case):
    """Its random numbers, optimizer, place in the data and ties come back, not its weights alone."""
    case = Case(*case)
    with run.context(), tempfile.TemporaryDirectory() as folder:
        stopped(run, case, Path(folder) / "saved")
        goes_on(run, run.load(Path(folder) / "saved"), case, "a run that was saved and loaded")


@law(Run, cases=cases, max_examples=1)
def saving_a_run_changes_nothing(run, case):
    case = Case(*case)
    with run.context(), tempfile.TemporaryDirectory() as folder:
        goes_on(run, stopped(run, case, Path(folder) / "saved"), case, "a run that was saved")


@law(Run, cases=cases, max_examples=1)
def a_copied_checkpoint_is_loaded_and_stays(run, case):
    """And the original is not asked for."""
    case = Case(*case)
    with run.context(), tempfile.TemporaryDirectory() as folder:
        saved, copied = Path(folder) / "saved", Path(folder) / "elsewhere" / "copied"
        stopped(run, case, saved)
        shutil.copytree(saved, copied)
        shutil.rmtree(saved)
        there = files(copied)
        goes_on(run, run.load(copied), case, "a run that was loaded from a copy")
        require(files(copied) == there, f"loading must leave all {len(there)} files of the copy as they were")


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
