"""Laws of values that say a rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from core.values import STATIC, value


@value
class Rule:
    array: Array
    size: int = dataclasses.field(default=3, metadata=STATIC)


def test_a_value_does_not_change_and_is_itself_alone():
    rule = Rule(jnp.arange(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.size = 4
    assert {rule: 1}[rule] == 1
    assert rule != Rule(rule.array)


def test_arrays_are_leaves_and_the_rest_shapes_the_program():
    rule = Rule(jnp.arange(3), 5)
    assert [x.tolist() for x in jax.tree.leaves(rule)] == [[0, 1, 2]]
    assert jax.tree.structure(rule) != jax.tree.structure(Rule(rule.array, 6))
    doubled = jax.jit(lambda rule: Rule(rule.array * rule.size, rule.size))(rule)
    np.testing.assert_array_equal(doubled.array, [0, 5, 10])
    assert doubled.size == 5
