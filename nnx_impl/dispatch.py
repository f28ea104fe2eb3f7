"""Calls of a Flax NNX model at the host's cost of plain `jax.jit`: its tree is walked once, not at every call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

Result = TypeVar("Result")


class Held:
    """Modules whose arrays are one flat list, in the order of their names: what `jax.jit` takes and gives fastest.

    Structure and modes (`train`, `eval`) stay as they were at first.
    """

    def __init__(self, *modules: Any):
        leaves, self._structure = jax.tree.flatten(modules)
        is_variable = lambda x: isinstance(x, nnx.Variable)
        variables = filter(is_variable, jax.tree.leaves(modules, is_leaf=is_variable))
        self._arrays: list[Array] | None = None  # None: they are in the modules
        self._modules = modules
        self._variables = [variable for variable in variables if jax.tree.leaves(variable)]  # what is masked is empty
        if len(leaves) != len(self._variables):
            raise ValueError("what is held must keep its arrays in Variables, one array in each")

    @property
    def modules(self) -> tuple[Any, ...]:
        """The modules with their arrays put back; what is changed there counts."""
        if self._arrays is not None:
            for variable, array in zip(self._variables, self._arrays, strict=True):
                variable.set_raw_value(array)
            self._arrays = None
        return self._modules

    def read(self) -> list[Array]:
        """The arrays."""
        if self._arrays is None:
            self._arrays = [variable.get_raw_value() for variable in self._variables]
        return self._arrays

    def write(self, arrays: Sequence[Array]) -> None:
        """Takes new arrays for the old. Until `modules` is asked for, the modules still have the old ones."""
        self._arrays = list(arrays)

    def whole(self, arrays: Sequence[Array]) -> tuple[Any, ...]:
        """New modules around these arrays, for use under jit."""
        return self._structure.unflatten(arrays)


def compiled(
    function: Callable[..., Result], model: nnx.Module, *, donate: Sequence[int] = ()
) -> Callable[..., Result]:
    """`function(model, *arrays)`, jitted, as a function of the arrays alone, for the model as it is now.

    A later change of the model is not seen. Arrays at the positions `donate`, such as a cache that is replaced by its
    successor, give their buffers away.

    >>> from nnx_impl import Linear
    >>> double = compiled(lambda model, x: 2 * model(x), Linear(3, 4, rngs=nnx.Rngs(0)))
    >>> double(jax.numpy.ones((2, 3))).shape
    (2, 4)
    """
    held = Held(model)
    run = jax.jit(
        lambda arrays, *others: function(*held.whole(arrays), *others), donate_argnums=[1 + i for i in donate]
    )
    return functools.partial(run, held.read())
