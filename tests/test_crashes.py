"""A save that fails, is killed or loses power at any of its calls costs nothing that was saved before."""

import builtins
import collections
import ctypes
import errno
import io
import itertools
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from core import weights as weight_files
from core.config import TransformerConfig
from seq2seq import checkpoints, manifest
from seq2seq.errors import CheckpointError, UserError
from seq2seq.options import TrainingOptions
from seq2seq.runs import Run, losses
from seq2seq.training import _noted
from tests import faults
from tests.faults import Call, Disk, about, arrays_at_hand, state, watch, write_tree
from tests.frontends import same_bits

CONFIG = TransformerConfig(source_vocab_size=5, target_vocab_size=5, d_model=4, num_heads=1, d_ff=4)
ORBAX = "arrays.orbax-checkpoint-tmp"  # what it writes to, until it is done


def new_run(folder):
    return Run.create(folder, task="copy", frontend="nnx", config=CONFIG, options=TrainingOptions(keep=1))


@pytest.fixture(scope="module")
def shelf():
    """In memory where there is such a place: it is the calls that count here, and not how fast the disk is."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def begun(shelf):
    """A run whose latest state is that of step 2, and whose best is that of step 1."""
    run = new_run(shelf / "begun")
    for step in (1, 2):
        run.save(step, state(step), about(step))
    return run.folder


@pytest.fixture(scope="module")
def arrays(shelf):
    """What Orbax writes of steps 3 and 4, by step."""
    for step in (3, 4):
        checkpoints.save(shelf / "arrays", step, state(step), about(step))
    return {step: shelf / "arrays" / f"{step:08}" / "arrays" for step in (3, 4)}


@pytest.fixture(scope="module")
def forks():
    with faults.forks() as started:
        yield started


@pytest.fixture
def copies(begun, shelf):
    """Copies of the run, one after the other."""
    numbers = itertools.count()

    def copy():
        shutil.rmtree(shelf / "copies", ignore_errors=True)
        return Path(shutil.copytree(begun, shelf / "copies" / str(next(numbers))))

    return copy


@pytest.fixture(scope="module")
def calls(begun, shelf, arrays):
    """Of a whole save: with Orbax, and with its arrays at hand."""
    found = []
    for number, at_hand in enumerate((False, True)):
        run = Run.open(Path(shutil.copytree(begun, shelf / f"counted{number}")))
        with watch(run.folder) as watched:
            save(run, arrays[3] if at_hand else None, watched)
        found.append(watched.calls)
    return found


def save(run, arrays, watched=None, step=3):
    with arrays_at_hand(arrays, watched):
        run.save(step, state(step), about(step))


def is_state(found, step):
    assert found.about == {"format": 1, "step": step, **about(step)}
    return same_bits(found.arrays, state(step))


def names(run):
    return sorted(path.name for path in run.checkpoint_folder.iterdir())


def surviving(folder, arrays):
    """The step of the state that is left: whole; what else is left is collected; and the next save works."""
    run = Run.open(folder)
    left = checkpoints.steps(run.checkpoint_folder)
    found = run.latest()
    step = found.about["step"]
    assert step in (2, 3)
    assert is_state(found, step)
    assert left in ([1, 2], [1, 2, 3], [1, 3], [2, 3], [3])
    assert losses(run.checkpoint_folder) == {step: faults.LOSSES[step] for step in left}
    with run.training():
        assert names(run) == [f"{step:08}" for step in left]
        for old in left:
            manifest.verify(run.checkpoint_folder / f"{old:08}")
        save(run, arrays[4], step=4)
    assert names(run) == ["00000004"]
    manifest.verify(run.checkpoint_folder / "00000004")
    return step


def at_every_call(calls):
    """Whether the arrays are at hand, and the call: those of Orbax with Orbax, the others without, which is fast."""
    by_orbax, without = calls
    yield from ((False, call) for call in by_orbax if ORBAX in call.path)
    yield from ((True, call) for call in without)


def test_a_save_is_watched_in_every_call_that_python_makes(forks, copies):
    """Python's own audit of the process sees no other."""
    watched, audited = forks.ask("audit", folder=str(copies()), step=3)["result"]
    assert watched == audited
    assert len(watched) > 40


