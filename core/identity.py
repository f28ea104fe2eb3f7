"""Are two programs the same? As StableHLO text, or as dataflow from every output back to the inputs.

Equal programs agree on every input, on every device, and cost the same: stronger than any tolerance.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_NUMBERS = (int, float, np.generic, np.ndarray, jax.Array)
# how a function would be differentiated is for transformations yet to come: no part of this program
_RULES = {"jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "out_trees"}
_INLINED = ("jit", "pjit", "closed_call", "core_call")


def program_text(fn: Callable, *args: Any) -> str:
    """The StableHLO text that `fn` lowers to; only the module's name, which is fn's, is normalised."""
    return re.sub(r"\bmodule @\w+", "module @program", jax.jit(fn).lower(*args).as_text(), count=1)


def dataflow_difference(first: ClosedJaxpr, second: ClosedJaxpr) -> str | None:
    """None if the programs compute every output from the same inputs by the same operations, else where they part.

    Inputs and outputs correspond by position. Operations must correspond one to one: those that no output
    needs, and their order, are all that is left out. Nested jits count as if written in place.

    >>> programs = [jax.make_jaxpr(f)(1.0) for f in (lambda x: x + 1.0, lambda x: x + 2.0)]
    >>> dataflow_difference(*programs).splitlines()[0]
    'output 0: the constant 1.0 here, the constant 2.0 there'
    """
    counts = [(len(p.in_avals), len(p.out_avals)) for p in (first, second)]
    if counts[0] != counts[1]:
        return "{} inputs and {} outputs here, {} and {} there".format(*counts[0], *counts[1])
    counterpart: dict[int, _Node] = {}
    taken: set[int] = set()
    for index, pair in enumerate(zip(_outputs(first), _outputs(second), strict=True)):
        pending: list[tuple[_Source, _Source, str]] = [(*pair, "")]
        while pending:
            a, b, where = pending.pop()
            fault = _source_difference(a, b)
            if fault is None and isinstance(a, _Out) and isinstance(b, _Out):
                if counterpart.get(id(a.node)) is b.node:
                    continue
                where = f"\n  here:  {_place(a.node)}\n  there: {_place(b.node)}"
                fault = _operation_difference(a.node.eqn, b.node.eqn)
                if id(a.node) in counterpart or id(b.node) in taken:
                    fault = f"{a.node.eqn.primitive.name} once in one program, twice in the other"
                counterpart[id(a.node)] = b.node
                taken.add(id(b.node))
                pending += [(x, y, where) for x, y in zip(a.node.inputs[::-1], b.node.inputs[::-1], strict=False)]
            if fault is not None:
                return f"output {index}: {fault}{where}"
    return None


class _Input(NamedTuple):
    position: int


class _Constant(NamedTuple):
    value: Any
    aval: Any


class _Node:
    """One operation and where its inputs come from."""

    def __init__(self, eqn: Any, inputs: "list[_Source]"):
        self.eqn = eqn
        self.inputs = inputs


class _Out(NamedTuple):
    node: _Node
    which: int


_Source = _Input | _Constant | _Out


def _outputs(program: ClosedJaxpr) -> list[_Source]:
    inputs = [_Input(i) for i in range(len(program.in_avals))]
    return _traced(program.jaxpr, program.consts, inputs)


def _traced(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[_Source]) -> list[_Source]:
    known: dict[Any, _Source] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: _Constant(value, var.aval) for var, value in zip(jaxpr.constvars, consts, strict=True)}

    def source(atom: Any) -> _Source:
        return _Constant(atom.val, atom.aval) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        arguments = [source(atom) for atom in eqn.invars]
        if eqn.primitive.name in _INLINED:
            inner = next(p for p in eqn.params.values() if isinstance(p, ClosedJaxpr))
            results = _traced(inner.jaxpr, inner.consts, arguments)
        else:
            node = _Node(eqn, arguments)
            results = [_Out(node, i) for i in range(len(eqn.outvars))]
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [source(atom) for atom in jaxpr.outvars]


def _operation_difference(a: Any, b: Any) -> str | None:
    if a.primitive is not b.primitive:
        return f"{a.primitive.name} here, {b.primitive.name} there"
    kinds = [[(v.aval.shape, v.aval.dtype, v.aval.weak_type) for v in eqn.outvars] for eqn in (a, b)]
    if len(a.invars) != len(b.invars) or kinds[0] != kinds[1]:
        return f"{a.primitive.name} of other types, {kinds[0]} here, {kinds[1]} there"
    for name in sorted((a.params.keys() | b.params.keys()) - _RULES):
        if not _same_parameter(a.params.get(name), b.params.get(name)):
            return f"{a.primitive.name} with another {name}"
    return None


def _same_parameter(a: Any, b: Any) -> bool:
    if isinstance(a, Jaxpr) and isinstance(b, Jaxpr):
        a, b = ClosedJaxpr(a, ()), ClosedJaxpr(b, ())
    if isinstance(a, ClosedJaxpr) and isinstance(b, ClosedJaxpr):
        return dataflow_difference(a, b) is None
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same_parameter, a, b))
    if isinstance(a, _NUMBERS) and isinstance(b, _NUMBERS):
        return _same_bits(a, b)  # NaN included
    return a == b


def _source_difference(a: _Source, b: _Source) -> str | None:
    if isinstance(a, _Out) and isinstance(b, _Out):
        return None if a.which == b.which else f"result {a.which} of an operation here, result {b.which} there"
    if isinstance(a, _Constant) and isinstance(b, _Constant):
        same = a.aval.weak_type == b.aval.weak_type and _same_bits(a.value, b.value)
    else:
        same = type(a) is type(b) and a == b
    return None if same else f"{_describe(a)} here, {_describe(b)} there"


def _same_bits(a: Any, b: Any) -> bool:
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def _describe(source: _Source) -> str:
    if isinstance(source, _Input):
        return f"input {source.position}"
    if isinstance(source, _Constant):
        return f"the constant {source.value}"
    return f"the result of {source.node.eqn.primitive.name}"


def _place(node: _Node) -> str:
    return source_info_util.summarize(node.eqn.source_info)
