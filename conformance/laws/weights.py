"""Files of named arrays."""

import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from conformance.adapters import WeightsFile
from conformance.cases import gaussian
from conformance.law import law, refuses, require, same_bits

BASE = gaussian((4, 6), 0)
ARRAYS = {
    "float32": BASE,
    "transposed": BASE.T,
    "Fortran order": np.asfortranarray(BASE),
    "strided": BASE[::2, 1::2],
    "reversed": BASE[::-1],
    "broadcast": np.broadcast_to(BASE[0], (3, 6)),
    "integers": np.arange(5, dtype="int32"),
    "bool": BASE > 0,
    "0-d": np.array(1.5, np.float32),
    "empty": np.zeros((0, 3), "float32"),
    "minus zero, NaN, infinity": np.array([-0.0, np.nan, np.inf, 1e-40], np.float32),
}


def saved(file, arrays: dict[str, np.ndarray], change=lambda data: data) -> dict[str, np.ndarray]:
    """The arrays written, the file's bytes changed, and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        file(path, arrays)
        path.write_bytes(change(path.read_bytes()))
        return {name: np.asarray(x) for name, x in file.load(path).items()}


def round_trip(file, name: str, array: np.ndarray) -> None:
    loaded = saved(file, {name: array})
    require(list(loaded) == [name], f"the file must hold {name!r} alone, got {list(loaded)}")
    got, wanted = loaded[name], np.ascontiguousarray(array).reshape(array.shape)
    same_bits(got, wanted, f"the {name} array")
    require(got.tobytes() == wanted.tobytes(), f"the {name} array must come back in every bit")


@law(WeightsFile, cases=lambda file: st.sampled_from(list(ARRAYS)))
def an_array_comes_back_in_every_bit(file, name):
    """However it lies in memory."""
    round_trip(file, name, ARRAYS[name])


@law(WeightsFile, "bfloat16", cases=lambda file: st.just("bfloat16"), max_examples=1)
def bfloat16_comes_back_in_every_bit(file, name):
    import ml_dtypes

    round_trip(file, name, BASE.astype(ml_dtypes.bfloat16))


@law(WeightsFile, cases=lambda file: st.permutations(["b", "a.10", "a.2", "c"]), max_examples=10)
def arrays_are_found_by_name(file, names):
    """In whatever order they were given."""
    arrays = {name: np.array([i, ord(name[0])], np.float32) for i, name in enumerate(names)}
    loaded = saved(file, arrays)
    require(loaded.keys() == arrays.keys(), f"the names must be {sorted(arrays)}, got {sorted(loaded)}")
    for name, array in arrays.items():
        same_bits(loaded[name], array, f"the array {name!r}")


@law(WeightsFile, cases=lambda file: st.integers(1, 400), max_examples=25)
def a_file_cut_short_is_refused(file, cut):
    def shorten(data):
        return data[: max(0, len(data) - cut)]

    refuses(lambda: saved(file, {"a": BASE}, shorten), f"a file without its last {cut} bytes")


@law(WeightsFile, cases=lambda file: st.integers(1, 9), max_examples=5)
def bytes_behind_the_end_are_refused(file, number):
    refuses(lambda: saved(file, {"a": BASE}, lambda data: data + bytes(number)), f"{number} bytes behind the end")


@law(WeightsFile, "safetensors", cases=lambda file: st.sampled_from([(0, 8), (8, 16), (-8, 8), (16, 8)]))
def arrays_that_overlap_in_the_file_are_refused(file, offsets):
    """Two float32 arrays of 2 numbers in 16 bytes: the second must lie in bytes 8 to 16."""
    if offsets == (8, 16):
        offsets = (4, 12)

    def overlap(data):
        header = {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": list(offsets)},
        }
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(range(16))

    refuses(lambda: saved(file, {"a": BASE}, overlap), f"an array at bytes {offsets}, over another")


@law(WeightsFile, "checksum", cases=lambda file: st.tuples(st.integers(0, 400), st.integers(0, 7)), max_examples=100)
def a_changed_bit_is_refused(file, place):
    def flip(data):
        at = place[0] % len(data)
        return data[:at] + bytes([data[at] ^ (1 << place[1])]) + data[at + 1 :]

    refuses(lambda: saved(file, {"a": BASE}, flip), f"a file with bit {place[1]} of byte {place[0]} changed")