def test_the_faults_meet_every_kind_of_call(calls):
    by_orbax, without = calls
    assert {call.name for call in without} == {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"}
    assert {call.name for call in by_orbax if ORBAX in call.path} == {"mkdir", "open", "write", "rename", "remove"}
    written = [Path(call.path).name for call in without if call.name == "write"]
    assert written == ["about.json", "manifest.json"]


def test_killed_at_any_call_a_save_leaves_the_old_state_or_the_new(forks, copies, arrays, calls):
    steps = []
    for at_hand, call in at_every_call(calls):
        folder = copies()
        hand = str(arrays[3]) if at_hand else None
        answer = forks.ask("save", folder=str(folder), step=3, at=call.number, how="SIGKILL", arrays=hand)
        assert answer == {"signal": 9}
        steps.append(surviving(folder, arrays))
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_call_is_one_error_and_leaves_the_old_state_or_the_new(number, copies, arrays, calls):
    refused = collections.Counter()
    for at_hand, call in at_every_call(calls):
        run = Run.open(copies())

        def before(made, at=call.number):
            if made.number == at:
                raise OSError(number, os.strerror(number))

        with watch(run.folder, before) as watched:
            try:
                save(run, arrays[3] if at_hand else None, watched)
            except CheckpointError as error:
                refused[call.name] += 1
                assert os.strerror(number) in str(error)  # noqa: PT017
                assert "; what was there stays" in str(error) or "cannot be removed" in str(error)  # noqa: PT017
            else:
                assert is_state(run.latest(), 3)
        surviving(run.folder, arrays)
    assert refused.keys() >= {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"}


def test_a_save_that_fails_leaves_no_thread_behind_that_would_keep_the_process(copies):
    run, before = Run.open(copies()), threading.enumerate()

    def no_folder(call):
        if call.name == "mkdir" and ORBAX in call.path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with watch(run.folder, no_folder), pytest.raises(CheckpointError, match="No space left on device"):
        save(run, None)
    left = set(threading.enumerate()) - set(before)
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)


@pytest.mark.parametrize("deadly", [False, True], ids=["fails", "kills"])
def test_a_write_that_stops_half_way_in_any_file_leaves_the_old_state(deadly, forks, copies, arrays):
    """By a limit on the length of files, which meets Orbax's writers in C++ too; those share it out as they like."""
    whole = [path.stat().st_size for path in arrays[3].parent.rglob("*") if path.is_file()]
    steps = []
    for limit in sorted({size - 1 for size in whole} | {0, 2 * sum(whole)}):
        folder = copies()
        answer = forks.ask("save_within", folder=str(folder), step=3, limit=limit, deadly=deadly)
        steps.append(surviving(folder, arrays))
        if steps[-1] == 3:
            assert answer == {"result": ""}
        elif deadly:
            assert answer == {"signal": signal.SIGXFSZ}
        else:
            assert answer["result"].startswith("CheckpointError: ")
            assert answer["result"].endswith("; what was there stays")
    assert set(steps) == {2, 3}
    assert steps.count(2) >= 8


def test_killed_after_any_time_a_save_leaves_the_old_state_or_the_new(forks, copies, arrays):
    rng, answers = np.random.default_rng(0), []
    for delay in rng.uniform(0, 0.12, 15):
        folder = copies()
        forks.ask("save", folder=str(folder), step=3, at=0, how="SIGSTOP", arrays=None)
        answers.append(forks.send(signal.SIGCONT, kill_after=delay))
        surviving(folder, arrays)
    assert {"signal": 9} in answers


def test_a_power_cut_at_any_call_leaves_the_old_state_or_the_new(begun, shelf, arrays):
    """Of what was not forced to the disk any part may be missing, in any order."""
    root = shelf / "powered"
    root.mkdir()
    run = Run.open(Path(shutil.copytree(begun, root / "run")))
    disk, rng, trees = Disk(root), np.random.default_rng(0), {}

    def photograph():
        for tree in disk.trees(rng):
            found = tree["run"]["checkpoints"]
            tree["run"]["checkpoints"] = {name: found[name] for name in found if not name.startswith(".")}
            trees[repr(tree)] = tree

    def before(call):
        disk.before(call)
        photograph()

    with watch(root, before) as watched:
        save(run, arrays[3], watched)
    disk.done()
    photograph()
    steps = set()
    for number, tree in enumerate(trees.values()):
        write_tree(shelf / f"cut{number}", tree)
        left = Run.open(shelf / f"cut{number}" / "run").checkpoint_folder
        for step in checkpoints.steps(left):
            manifest.verify(left / f"{step:08}")
        assert checkpoints.steps(left) in ([1, 2], [1, 2, 3], [2, 3], [3])
        steps.add(max(checkpoints.steps(left)))
        shutil.rmtree(shelf / f"cut{number}")
    assert steps == {2, 3}
    assert max(tree_steps(disk.forced_tree())) == 3
    disk.close()


def tree_steps(tree):
    return [int(name) for name in tree["run"]["checkpoints"] if name.isdecimal()]


def test_what_was_saved_survives_a_power_cut_from_the_first_checkpoint_on(shelf, arrays):
    """And so does the description of the run, without which it could not be used."""
    root = shelf / "new"
    root.mkdir()
    disk = Disk(root)
    with watch(root, disk.before) as watched:
        run = new_run(root / "deep" / "run")
        save(run, arrays[3], watched)
    disk.done()
    write_tree(shelf / "later", disk.forced_tree())
    later = Run.open(shelf / "later" / "deep" / "run")
    assert later.config == CONFIG
    assert is_state(later.latest(), 3)
    disk.close()


def test_killed_while_it_collects_what_a_crash_has_left_a_writer_leaves_the_rest_to_the_next(forks, copies, arrays):
    def crashed():
        folder = copies()
        found = folder / "checkpoints"
        shutil.copytree(found / "00000001", found / ".00000000.99.old")
        shutil.copytree(found / "00000002", found / ".00000003.99.tmp")
        return folder

    number = len(forks.ask("collect", folder=str(crashed()), at=None)["result"])
    for at in range(number):
        folder = crashed()
        assert forks.ask("collect", folder=str(folder), at=at) == {"signal": 9}
        assert surviving(folder, arrays) == 2
    assert number > 30


def test_what_a_user_has_put_beside_the_checkpoints_is_not_collected(copies):
    run = Run.open(copies())
    (run.checkpoint_folder / ".DS_Store").write_text("mine")
    with run.training():
        pass
    assert names(run) == [".DS_Store", "00000001", "00000002"]


def test_a_save_that_gets_sigterm_at_any_call_is_finished(copies, arrays, calls):
    for call in calls[1]:
        run = Run.open(copies())
        with _noted(signal.SIGTERM) as came, watch(run.folder, terminated_at(call)) as watched:
            save(run, arrays[3], watched)
        assert came == [signal.SIGTERM]
        assert names(run) == ["00000003"]
    assert is_state(run.latest(), 3)


def test_a_save_that_gets_sigterm_twice_at_any_call_leaves_the_old_state_or_the_new(copies, arrays, calls):
    steps = set()
    for call in calls[1]:
        run = Run.open(copies())
        before = terminated_at(call, times=2)
        with _noted(signal.SIGTERM), watch(run.folder, before) as watched, pytest.raises(KeyboardInterrupt):
            save(run, arrays[3], watched)
        steps.add(surviving(run.folder, arrays))
    assert steps == {2, 3}


def terminated_at(call, times=1):
    def before(made):
        if made.number == call.number:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)

    return before


