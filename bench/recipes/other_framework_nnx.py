"""An NNX model under Equinox's filters: it is a tree of arrays, and that is all they ask."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer, loss_fn, to_weights


@eqx.filter_jit
@eqx.filter_value_and_grad
def gradients(model, batch):
    return loss_fn(model, batch)[0]


def halved(model):
    """The model with half the embedding; the other is not changed."""
    params, rest = eqx.partition(model, lambda leaf: eqx.is_inexact_array(leaf) and leaf.shape == (11, 8))
    return eqx.combine(jax.tree.map(lambda table: table / 2, params), rest)


def recipe(
    batches: Batches,
    *,
    halved: Callable[[Any], Any] = halved,
    evaluation: Callable[[Any], Any] = lambda model: nnx.view(model, deterministic=True),
):
    """Loss and gradients are those of nnx.value_and_grad, in bits; a part of the tree is changed in a copy."""
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    small, batch = halved(model), next(batches)
    loss, grads = gradients(model, batch)
    expected, theirs = nnx.jit(nnx.value_and_grad(lambda model, batch: loss_fn(model, batch)[0]))(model, batch)

    assert loss == expected
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True))
    assert np.array_equal(small.embedding.embedding, model.embedding.embedding[...] / 2), "the copy was not changed"
    assert to_weights(small).keys() == to_weights(model).keys(), "the embedding is no Param any more"
    assert evaluation(model).decoder.dropout.deterministic, "dropout is still on"
    return loss


@mistake()
def a_param_is_replaced_by_tree_at(batches: Batches):
    """eqx.tree_at puts an array where an nnx.Param stood."""
    table = lambda model: model.embedding.embedding
    recipe(batches, halved=lambda model: eqx.tree_at(table, model, jnp.array(table(model)[...]) / 2))


@mistake()
def the_model_is_updated_inside_filter_jit(batches: Batches):
    """A step that updates in place, under eqx.filter_jit: what it did stays inside."""

    @eqx.filter_jit
    def halve(model):
        model.embedding.embedding[...] = model.embedding.embedding[...] / 2

    def in_place(model):
        copy = nnx.clone(model)
        halve(copy)
        return copy

    recipe(batches, halved=in_place)


@mistake()
def dropout_is_switched_off_by_inference_mode(batches: Batches):
    """eqx.nn.inference_mode looks for `inference`, and in NNX the switch is called `deterministic`."""
    recipe(batches, evaluation=eqx.nn.inference_mode)


if __name__ == "__main__":
    demonstrate(__file__)
