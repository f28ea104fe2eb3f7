"""Weights as a flat {dotted name: array}, in a safetensors file that either frontend reads.

The file's metadata begins with the sha256 of the whole file, taken with zeros in the place of its 64 digits.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import dtypes
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

_OURS = "isoformer."  # so begin the names that are not the user's
_FORMAT = "isoformer.format"
_START = b'{"__metadata__":{"isoformer.sha256":"'
_DIGEST = slice(8 + len(_START), 8 + len(_START) + 64)  # after the length of the header in 8 bytes
_UNKNOWN = b"0" * 64
_STACKED = ".blocks.stacked."  # in the name of what holds all layers of a stack


def save(path: str | os.PathLike, weights: Mapping[str, ArrayLike], *, metadata: Mapping[str, str] = {}) -> None:
    """Writes all or nothing: a file that was there stays whole until the new one is on the disk.

    `metadata` is text, by name, that says what the weights are.
    """
    if "__metadata__" in weights:
        raise ValueError("the name __metadata__ belongs to the safetensors format; give the array another")
    path = Path(path)
    # the writer stores a buffer as it lies and ignores strides: a transposed view would be written wrongly
    data = safetensors.numpy.save({name: np.array(value, order="C") for name, value in weights.items()})
    size = 8 + int.from_bytes(data[:8], "little")
    head, arrays = _head(json.loads(data[8:size]), metadata), memoryview(data)[size:]
    digest = hashlib.sha256(head)
    digest.update(arrays)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(head.replace(_UNKNOWN, digest.hexdigest().encode(), 1))
            file.write(arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)  # the new name, too, must be on the disk
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path: str | os.PathLike) -> dict[str, Array]:
    """Reads what `save` wrote, or any safetensors file, whose sha256 is checked if it has one.

    ValueError for a file that is not safetensors or has changed, FileNotFoundError for none.
    """
    _checked(path)
    tensors = safetensors.numpy.load_file(path)
    narrowed = [name for name, tensor in tensors.items() if dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype]
    if narrowed:
        raise ValueError(
            f"{os.fspath(path)} holds 64 bit numbers, as {narrowed[0]}: "
            "they need jax.config.update('jax_enable_x64', True) first"
        )
    return {name: jnp.asarray(tensor) for name, tensor in tensors.items()}


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """What a file says of its weights, by name. The same errors as `load`."""
    return {name: text for name, text in _checked(path).items() if not name.startswith(_OURS)}


def _head(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """All that stands before the arrays, the digest not known yet."""
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str) or name.startswith(_OURS):
            raise ValueError(f"metadata is text, by names that do not begin with {_OURS!r}, got {name!r}: {text!r}")
    about = {"isoformer.sha256": _UNKNOWN.decode(), _FORMAT: "1", **dict(sorted(metadata.items()))}
    header = json.dumps({"__metadata__": about, **tensors}, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the arrays are aligned
    return len(header).to_bytes(8, "little") + header


def _checked(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a file that is whole."""
    place = Path(path)
    if place.exists() and not place.is_file():
        raise ValueError(f"{place} is not a whole safetensors file: it is no file at all")
    try:
        with safetensors.safe_open(place, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{place} is not a whole safetensors file: {error}") from None
    with place.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(0)
        start = file.read(_DIGEST.stop)
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(start[: _DIGEST.start] + _UNKNOWN)).hexdigest()
    about = json.loads(header, object_pairs_hook=lambda pairs: _distinct(place, pairs)).get("__metadata__", {})
    if header.startswith(_START):
        whole = start[_DIGEST] == digest.encode()
    else:
        whole = not any(name.startswith(_OURS) for name in about)
    if not whole:
        raise ValueError(f"{place} has changed since it was written, its sha256 differs; get the file again")
    if about.get(_FORMAT, "1") != "1":
        raise ValueError(f"{place} has format {about[_FORMAT]!r}, this version reads 1; update isoformer")
    return about


def _distinct(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{path} is not a whole safetensors file: its header has a name twice")
    return found


def owned(array: ArrayLike) -> Array:
    """An array that nobody else holds: train steps give their buffers away, and the caller's must stay."""
    return array if isinstance(array, Tracer) else jnp.array(array)


def fitted(weights: Mapping[str, Array], expected: Mapping[str, Any]) -> dict[str, Array]:
    """A copy of the weights as a model holds them that expects these arrays; ValueError as in `check_weights`."""
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in expected.items()}
    check_weights(weights, unstacked(shapes))
    copies = {}
    for name, shape in shapes.items():
        layers = [name] if not is_stacked(name, shape) else [_of_layer(name, i) for i in range(shape.shape[0])]
        arrays = [weights[layer] for layer in layers]
        copies[name] = jnp.stack(arrays) if is_stacked(name, shape) else owned(arrays[0])
    return copies


def unstacked(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays that hold all layers of a stack, as of a model with `scan_layers`, by layer: those of the loop.

    >>> list(unstacked({"encoder.blocks.stacked.bias": jnp.zeros((2, 3)), "encoder.norm.scale": jnp.ones(3)}))
    ['encoder.blocks.0.bias', 'encoder.blocks.1.bias', 'encoder.norm.scale']
    """
    flat = {}
    for _, group in itertools.groupby(arrays.items(), lambda item: item[0].partition(_STACKED)[0]):
        parts = {name: _layers(array) if is_stacked(name, array) else [array] for name, array in group}
        for i in range(max(map(len, parts.values()))):
            names = {name: _of_layer(name, i) if is_stacked(name, arrays[name]) else name for name in parts}
            flat |= {names[name]: part[i] for name, part in parts.items() if i < len(part)}
    return flat


def is_stacked(name: str, array: Any) -> bool:
    """Whether it is the array of all layers of a stack."""
    return _STACKED in name and array.ndim > 0


def _of_layer(name: str, layer: int) -> str:
    return name.replace(_STACKED, f".blocks.{layer}.")


def _layers(array: Any) -> Sequence[Any]:
    if isinstance(array, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(array.shape[1:], array.dtype)] * array.shape[0]
    return jnp.unstack(array)


def check_weights(weights: Mapping[str, Array], expected: Mapping[str, Any]) -> None:
    """One ValueError that lists every missing, extra, misshapen and wrongly typed name.

    What is expected may be arrays or anything with their shape and dtype.
    """
    faults = [f"missing {name} {_describe(expected[name])}" for name in expected if name not in weights]
    faults += [f"extra {name} {_describe(weights[name])}" for name in weights if name not in expected]
    faults += [
        f"{name} must be {_describe(expected[name])}, got {_describe(weights[name])}"
        for name in expected
        if name in weights and _describe(weights[name]) != _describe(expected[name])
    ]
    if faults:
        raise ValueError("weights and configuration do not belong together:\n  " + "\n  ".join(faults))


def _describe(value) -> str:
    return f"{value.dtype}{list(value.shape)}"


def dotted(path: jax.tree_util.KeyPath) -> str:
    """encoder.blocks.0.attention for the key path of a leaf, in either tree."""
    parts = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path)
    return ".".join(str(part) for part in parts)
