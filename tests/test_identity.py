"""Laws of the comparison of programs: what is the same program, what is another, and where they part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from core.identity import dataflow_difference, program_text

X, Y = np.arange(3, dtype="float32"), np.arange(3, 6, dtype="float32")
PAIR, NONE = np.array([1, 2], "float32"), np.zeros(0, "float32")
TABLE = np.array([1.5, -2.0, 0.5], "float32")

probe = Primitive("probe")
"""An operation with whatever parameters a test gives it."""
probe.def_abstract_eval(lambda *args, **_: args[0])


def difference(first, second, *args):
    args = args or (X, Y)
    return dataflow_difference(jax.make_jaxpr(first)(*args), jax.make_jaxpr(second)(*args))


def scanned(body):
    return lambda x, y: jax.lax.scan(body, x, y)


def with_rule(rule):
    """A function and its own derivative."""

    @jax.custom_jvp
    def double(x):
        return 2.0 * x

    double.defjvp(lambda primals, tangents: (double(*primals), rule * tangents[0]))
    return lambda x, y: double(x) - y


def with_backward(rule):
    triple = jax.custom_vjp(lambda x: 3.0 * x)
    triple.defvjp(lambda x: (3.0 * x, None), lambda _, g: (rule * g,))
    return lambda x, y: triple(x) - y


def shared(x, y):
    once = jnp.sin(x)
    return once * once - y


SAME = {
    "itself": (lambda x, y: jnp.sin(x) * y + 1.0, lambda x, y: jnp.sin(x) * y + 1.0),
    "operations in another order": (
        lambda x, y: (lambda a, b: a + b)(jnp.sin(x), jnp.cos(y)),
        lambda x, y: (lambda b, a: a + b)(jnp.cos(y), jnp.sin(x)),
    ),
    "an operation that nothing needs": (lambda x, y: x + y, lambda x, y: (jnp.exp(x), x + y)[1]),
    "a jit inside": (lambda x, y: jnp.sin(x) * y, lambda x, y: jax.jit(lambda u: jnp.sin(u))(x) * y),
    "jits in jits, with a table and two results": (
        lambda x, y: (lambda p: (jnp.sin(p) - y, p))(x * TABLE),
        lambda x, y: jax.jit(lambda u: (jnp.sin(p := jax.jit(lambda w: w * TABLE)(u)) - y, p))(x),
    ),
    "a result that is an input": (lambda x, y: (y, x), lambda x, y: (y, x)),
    "one result used twice": (shared, shared),
    "NaN": (lambda x, y: x * jnp.nan, lambda x, y: x * jnp.nan),
    "a table": (lambda x, y: x * TABLE, lambda x, y: x * TABLE.copy()),
    "a scan": (scanned(lambda c, y: (c + y, jnp.sin(y))), scanned(lambda c, y: (c + y, jnp.sin(y))[::1])),
    "a scan with another order inside": (
        scanned(lambda c, y: (c + jnp.cos(y), jnp.sin(y))),
        scanned(lambda c, y: (lambda s: (c + jnp.cos(y), s))(jnp.sin(y))),
    ),
    "a checkpoint": (jax.checkpoint(lambda x, y: jnp.sin(x) * y), jax.checkpoint(lambda x, y: jnp.sin(x) * y)),
    "another rule of differentiation": (with_rule(2.0), with_rule(5.0)),
    "a branch": tuple(lambda x, y: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, y) for _ in range(2)),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_dataflow_has_no_difference(name):
    first, second = SAME[name]
    assert difference(first, second) is None
    assert difference(second, first) is None


def swapped_after(x, y):
    return jnp.exp(x) - jnp.sin(y), x


OTHER = {
    "an input": (lambda x, y: x, lambda x, y: y, "output 0: input 0 here, input 1 there"),
    "a later output": (lambda x, y: (x, y), lambda x, y: (x, x), "output 1: input 1 here, input 0 there"),
    "an operation": (lambda x, y: jnp.sin(x), lambda x, y: jnp.cos(x), "output 0: sin here, cos there"),
    "an operation inside": (lambda x, y: jnp.exp(jnp.sin(x)), lambda x, y: jnp.exp(jnp.cos(x)), "sin here, cos there"),
    "operands": (lambda x, y: x - y, lambda x, y: y - x, "output 0: input 0 here, input 1 there"),
    "the first of two": (
        lambda x, y: jnp.sin(x) - jnp.exp(y),
        lambda x, y: jnp.cos(x) - jnp.log(y),
        "output 0: sin here, cos there",
    ),
    "an input for a result": (lambda x, y: x - y, lambda x, y: jnp.sin(x) - y, "input 0 here, the result of sin there"),
    "an input for a constant": (lambda x, y: x * 2.0, lambda x, y: x * y, "the constant 2.0 here, input 1 there"),
    "a constant": (lambda x, y: x + 1.0, lambda x, y: x + 2.0, "the constant 1.0 here, the constant 2.0 there"),
    "the sign of zero": (lambda x, y: x * 0.0, lambda x, y: x * -0.0, "the constant 0.0 here, the constant -0.0 there"),
    "one number of a table": (lambda x, y: x * TABLE, lambda x, y: x * np.where(TABLE > 1, 1, TABLE), "the constant"),
    "a table of another type": (lambda *_: np.zeros(2, "int32"), lambda *_: np.zeros(2, "float32"), "the constant"),
    "a table of another shape": (lambda *_: np.zeros(2, "int32"), lambda *_: np.zeros((2, 1), "int32"), "the constant"),
    "a weakly typed constant": (lambda *_: 1.0, lambda *_: np.float32(1), "the constant 1.0 here, the constant 1.0"),
    "a weakly typed result": (
        lambda x, y: jax.lax.full((), 1) + jax.lax.exp(1.0),
        lambda x, y: jax.lax.full((), 1) + jax.lax.exp(np.float32(1)),
        "output 0: add of other types, .*True.* here, .*False.* there",
    ),
    "another type": (
        lambda x, y: x.astype(jnp.int32).astype(jnp.float32),
        lambda x, y: x.astype(jnp.bfloat16).astype(jnp.float32),
        "convert_element_type of other types, .*int32.* here, .*bfloat16.* there",
    ),
    "more operands": (
        lambda x, y: jnp.concatenate([PAIR, PAIR, x]),
        lambda x, y: jnp.concatenate([PAIR, PAIR, x, NONE]),
        r"concatenate of other types, \[\(\(7,\), .* here, \[\(\(7,\), .* there",
    ),
    "a parameter": (
        lambda x, y: jnp.argmax(x.reshape(3, 1), axis=0),
        lambda x, y: jnp.argmax(x.reshape(3, 1), axis=0).reshape(1)[::-1],
        "",
    ),
    "the direction of a cumulative sum": (
        lambda x, y: jax.lax.cumsum(x),
        lambda x, y: jax.lax.cumsum(x, reverse=True),
        "output 0: cumsum with another reverse",
    ),
    "which result": (
        lambda x, y: jax.lax.sort((x, y))[0],
        lambda x, y: jax.lax.sort((x, y))[1],
        "output 0: result 0 of an operation here, result 1 there",
    ),
    "which result of a jit": (
        lambda x, y: jax.jit(lambda u: (jnp.sin(u), jnp.cos(u)))(x)[0],
        lambda x, y: jax.jit(lambda u: (jnp.sin(u), jnp.cos(u)))(x)[1],
        "output 0: sin here, cos there",
    ),
    "once and twice": (shared, lambda x, y: jnp.sin(x) * jnp.sin(x) - y, "sin once in one program, twice in the other"),
    "twice and once": (lambda x, y: jnp.sin(x) * jnp.sin(x) - y, shared, "sin once in one program, twice in the other"),
    "the body of a scan": (
        scanned(lambda c, y: (c + y, jnp.sin(y))),
        scanned(lambda c, y: (c + y, jnp.cos(y))),
        "output [01]: scan with another jaxpr",
    ),
    "a number in a checkpoint": (
        jax.checkpoint(lambda x, y: jnp.sin(x) * 2.0),
        jax.checkpoint(lambda x, y: jnp.sin(x) * 3.0),
        "with another jaxpr",
    ),
    "one of the branches": (
        lambda x, y: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, y),
        lambda x, y: jax.lax.cond(x[0] > 0, jnp.sin, jnp.tan, y),
        "cond with another branches",
    ),
    "one more branch": (
        lambda x, y: jax.lax.switch(x[0].astype(int), [jnp.sin, jnp.cos], y),
        lambda x, y: jax.lax.switch(x[0].astype(int), [jnp.sin, jnp.cos, jnp.tan], y),
        "output 0: (cond|.*constant)",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_dataflow_is_told_by_where_it_parts(name):
    first, second, message = OTHER[name]
    assert re.search(message, difference(first, second) or "no difference")
    assert difference(second, first) is not None


def test_constants_differ_by_how_firm_their_type_is():
    weak, firm = jnp.asarray(1.5), jnp.float32(1.5)
    assert "the constant 1.5 here, the constant 1.5 there" in difference(lambda x, y: weak, lambda x, y: firm)


def test_a_jit_counts_as_written_in_place_wherever_its_program_stands_among_its_parameters():
    first, second = (jax.make_jaxpr(jax.jit(lambda x: jnp.sin(x) * 2.0))(X) for _ in range(2))
    params = second.eqns[0].params
    params["jaxpr"] = params.pop("jaxpr")
    assert dataflow_difference(first, second) is None


def test_another_backward_pass_is_no_part_of_the_program():
    assert difference(with_backward(3.0), with_backward(5.0)) is None


@pytest.mark.parametrize("other", [lambda x, y: x * y, lambda x, y: x * jnp.sin(y)])
def test_a_table_is_neither_an_input_nor_a_result(other):
    assert difference(lambda x, y: x * TABLE, other) is not None
    assert difference(other, lambda x, y: x * TABLE) is not None


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (lambda x: (x, x), lambda x: x, "1 inputs and 2 outputs here, 1 and 1 there"),
        (lambda x: x, lambda x: (), "1 inputs and 1 outputs here, 1 and 0 there"),
    ],
)
def test_the_numbers_of_outputs_must_be_the_same(first, second, message):
    assert difference(first, second, X) == message


def test_the_numbers_of_inputs_must_be_the_same():
    first, second = jax.make_jaxpr(lambda x: x)(X), jax.make_jaxpr(lambda x, y: x)(X, Y)
    assert dataflow_difference(first, second) == "1 inputs and 1 outputs here, 2 and 1 there"


def test_a_difference_names_the_lines_of_both_programs():
    def one(x, y):
        return jnp.exp(x) + 1.0

    def two(x, y):
        return jnp.exp(x) + 2.0

    lines = difference(one, two).splitlines()
    assert lines[0] == "output 0: the constant 1.0 here, the constant 2.0 there"
    assert re.fullmatch(r"  here:  .*test_identity\.py:\d+.*\(.*one\)", lines[1])
    assert re.fullmatch(r"  there: .*test_identity\.py:\d+.*\(.*two\)", lines[2])
    assert len(lines) == 3


def test_an_output_that_no_operation_makes_has_no_line():
    assert difference(lambda x, y: 1.0, lambda x, y: 2.0) == "output 0: the constant 1.0 here, the constant 2.0 there"


def parameters(first, second):
    """The difference between two programs of one operation that differ in its parameters."""
    programs = [jax.make_jaxpr(lambda x: probe.bind(x))(X) for _ in range(2)]
    for program, given in zip(programs, (first, second), strict=True):
        program.eqns[0].params.update(given)  # arrays too, which only some of JAX's own operations may have
    return dataflow_difference(*programs)


SAME_PARAMETERS = [
    (3, 3),
    ("a", "a"),
    (None, None),
    (np.nan, float("nan")),
    (np.array([1.0, np.nan]), np.array([1.0, np.nan])),
    ((1, (2, np.nan)), (1, (2, np.nan))),
    ([1, np.nan], (1, np.nan)),
    ((1, np.nan), [1, np.nan]),
    ([1, np.nan], [1, np.nan]),
    (frozenset("ab"), frozenset("ab")),
    ((), ()),
]
OTHER_PARAMETERS = [
    (3, 4),
    ("a", "b"),
    (None, 0),
    (0.0, -0.0),
    (1.0, np.nan),
    (np.float32(1), np.float64(1)),
    (np.zeros(2), np.zeros((2, 1))),
    (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    ((1, 2), (1, 2, 3)),
    ((1, 2, 3), (1, 2)),
    ((1, (2, np.nan)), (1, (3, np.nan))),
    ((1, 2), (0, 2)),
    ((np.nan,), np.nan),
    (((1,), (1, 2)), 1.0),
    (1, "1"),
    (jax.make_jaxpr(jnp.sin)(X), None),
    (jax.make_jaxpr(jnp.sin)(X), jax.make_jaxpr(jnp.sin)(X).jaxpr),
    (jax.make_jaxpr(jnp.sin)(X).jaxpr, jax.make_jaxpr(jnp.cos)(X).jaxpr),
    (jax.make_jaxpr(jnp.sin)(X).jaxpr, "sin"),
]


@pytest.mark.parametrize(("first", "second"), SAME_PARAMETERS)
def test_parameters_are_the_same_in_every_bit(first, second):
    assert parameters({"value": first}, {"value": second}) is None


@pytest.mark.parametrize(("first", "second"), OTHER_PARAMETERS)
def test_one_bit_of_a_parameter_makes_another_program(first, second):
    assert parameters({"value": first}, {"value": second}) == parameters({"value": second}, {"value": first})
    assert parameters({"value": first}, {"value": second}).startswith("output 0: probe with another value\n")


def test_a_parameter_that_one_operation_lacks_is_a_difference():
    for programs in (({"b": 1}, {"a": 1, "b": 1}), ({"a": 1, "b": 1}, {"b": 1})):
        assert parameters(*programs).startswith("output 0: probe with another a\n")
    assert parameters({"b": 1, "a": 1}, {"b": 2, "a": 2}).startswith("output 0: probe with another a\n")


def test_text_does_not_depend_on_the_name_of_the_function():
    def one(x, y):
        return jnp.sin(x) * y

    assert program_text(one, X, Y) == program_text(lambda x, y: jnp.sin(x) * y, X, Y)
    assert program_text(one, X, Y).startswith("module @program ")
    assert program_text(one, X, Y) != program_text(lambda x, y: jnp.cos(x) * y, X, Y)


def test_only_the_name_of_the_program_is_left_out_of_its_text():
    texts = [program_text(lambda x, key=key: {key: x}, X) for key in ("module @a", "module @b")]
    assert texts[0] != texts[1]
