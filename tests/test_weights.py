"""Laws of the weight file: every bit comes back, and no broken file is read."""

import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from core.weights import check_weights, dotted, load, owned, save
from tests.strategies import seeds

DTYPES = ["float32", "bfloat16", "float16", "int8", "int32", "uint8", "uint16", "uint32", "bool"]
SHAPES = [(), (3,), (2, 3, 5), (0,), (2, 0, 3), (1, 1)]


def raw(array):
    """dtype, shape and bits."""
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()


def random_bits(dtype, shape, seed):
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@given(st.sampled_from(DTYPES), st.sampled_from(SHAPES), seeds)
def test_every_bit_of_every_dtype_comes_back(folder, dtype, shape, seed):
    """Random bits have NaN payloads, subnormals and -0 among them."""
    array = random_bits(dtype, shape, seed)
    save(folder / "w", {"a.0.kernel": array, "jax": jnp.asarray(array), "other": random_bits("int32", (2,), seed)})
    back = load(folder / "w")
    assert set(back) == {"a.0.kernel", "jax", "other"}
    assert all(isinstance(x, jax.Array) for x in back.values())
    assert raw(back["a.0.kernel"]) == raw(back["jax"]) == raw(array)


def test_special_numbers_come_back(tmp_path):
    bits = np.array([0x80000000, 0x00000001, 0x7FC12345, 0xFF812345, 0x7F800000, 0xFF800000], "uint32")
    save(tmp_path / "w", {"x": bits.view("float32")})
    assert raw(load(tmp_path / "w")["x"]) == raw(bits.view("float32"))


LAYOUTS = {
    "F order": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "broadcast": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint16"])
def test_how_an_array_lies_in_memory_does_not_matter(layout, dtype, tmp_path):
    array = LAYOUTS[layout](random_bits(dtype, (3, 4), 0))
    save(tmp_path / "w", {"x": array})
    assert raw(load(tmp_path / "w")["x"]) == raw(np.array(array, dtype, order="C"))


def test_no_weights_come_back_as_none(tmp_path):
    save(tmp_path / "w", {})
    assert load(tmp_path / "w") == {}


def test_the_same_weights_make_the_same_file_in_any_order(tmp_path):
    a, b = random_bits("float32", (2, 3), 0), random_bits("int32", (4,), 1)
    save(tmp_path / "1", {"a": a, "b": b})
    save(str(tmp_path / "2"), {"b": b, "a": a})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_wide_numbers_come_back_wide(x64, tmp_path):
    wide = {"f": np.array([1e-300, 1 / 3]), "i": np.array([2**40 + 1, -(2**62)])}
    save(tmp_path / "w", wide)
    assert {name: raw(x) for name, x in load(tmp_path / "w").items()} == {name: raw(x) for name, x in wide.items()}


@pytest.mark.parametrize("wide", [np.array([1e-300, 1 / 3]), np.array([2**40 + 1])], ids=["float64", "int64"])
def test_wide_numbers_are_never_narrowed_without_a_word(wide, tmp_path):
    """Without x64 they cannot be jax arrays: refused, or given as they are."""
    save(tmp_path / "w", {"x": wide})
    try:
        back = load(tmp_path / "w")["x"]
    except ValueError as error:
        assert "x64" in str(error)  # noqa: PT017
    else:
        assert raw(back) == raw(wide)


def test_a_file_cut_anywhere_or_with_more_behind_it_is_refused(tmp_path):
    save(tmp_path / "whole", {"a": random_bits("float32", (2, 3), 0), "b": random_bits("bfloat16", (5,), 1)})
    whole = (tmp_path / "whole").read_bytes()
    for cut in [*(whole[:size] for size in range(len(whole))), whole + b"\0"]:
        (tmp_path / "cut").write_bytes(cut)
        with pytest.raises(ValueError, match="cut is not a whole safetensors file"):
            load(tmp_path / "cut")


@pytest.mark.parametrize("content", [b"PK\3\4 a zip", b"\x80\4pickle!!", bytes(64), b"\xff" * 64, b"{}"])
def test_another_kind_of_file_is_refused(content, tmp_path):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match="w is not a whole safetensors file"):
        load(tmp_path / "w")


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "safetensors.numpy.save"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    old, new = {"a": random_bits("float32", (2, 3), 0)}, {"a": random_bits("float32", (2, 3), 1)}
    save(tmp_path / "w", old)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "w", new)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    assert raw(load(tmp_path / "w")["a"]) == raw(old["a"])
    save(tmp_path / "w", new)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    assert raw(load(tmp_path / "w")["a"]) == raw(new["a"])


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "w", {"a": random_bits("float32", (2,), 0)})
    assert list(tmp_path.iterdir()) == []


