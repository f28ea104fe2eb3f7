"""Weights as a flat {dotted name: array}, in a safetensors file that either frontend reads."""

import os
from collections.abc import Mapping
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


def save(path: str | os.PathLike, weights: Mapping[str, ArrayLike]) -> None:
    """Writes all or nothing: a file that was there stays whole until the new one is on the disk."""
    if "__metadata__" in weights:
        raise ValueError("the name __metadata__ belongs to the safetensors format; give the array another")
    path = Path(path)
    # the writer stores a buffer as it lies and ignores strides: a transposed view would be written wrongly
    data = safetensors.numpy.save({name: np.array(value, order="C") for name, value in weights.items()})
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
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
    """Reads what `save` wrote. ValueError for a file that is not safetensors, FileNotFoundError for none."""
    try:
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from None
    narrowed = [name for name, tensor in tensors.items() if dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype]
    if narrowed:
        raise ValueError(
            f"{os.fspath(path)} holds 64 bit numbers, as {narrowed[0]}: "
            "they need jax.config.update('jax_enable_x64', True) first"
        )
    return {name: jnp.asarray(tensor) for name, tensor in tensors.items()}


def owned(array: ArrayLike) -> Array:
    """An array that nobody else holds: train steps give their buffers away, and the caller's must stay."""
    return array if isinstance(array, Tracer) else jnp.array(array)


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