def test_a_reader_finds_a_whole_state_at_every_call_of_a_writer(forks, copies):
    folder = copies()
    run, steps, bests = Run.open(folder), [], []
    answer = forks.ask("save", folder=str(folder), step=3, at=None, how="SIGSTOP", arrays=None)
    while answer == {"stopped": True}:
        found, best = run.latest(), run.best()
        assert is_state(found, found.about["step"])
        assert is_state(best, best.about["step"])
        steps.append(found.about["step"])
        bests.append(best.about["step"])
        answer = forks.send(signal.SIGCONT)
    assert 60 < len(steps) <= len(answer["result"])  # when one stops, so does another of Orbax's that is made with it
    assert steps == sorted(steps)
    assert (set(steps), set(bests)) == ({2, 3}, {1, 3})


@pytest.mark.parametrize("read", [Run.latest, Run.best])
def test_a_reader_whose_checkpoint_is_removed_under_it_reads_the_newer_one(read, copies, arrays, monkeypatch):
    """At any of the reader's calls a writer saves, and removes all that was there."""
    steps = []
    for at in itertools.count():
        run, numbers = Run.open(copies()), itertools.count()

        def meeting(original, run=run, numbers=numbers, at=at):
            def call(place, *args, **kwargs):
                if str(place).startswith(str(run.folder)) and next(numbers) == at:
                    save(run, arrays[3])
                return original(place, *args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "listdir"), (os, "scandir"), (io, "open"), (builtins, "open")):
                patch.setattr(module, name, meeting(getattr(module, name)))
            found = read(run)
        steps.append(found.about["step"])
        assert is_state(found, steps[-1])
        if next(numbers) <= at:
            break
    assert len(steps) > 20
    assert set(steps) == {3, 2 if read is Run.latest else 1}


def test_two_processes_do_not_write_to_one_run(forks, copies, arrays):
    """The second is refused, and touches nothing of the first; when that is killed it may go on."""
    folder = copies()
    run = Run.open(folder)
    forks.ask("save", folder=str(folder), step=3, at=30, how="SIGSTOP", arrays=None)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="is being trained by another process; wait for it, or stop it"), run.training():
        pass
    assert sorted(folder.rglob("*")) == before
    assert forks.send(signal.SIGKILL) == {"signal": 9}
    assert surviving(folder, arrays) == 2