def test_the_new_file_is_on_the_disk_before_it_takes_the_name_and_then_the_name_is(tmp_path, monkeypatch):
    calls = []
    fsync, replace, close = os.fsync, os.replace, os.close
    kind = lambda fd: "directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file {os.fstat(fd).st_size > 0}"
    monkeypatch.setattr("os.fsync", lambda fd: (calls.append(f"fsync {kind(fd)}"), fsync(fd)))
    monkeypatch.setattr("os.close", lambda fd: (calls.append(f"close {kind(fd)}"), close(fd)))
    monkeypatch.setattr(
        "os.replace", lambda a, b: (calls.append(f"replace {Path(a).parent == tmp_path}"), replace(a, b))
    )
    save(tmp_path / "w", {"a": random_bits("float32", (2,), 0)})
    assert calls == ["fsync file True", "replace True", "fsync directory", "close directory"]


def test_a_directory_that_cannot_be_written_through_is_closed(tmp_path, monkeypatch):
    """The new file has its name by then, so it stays."""
    calls, fsync, close = [], os.fsync, os.close

    def fail_once_replaced(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError("no such call on this disk")
        fsync(fd)

    monkeypatch.setattr("os.fsync", fail_once_replaced)
    monkeypatch.setattr("os.close", lambda fd: (calls.append(fd), close(fd)))
    with pytest.raises(OSError, match="no such call"):
        save(tmp_path / "w", {"a": random_bits("float32", (2,), 0)})
    monkeypatch.undo()
    assert len(calls) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """The temporary file was never there, and to remove it is no second error."""
    with pytest.raises(FileNotFoundError) as error:
        save(tmp_path / "none" / "w", {"a": random_bits("float32", (2,), 0)})
    assert error.value.__context__ is None


def test_the_name_of_the_metadata_is_refused_before_any_file_is_touched(tmp_path):
    with pytest.raises(ValueError, match="the name __metadata__ belongs to the safetensors format"):
        save(tmp_path / "w", {"a": random_bits("float32", (2,), 0), "__metadata__": random_bits("float32", (2,), 0)})
    assert list(tmp_path.iterdir()) == []


def test_an_owned_array_outlives_the_one_that_it_was_made_from():
    array = jnp.arange(3.0)
    mine = owned(array)
    array.delete()
    assert mine.tolist() == [0, 1, 2]
    assert owned(np.arange(3, dtype="int32")).tolist() == [0, 1, 2]
    buffer = np.arange(3, dtype="float32")
    mine, buffer[:] = owned(buffer), 7
    assert mine.tolist() == [0, 1, 2]


def test_owning_is_no_operation_inside_a_program():
    assert jax.make_jaxpr(owned)(jnp.arange(3.0)).eqns == []


@pytest.mark.parametrize(
    "bad", [np.array(["text"]), np.array([None]), np.array([1j])], ids=["text", "object", "complex"]
)
def test_what_the_format_cannot_hold_is_refused_before_any_file_is_touched(bad, tmp_path):
    save(tmp_path / "w", {"a": random_bits("float32", (2,), 0)})
    before = (tmp_path / "w").read_bytes()
    with pytest.raises((TypeError, ValueError, safetensors.SafetensorError), match=r"dtype|object"):
        save(tmp_path / "w", {"a": np.array(bad)})
    assert (tmp_path / "w").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_saved_file_may_be_read_by_whom_the_umask_allows(tmp_path):
    save(tmp_path / "w", {"a": random_bits("float32", (2,), 0)})
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "w").stat().st_mode == (tmp_path / "plain").stat().st_mode


EXPECTED = {"a.kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.int32)}


def fitting(**changes):
    weights = {"a.kernel": jnp.zeros((2, 3)), "b": jnp.int32(1)} | changes
    return {name: value for name, value in weights.items() if value is not None}


def test_weights_that_fit_pass_in_any_order():
    check_weights(fitting(), EXPECTED)
    check_weights(dict(reversed(fitting().items())), EXPECTED)


MISFITS = {
    "missing": ({"b": None}, [r"missing b int32\[\]"]),
    "extra": ({"c": jnp.zeros((1, 4))}, [r"extra c float32\[1, 4\]"]),
    "shape": ({"a.kernel": jnp.zeros((3, 2))}, [r"a\.kernel must be float32\[2, 3\], got float32\[3, 2\]"]),
    "dtype": ({"a.kernel": jnp.zeros((2, 3), jnp.bfloat16)}, [r"float32\[2, 3\], got bfloat16\[2, 3\]"]),
    "all": (
        {"b": None, "c": jnp.zeros(2), "a.kernel": jnp.zeros(6)},
        [r"missing b", r"extra c float32\[2\]", r"a\.kernel must be .* got float32\[6\]"],
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_one_error_lists_every_weight_that_does_not_fit(name):
    changes, messages = MISFITS[name]
    with pytest.raises(ValueError, match="weights and configuration do not belong together") as error:
        check_weights(fitting(**changes), EXPECTED)
    for message in messages:
        assert error.match(message)


def test_dotted_names_are_attribute_paths():
    tree = {"encoder": {"blocks": [{"kernel": 1}, {"kernel": 2}]}}
    names = [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert names == ["encoder.blocks.0.kernel", "encoder.blocks.1.kernel"]
