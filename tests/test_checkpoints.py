"""Checkpoints are whole or not there: every damage is refused, every crash leaves the last complete one."""

import ast
import gc
import json
import os
import shutil
import socket

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from core import weights
from seq2seq import checkpoints, manifest
from seq2seq.errors import CheckpointError
from seq2seq.runs import losses
from tests.conftest import ROOT
from tests.frontends import same_bits

GOLDEN = ROOT / "tests" / "golden"

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


# any damage


def refused(folder):
    """Before anything of it is used."""
    with pytest.raises(CheckpointError, match=r"(is damaged|is not whole).*; remove the folder to use another"):
        manifest.verify(folder)


@pytest.fixture
def sealed(tmp_path):
    """A folder as checkpoints are, of less than 1 KB."""
    folder = tmp_path / "sealed"
    (folder / "arrays").mkdir(parents=True)
    (folder / "about.json").write_text('{"format": 1}')
    (folder / "arrays" / "a").write_bytes(np.random.default_rng(0).bytes(40))
    (folder / "arrays" / "none").write_bytes(b"")
    manifest.seal(folder)
    return folder


def test_any_flipped_bit_any_byte_less_and_any_byte_more_is_refused(sealed):
    """All of them."""
    assert sum(path.stat().st_size for path in files(sealed)) > 300
    for path in files(sealed):
        content = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for place in range(8 * len(content)):
                byte = content[place // 8]
                os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place // 8)
                refused(sealed)
                os.pwrite(file.fileno(), bytes([byte]), place // 8)
            for more in range(256):
                os.pwrite(file.fileno(), bytes([more]), len(content))
                refused(sealed)
            for size in reversed(range(len(content))):
                file.truncate(size)
                refused(sealed)
            os.pwrite(file.fileno(), content, 0)
            file.truncate(len(content))
    manifest.verify(sealed)


def test_a_flipped_bit_in_any_part_of_a_checkpoint_is_refused(copied):
    for path in files(copied):
        content = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for place in range(0, len(content), 5):
                os.pwrite(file.fileno(), bytes([content[place] ^ 1 << place % 8]), place)
                refused(copied / "00000012")
                os.pwrite(file.fileno(), content[place : place + 1], place)
    checkpoints.load(copied, 12)


def link(path):
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def replaced_by(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def listen(path):
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(path.parent)  # the names of sockets are short
        listener.bind(path.name)
        os.chdir(before)


DAMAGES = {
    "link": link,
    "link to itself": replaced_by(lambda path: path.symlink_to(path)),
    "FIFO": replaced_by(os.mkfifo),
    "folder": replaced_by(os.mkdir),
    "socket": replaced_by(listen),
}


@pytest.mark.parametrize("name", ["manifest.json", "about.json", "arrays/_METADATA"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_file_is_refused_where_one_should_be_without_waiting(damage, name, copied):
    DAMAGES[damage](copied / "00000012" / name)
    refused(copied / "00000012")
    with pytest.raises(CheckpointError):
        checkpoints.load(copied, 12)
    if not name.startswith("arrays"):
        with pytest.raises(CheckpointError):
            checkpoints.about(copied, 12)


def test_a_link_is_refused_even_if_the_manifest_says_so(sealed):
    link(sealed / "arrays" / "a")
    path = sealed / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arrays/a": None}, indent=2) + "\n")
    refused(sealed)


MANIFESTS = {
    "deep": lambda text: "[" * 100_000 + "]" * 100_000,
    "deep and said twice": lambda text: text.replace("{", '{"a": ' + "[" * 900 + "]" * 900 + ",", 1),
    "a name twice": lambda text: text.replace("{", '{"about.json": "0",', 1),
    "in other words": lambda text: text.replace("about", "\\u0061bout"),
    "on one line": lambda text: json.dumps(json.loads(text)) + "\n",
    "in Latin 1": lambda text: text.replace("about", "\xe9bout"),
    "none": lambda text: "",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_not_as_it_was_written_is_refused(name, sealed):
    path = sealed / "manifest.json"
    path.write_bytes(MANIFESTS[name](path.read_text()).encode("latin-1"))
    refused(sealed)


def test_a_manifest_of_a_terabyte_is_refused_unread(sealed):
    os.truncate(sealed / "manifest.json", 1 << 40)
    refused(sealed)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": 1, "step": 11}, "is of step 11; give it the name that it had"),
        ({"format": 2, "step": 12}, "has format 2, this version reads 1; update isoformer"),
        ([1], r"has format \[1\], this version reads 1"),
        ("[" * 100_000, "about.json cannot be read: "),
        ("{", "about.json cannot be read: "),
    ],
)
def test_a_checkpoint_that_says_what_cannot_be_is_refused_though_its_seal_is_whole(said, message, copied):
    (copied / "00000012" / "about.json").write_text(said if isinstance(said, str) else json.dumps(said))
    manifest.seal(copied / "00000012")
    for read in (checkpoints.load, checkpoints.about):
        with pytest.raises(CheckpointError, match=message):
            read(copied, 12)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its other reads end when it has failed
def test_arrays_that_orbax_did_not_write_are_refused_though_their_seal_is_whole(copied):
    for name in ("_METADATA", "manifest.ocdbt"):
        path = copied / "00000012" / "arrays" / name
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)))
        manifest.seal(copied / "00000012")
        with pytest.raises(CheckpointError, match=r"the arrays of .*00000012 cannot be read: .*; remove the folder"):
            checkpoints.load(copied, 12)
        path.write_bytes(content)
    manifest.seal(copied / "00000012")
    checkpoints.load(copied, 12)
    gc.collect()  # so that they are warned of here


def test_a_loss_that_has_changed_chooses_no_checkpoint(copied):
    assert losses(copied) == {12: 1.5}
    about = copied / "00000012" / "about.json"
    about.write_text(about.read_text().replace("1.5", "0.5"))
    with pytest.raises(CheckpointError, match=r"is damaged: about.json has changed; remove the folder"):
        losses(copied)


def test_only_the_names_of_checkpoints_are_steps_but_all_of_them(copied):
    """A file in the place of the latest checkpoint is damage, and no reason to use an older one."""
    for name in ("1", "0000012", "000000012", "00000012x", "notes", "00000014.tmp"):
        (copied / name).mkdir()
    (copied / "00000013").write_text("a file")
    (copied / "123456789").mkdir()
    assert checkpoints.steps(copied) == [12, 13, 123456789]
    with pytest.raises(CheckpointError):
        checkpoints.load(copied, 13)


# what lasts


def test_checkpoints_of_every_past_format_load():
    """Those of format 1 as they were written in November 2026."""
    found = checkpoints.load(GOLDEN / "checkpoints-1", 12)
    assert found.about == {"format": 1, "step": 12, "validation_loss": 1.5}
    arrays = {name: array for group in found.arrays.values() for name, array in group.items()}
    assert {group: sorted(named) for group, named in found.arrays.items()} == {
        "weights": ["a.kernel", "b.half"],
        "optimizer": ["0.count", "0.found"],
    }
    are_golden(arrays)


@pytest.mark.parametrize("version", [0, 1])
def test_files_of_weights_of_every_past_format_load(version):
    """Those of format 0 have no digest."""
    path = GOLDEN / f"weights-{version}.safetensors"
    are_golden(weights.load(path))
    assert weights.metadata(path) == ({"step": "12", "task": "copy"} if version else {})


def are_golden(arrays):
    wanted = {
        "a.kernel": np.array([[-0.75, -0.5, -0.25], [0.0, 0.25, 0.5]], "float32"),
        "b.half": np.array([1.5, -0.0, np.inf], ml_dtypes.bfloat16),
        "0.count": np.int32(7),
        "0.found": np.array([True, False]),
    }
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert same_bits(arrays[name], array)


# no code in data

UNSAFE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", sorted((*ROOT.glob("core/*.py"), *ROOT.glob("*seq*/*.py"), *ROOT.glob("*_impl/*.py"))))
def test_no_file_is_read_that_could_bring_code_with_it(path):
    """Pickles do; NumPy reads none unless it is told to."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not UNSAFE & {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in UNSAFE
        elif isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"
        elif isinstance(node, ast.Constant):
            assert node.value not in UNSAFE
