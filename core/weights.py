"""Weights as a flat {dotted name: array}, in a safetensors file that either frontend reads."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array


def save(path: str | os.PathLike, weights: Mapping[str, Array]) -> None:
    """Writes all or nothing: a file that was there stays whole until the new one is on the disk."""
    path = Path(path)
    # the writer stores a buffer as it lies and ignores strides: a transposed view would be written wrongly
    data = safetensors.numpy.save({name: np.array(value, order="C") for name, value in weights.items()})
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def load(path: str | os.PathLike) -> dict[str, Array]:
    """Reads what `save` wrote. ValueError for a file that is not safetensors, FileNotFoundError for none."""
    try:
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from None
    return {name: jnp.asarray(tensor) for name, tensor in tensors.items()}


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
