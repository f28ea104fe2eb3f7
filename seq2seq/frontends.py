"""A frontend is reached by its name, so that only the framework in use need be installed."""

import importlib
from typing import Any

from seq2seq.errors import UserError

FRONTENDS = ("nnx", "equinox")
_FRAMEWORKS = {"nnx": "flax", "equinox": "equinox"}


def frontend(name: str) -> Any:
    """The package `<name>_impl`. UserError for an unknown name or a framework that is not installed."""
    if name not in FRONTENDS:
        raise UserError(f"unknown frontend {name!r}; choose one of {', '.join(FRONTENDS)}")
    try:
        return importlib.import_module(f"{name}_impl")
    except ModuleNotFoundError as error:
        if error.name not in (_FRAMEWORKS[name], "optax"):
            raise
        raise UserError(f"the {name} frontend needs {error.name}; run: pip install 'isoformer[{name}]'") from None


def randomness(package: Any) -> str:
    """The keyword by which a frontend takes a key at a call."""
    return {"nnx_impl": "rngs", "equinox_impl": "key"}[package.__name__]
