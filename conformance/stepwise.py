"""A JAX function run operation by operation, so that one sees which of them makes NaN."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""What an operation calls a program that it stands for, such as jit's; loops and conditions are run as they are."""


def stepwise(function: Callable[..., Any], *arrays: Any) -> Any:
    """function(*arrays); FloatingPointError where an operation makes NaN of inputs that have none."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arrays)
    out = _run(program.jaxpr, program.consts, jax.tree.leaves(arrays))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def _run(program: Jaxpr, consts: list, arguments: list) -> list:
    known = dict(zip((*program.constvars, *program.invars), (*consts, *arguments), strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else known[x]
    for operation in program.eqns:
        inputs, name = list(map(read, operation.invars)), operation.primitive.name
        called = next((operation.params[key] for key in CALLS if key in operation.params), None)
        if called is not None and name not in ("while", "scan", "cond"):
            outputs = _run(getattr(called, "jaxpr", called), getattr(called, "consts", []), inputs)
        else:
            variables = list(dict.fromkeys(x for x in operation.invars if not isinstance(x, Literal)))
            alone = program.replace(constvars=[], invars=variables, eqns=[operation], outvars=operation.outvars)
            outputs = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*map(read, variables))
            if any(map(_has_nan, outputs)) and not any(map(_has_nan, inputs)):
                raise FloatingPointError(f"{name} makes nan of numbers")
        known |= dict(zip(operation.outvars, outputs, strict=True))
    return list(map(read, program.outvars))


def _has_nan(x: Any) -> bool:
    return jax.numpy.issubdtype(jax.typeof(x).dtype, np.inexact) and bool(np.isnan(np.asarray(x, np.float64)).any())
