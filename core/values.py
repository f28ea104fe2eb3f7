"""Values that say a rule, such as a mask: frozen dataclasses that pass through jit, vmap and scan as pytrees."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

C = TypeVar("C")

STATIC = {"static": True}
"""Metadata of a field that shapes the program and is no array."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def value(cls: type[C]) -> type[C]:
    """A frozen dataclass that is a pytree; its fields hold arrays unless they are `STATIC`.

    JAX makes values of placeholders, too, so what a field may hold is checked where it is used.
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False)(cls))