@pytest.fixture
def mere_user():
    """Runs a function as one whom permissions bind, which they do not the administrator."""

    def run(function):
        answers = []

        def work():
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert os.geteuid() != 0 or ctypes.CDLL(None).capset(header, none) == 0  # of this thread alone
            try:
                answers.append(function())
            except Exception as error:
                answers.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return answers[0]

    return run


def test_a_folder_that_may_only_be_read_is_read_and_not_written(copies, mere_user):
    folder = copies()
    run = Run.open(folder)
    for path in [*folder.rglob("*"), folder, folder.parent]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def train():
        with run.training():
            pass

    tried = [
        (train, "cannot be written: Permission denied; make it writable"),
        (lambda: run.save(3, state(3), about(3)), "cannot be written: Permission denied; what was there stays"),
        (lambda: checkpoints.remove(run.checkpoint_folder, 1), "cannot be removed: Permission denied; the others stay"),
        (lambda: new_run(folder.parent / "other"), "cannot be made: Permission denied; give another --run"),
    ]
    try:
        for function, message in tried:
            error = mere_user(function)
            assert isinstance(error, UserError)
            assert message in str(error)
        assert is_state(mere_user(run.latest), 2)
    finally:
        for path in [folder.parent, folder, *folder.rglob("*")]:
            path.chmod(0o755)
    assert names(run) == ["00000001", "00000002"]


def test_checkpoints_that_may_not_be_read_are_not_taken_for_none(copies, mere_user):
    """To begin anew would be to lose them."""
    run = Run.open(copies())
    run.checkpoint_folder.chmod(0)
    error = mere_user(run.latest)
    run.checkpoint_folder.chmod(0o755)
    assert isinstance(error, CheckpointError)
    assert "cannot be read: Permission denied; make it readable" in str(error)


def test_a_damaged_latest_state_is_named_with_its_remedy_and_no_older_one_is_used_in_silence(copies):
    run = Run.open(copies())
    newest = run.checkpoint_folder / "00000002"
    for damage in (lambda: (newest / "manifest.json").unlink(), lambda: shutil.rmtree(newest), newest.touch):
        damage()
        if newest.exists():
            with pytest.raises(CheckpointError, match=r"00000002 .*; remove the folder to use another"):
                run.latest()
    newest.unlink()
    assert is_state(run.latest(), 1)


def test_a_file_of_weights_is_the_old_or_the_new_after_any_kill(forks, shelf):
    folder = shelf / "files"
    folder.mkdir()
    path = folder / "w"
    steps = []
    number = len(forks.ask("save_weights", path=str(path), step=2, at=None)["result"])
    for at in range(number):
        weight_files.save(path, state(2)["optimizer"], metadata={"step": "2"})
        assert forks.ask("save_weights", path=str(path), step=3, at=at) == {"signal": 9}
        step = int(weight_files.metadata(path)["step"])
        assert same_bits(weight_files.load(path), state(step)["optimizer"])
        steps.append(step)
    assert steps == [2] * (number - 1) + [3]
    assert number == 6


def test_a_file_of_weights_is_the_old_or_the_new_after_a_power_cut_at_any_call(shelf):
    root, seen = shelf / "cut file", []
    root.mkdir()
    weight_files.save(root / "w", state(2)["optimizer"], metadata={"step": "2"})
    disk, rng = Disk(root), np.random.default_rng(0)

    def look():
        for tree in disk.trees(rng):
            (shelf / "one").write_bytes(tree["w"])
            seen.append(weight_files.metadata(shelf / "one")["step"])

    def before(call: Call):
        disk.before(call)
        look()

    with watch(root, before):
        weight_files.save(root / "w", state(3)["optimizer"], metadata={"step": "3"})
    disk.done()
    look()
    assert set(seen) == {"2", "3"}
    assert seen[-1] == "3"
    disk.close()


def test_a_disk_that_fails_at_any_call_leaves_the_file_of_weights(shelf):
    folder = shelf / "failing"
    folder.mkdir()
    for at in range(6):
        weight_files.save(folder / "w", state(2)["optimizer"], metadata={"step": "2"})

        def before(call, at=at):
            if call.number == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with watch(folder, before), pytest.raises(OSError, match="Input/output error"):
            weight_files.save(folder / "w", state(3)["optimizer"], metadata={"step": "3"})
        assert weight_files.metadata(folder / "w")["step"] == ("3" if at == 5 else "2")
        assert [path.name for path in folder.iterdir()] == ["w"]
