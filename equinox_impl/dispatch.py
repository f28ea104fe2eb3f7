"""Calls of an Equinox model at the host's cost of plain `jax.jit`: its tree is walked once, not at every call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array

Result = TypeVar("Result")


class Held:
    """Trees whose arrays are one flat list, in the order of their names: what `jax.jit` takes and gives fastest.

    Structure and modes (`inference`) stay as they were at first.
    """

    def __init__(self, *modules: Any):
        arrays, self._static = eqx.partition(modules, eqx.is_array)
        self._arrays, self._structure = jax.tree.flatten(arrays)

    @property
    def modules(self) -> tuple[Any, ...]:
        """The trees around the arrays as they are now."""
        return self.whole(self._arrays)

    def read(self) -> list[Array]:
        """The arrays."""
        return self._arrays

    def write(self, arrays: Sequence[Array]) -> None:
        """Takes new arrays for the old."""
        self._arrays = list(arrays)

    def whole(self, arrays: Sequence[Array]) -> tuple[Any, ...]:
        """The trees around these arrays, for use under jit."""
        return eqx.combine(self._structure.unflatten(arrays), self._static)


def compiled(
    function: Callable[..., Result], model: eqx.Module, *, donate: Sequence[int] = ()
) -> Callable[..., Result]:
    """`function(model, *arrays)`, jitted, as a function of the arrays alone, for the model as it is now.

    A later change of the model is not seen. Arrays at the positions `donate`, such as a cache that is replaced by its
    successor, give their buffers away.

    >>> from equinox_impl import Linear
    >>> double = compiled(lambda model, x: 2 * model(x), Linear(3, 4, key=jax.random.key(0)))
    >>> double(jax.numpy.ones((2, 3))).shape
    (2, 4)
    """
    held = Held(model)
    run = jax.jit(
        lambda arrays, *others: function(*held.whole(arrays), *others), donate_argnums=[1 + i for i in donate]
    )
    return functools.partial(run, held.read())
