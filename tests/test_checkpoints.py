"""Checkpoints are whole or not there: every damage is refused, every crash leaves the last complete one."""

import json
import os
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seq2seq import checkpoints, manifest
from seq2seq.errors import CheckpointError
from tests.frontends import same_bits

ARRAYS = {
    "weights": {
        "a.kernel": jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32),
        "b.half": jnp.asarray([1.5, -0.0, np.inf], ml_dtypes.bfloat16),
    },
    "optimizer": {"0.count": jnp.int32(7), "0.found": jnp.asarray([True, False])},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    checkpoints.save(folder, 12, ARRAYS, {"validation_loss": 1.5})
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copied")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_is_loaded_in_every_bit(whole):
    found = checkpoints.load(whole, 12)
    assert found.about == {"format": 1, "step": 12, "validation_loss": 1.5}
    assert found.arrays.keys() == ARRAYS.keys()
    for group, named in ARRAYS.items():
        assert found.arrays[group].keys() == named.keys()
        for name, array in named.items():
            assert same_bits(array, found.arrays[group][name])
            assert array.dtype == found.arrays[group][name].dtype
    assert checkpoints.steps(whole) == [12]


def test_a_changed_bit_of_any_byte_of_any_file_is_refused(copied):
    """Every file; of large ones some bytes."""
    for path in files(copied):
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 7)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"is damaged: .* has changed|cannot be read|is damaged: "):
                checkpoints.load(copied, 12)
        path.write_bytes(content)
    checkpoints.load(copied, 12)


@pytest.mark.parametrize("damage", ["truncated", "longer", "missing", "swapped", "linked", "extra"])
def test_files_that_are_not_those_that_were_written_are_refused(damage, copied):
    first, second = sorted(files(copied / "00000012" / "arrays"), key=lambda path: path.stat().st_size)[-2:]
    content = first.read_bytes()
    if damage == "truncated":
        first.write_bytes(content[:-1])
    elif damage == "longer":
        first.write_bytes(content + b"\0")
    elif damage == "missing":
        first.unlink()
    elif damage == "swapped":
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif damage == "linked":
        moved = first.rename(copied / "elsewhere")
        first.symlink_to(moved)
    else:
        (first.parent / "more").write_bytes(b"")
    what = {"missing": "is missing", "extra": "does not belong there"}.get(damage, "has changed")
    with pytest.raises(
        CheckpointError, match=f"00000012 is damaged: arrays/.* {what}; remove the folder to use another"
    ):
        checkpoints.load(copied, 12)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"arrays/x": "0"}', "null"])
def test_a_manifest_that_says_something_else_is_refused(content, copied):
    (copied / "00000012" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"is not whole|is damaged"):
        checkpoints.load(copied, 12)


def test_a_format_of_the_future_is_refused(copied):
    about = copied / "00000012" / "about.json"
    about.write_text(json.dumps({"format": 99}))
    manifest.seal(copied / "00000012")
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1; update isoformer"):
        checkpoints.load(copied, 12)


def test_a_step_is_saved_once(copied):
    before = {path: path.read_bytes() for path in files(copied)}
    with pytest.raises(CheckpointError, match="is already there; a step is saved once"):
        checkpoints.save(copied, 12, ARRAYS, {})
    assert {path: path.read_bytes() for path in files(copied)} == before


def test_what_a_crash_leaves_is_not_read_and_is_collected(copied):
    shutil.copytree(copied / "00000012", copied / ".00000013.99.tmp")
    shutil.copytree(copied / "00000012", copied / ".00000011.99.old")
    assert checkpoints.steps(copied) == [12]
    checkpoints.collect(copied)
    assert [path.name for path in copied.iterdir()] == ["00000012"]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_disk_that_fails_costs_nothing_that_was_there(call, copied, monkeypatch):
    def failing(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else ("pathlib.Path." + call,)), failing)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device; what was there stays"):
        checkpoints.save(copied, 13, ARRAYS, {})
    monkeypatch.undo()
    assert [path.name for path in copied.iterdir()] == ["00000012"]
    checkpoints.load(copied, 12)


def test_a_removed_checkpoint_is_gone_as_a_whole(copied):
    checkpoints.remove(copied, 12)
    assert list(copied.iterdir()) == []
