"""Laws of the weight file: every bit comes back, and no broken file is read."""

import hashlib
import json
import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from core.weights import check_weights, dotted, fitted, is_stacked, load, metadata, owned, save, unstacked
from tests.frontends import CONFIG, FRONTENDS, random_weights, same_bits
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


SMALL = {"a": random_bits("float32", (2, 3), 0), "b": random_bits("bfloat16", (5,), 1), "c": np.array(True)}


def file_of(header, arrays=b""):
    """The bytes of a safetensors file; the header as text, or as what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + arrays


def test_any_flipped_bit_of_a_file_is_refused(tmp_path):
    """Every one: of the length, the header, its metadata, the digest itself, the padding and the arrays."""
    save(tmp_path / "whole", SMALL, metadata={"task": "copy"})
    whole = (tmp_path / "whole").read_bytes()
    assert 300 < len(whole) < 2048
    with (tmp_path / "whole").open("r+b", buffering=0) as file:
        for place in range(8 * len(whole)):
            byte = whole[place // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place // 8)
            with pytest.raises(ValueError, match=r"whole (is not a whole safetensors file|has changed since it was)"):
                load(tmp_path / "whole")
            os.pwrite(file.fileno(), bytes([byte]), place // 8)
    assert raw_all(load(tmp_path / "whole")) == raw_all(SMALL)


@pytest.mark.parametrize("read", [load, metadata])
def test_what_is_said_and_what_is_held_is_only_believed_of_a_whole_file(read, tmp_path):
    save(tmp_path / "w", SMALL, metadata={"task": "copy"})
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes().replace(b"copy", b"cope"))
    with pytest.raises(ValueError, match="has changed since it was written, its sha256 differs; get the file again"):
        read(tmp_path / "w")


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(tmp_path):
    """So that it can be checked without this program."""
    save(tmp_path / "w", SMALL, metadata={"zeros": "0" * 64})
    data = (tmp_path / "w").read_bytes()
    with safetensors.safe_open(tmp_path / "w", framework="numpy") as file:
        digest = file.metadata()["isoformer.sha256"]
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert metadata(tmp_path / "w") == {"zeros": "0" * 64}


@given(st.dictionaries(st.text(max_size=5), st.text(), max_size=4))
def test_metadata_comes_back_in_every_character(folder, about):
    save(folder / "about", SMALL, metadata=about)
    assert metadata(folder / "about") == about
    assert same_bits(dict(load(folder / "about")), SMALL)


def test_metadata_in_any_order_makes_the_same_file(tmp_path):
    save(tmp_path / "1", SMALL, metadata={"b": "1", "a": "2"})
    save(tmp_path / "2", SMALL, metadata={"a": "2", "b": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_arrays_begin_at_a_multiple_of_their_size(tmp_path):
    """For those who map the file."""
    for length in range(9):
        save(tmp_path / "w", SMALL, metadata={"a": "x" * length})
        assert int.from_bytes((tmp_path / "w").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("about", [{"step": 3}, {3: "step"}, {"isoformer.sha256": "0"}, {"a": "\udcff"}])
def test_metadata_that_cannot_be_kept_is_refused_before_any_file_is_touched(about, tmp_path):
    with pytest.raises(ValueError, match=r"metadata is text, by names that do not begin with 'isoformer\.'|surrogate"):
        save(tmp_path / "w", SMALL, metadata=about)
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_writers_load_without_a_digest(tmp_path):
    arrays = {"x": np.arange(6, dtype="float32")}
    (tmp_path / "w").write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
    assert same_bits(load(tmp_path / "w"), arrays)
    assert metadata(tmp_path / "w") == {"format": "pt"}
    (tmp_path / "w").write_bytes(safetensors.numpy.save(arrays))
    assert same_bits(load(tmp_path / "w"), arrays)
    assert metadata(tmp_path / "w") == {}


def test_a_format_of_the_future_is_refused(tmp_path):
    save(tmp_path / "w", SMALL)
    data = (tmp_path / "w").read_bytes()
    with safetensors.safe_open(tmp_path / "w", framework="numpy") as file:
        digest = file.metadata()["isoformer.sha256"].encode()
    data = data.replace(digest, b"0" * 64).replace(b'"isoformer.format":"1"', b'"isoformer.format":"2"')
    data = data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode())
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(ValueError, match="has format '2', this version reads 1; update isoformer"):
        load(tmp_path / "w")


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE = json.dumps(X).encode()
HOSTILE = {
    "name twice": file_of(b'{"x":%s,"x":%s}' % (ONE, ONE), bytes(8)),
    "field twice": file_of(b'{"x":{"dtype":"F32",%s}' % ONE[1:], bytes(8)),
    "metadata twice": file_of(b'{"__metadata__":{"a":"1"},"__metadata__":{},"x":%s}' % ONE, bytes(8)),
    "said twice": file_of(b'{"__metadata__":{"a":"1","a":"2"},"x":%s}' % ONE, bytes(8)),
    "not UTF-8": file_of(b'{"\xff":%s}' % ONE, bytes(8)),
    "deep": file_of(b'{"x":' + b"[" * 2000 + b"]" * 2000 + b"}"),
    "header of 4 TB": (1 << 42).to_bytes(8, "little") + ONE,
    "header of 2^63": (1 << 63).to_bytes(8, "little") + ONE,
    "no header": bytes(8),
    "an array of 2^64 bytes": file_of({"x": {**X, "shape": [1 << 62]}}, bytes(8)),
    "unknown dtype": file_of({"x": {**X, "dtype": "F33"}}, bytes(8)),
    "a number that is none": file_of({"x": {**X, "data_offsets": [0, float("nan")]}}, bytes(8)),
    "offsets not whole": file_of({"x": {**X, "data_offsets": [0, 8.0]}}, bytes(8)),
    "offsets below zero": file_of({"x": {**X, "data_offsets": [-8, 0]}}, bytes(8)),
    "offsets reversed": file_of({"x": {**X, "data_offsets": [8, 0]}}, bytes(8)),
    "a hole": file_of({"x": {**X, "data_offsets": [8, 16]}}, bytes(16)),
    "metadata that is no text": file_of({"__metadata__": {"a": 1}, "x": X}, bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_way(name, tmp_path):
    (tmp_path / "w").write_bytes(HOSTILE[name])
    for read in (load, metadata):
        with pytest.raises(ValueError, match="w is not a whole safetensors file"):
            read(tmp_path / "w")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
def test_what_is_no_file_is_refused_without_waiting(make, tmp_path):
    make(tmp_path / "w")
    with pytest.raises(ValueError, match="w is not a whole safetensors file: it is no file at all"):
        load(tmp_path / "w")


@pytest.mark.parametrize("package", FRONTENDS.values(), ids=FRONTENDS)
def test_a_model_goes_through_a_file_in_every_bit(package, tmp_path):
    weights = random_weights(CONFIG, 0)
    save(tmp_path / "w", package.to_weights(package.from_weights(CONFIG, weights)), metadata={"a": CONFIG.to_json()})
    config = type(CONFIG).from_json(metadata(tmp_path / "w")["a"])
    model = package.from_weights(config, load(tmp_path / "w"))
    assert (config, raw_all(package.to_weights(model))) == (CONFIG, raw_all(weights))


def raw_all(weights):
    return {name: raw(array) for name, array in weights.items()}


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


STACKS = {  # arrays that hold all layers, and some that do not though they stand beside them
    "encoder.blocks.stacked.bias": (3, 2),
    "encoder.blocks.stacked.count": (),
    "encoder.blocks.stacked.kernel": (3, 2, 4),
    "encoder.blocks.stacked.rate": (3,),
    "decoder.blocks.stacked.bias": (2, 5),
    "decoder.norm.scale": (2,),
}
BY_LAYER = {
    "encoder.blocks.0.bias": ("encoder.blocks.stacked.bias", 0),
    "encoder.blocks.stacked.count": ("encoder.blocks.stacked.count", ...),
    "encoder.blocks.0.kernel": ("encoder.blocks.stacked.kernel", 0),
    "encoder.blocks.0.rate": ("encoder.blocks.stacked.rate", 0),
    "encoder.blocks.1.bias": ("encoder.blocks.stacked.bias", 1),
    "encoder.blocks.1.kernel": ("encoder.blocks.stacked.kernel", 1),
    "encoder.blocks.1.rate": ("encoder.blocks.stacked.rate", 1),
    "encoder.blocks.2.bias": ("encoder.blocks.stacked.bias", 2),
    "encoder.blocks.2.kernel": ("encoder.blocks.stacked.kernel", 2),
    "encoder.blocks.2.rate": ("encoder.blocks.stacked.rate", 2),
    "decoder.blocks.0.bias": ("decoder.blocks.stacked.bias", 0),
    "decoder.blocks.1.bias": ("decoder.blocks.stacked.bias", 1),
    "decoder.norm.scale": ("decoder.norm.scale", ...),
}


def stacks():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape), "float32") for name, shape in STACKS.items()}


def test_a_stack_is_its_layers_in_the_order_of_the_loop():
    arrays = stacks()
    assert [name for name, array in arrays.items() if is_stacked(name, array)] == [
        name for name, shape in STACKS.items() if "stacked" in name and shape
    ]
    layers = unstacked(arrays)
    assert list(layers) == list(BY_LAYER)
    assert same_bits(layers, {name: arrays[source][index] for name, (source, index) in BY_LAYER.items()})


@pytest.mark.parametrize("by_shape", [False, True])
def test_layers_fit_into_their_stacks(by_shape):
    arrays = stacks()
    of = (lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)) if by_shape else (lambda x: x)
    held = fitted(unstacked(arrays), {name: of(array) for name, array in arrays.items()})
    assert list(held) == list(arrays)
    assert same_bits(held, arrays)
    assert all(held[name] is not arrays[name] for name in arrays)


def test_a_layer_too_few_or_too_many_is_named():
    arrays = stacks()
    layers = unstacked(arrays)
    layers["decoder.blocks.2.bias"] = layers.pop("decoder.blocks.1.bias")
    message = r"missing decoder\.blocks\.1\.bias float32\[5\]\n.*extra decoder\.blocks\.2\.bias float32\[5\]"
    with pytest.raises(ValueError, match=message):
        fitted(layers, arrays)
