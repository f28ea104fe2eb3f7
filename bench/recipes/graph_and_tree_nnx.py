"""Graph mode and tree mode of NNX: one train step that works in both, and in which they give the same bits.

Equinox has no such choice: its modules are always trees. Graph mode, the default of Flax today, follows references;
tree mode, announced as the next default, takes a module for a tree, and refuses one Variable in two places.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer, loss_fn

trained = nnx.All(nnx.Param, nnx.PathContains("decoder"))


def update(model, optimizer, batch, rngs):
    """Split by a filter and differentiated as a tree: in both modes."""
    (graphdef, params, rest), key = nnx.split(model, trained, ...), rngs.dropout()
    objective = lambda params: loss_fn(nnx.merge(graphdef, params, rest), batch, key)
    grads, metrics = jax.grad(objective, has_aux=True)(params)
    optimizer.update(model, grads)
    return metrics.loss


def losses(mode: bool, data, update: Callable[..., Any]):
    with nnx.set_graph_mode(mode), nnx.set_graph_updates(mode):
        model, rngs = DecoderOnlyTransformer(CONFIG.replace(dropout_rate=0.5), rngs=nnx.Rngs(0)), nnx.Rngs(dropout=1)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=trained)
        step = nnx.jit(update)
        return jnp.stack([step(model, optimizer, batch, rngs) for batch in data])


def recipe(batches: Batches, *, update: Callable[..., Any] = update):
    """Two steps with dropout in either mode: equal losses."""
    data = list(islice(batches, 1)) * 2
    graph, tree = losses(True, data, update), losses(False, data, update)
    assert graph[0] != graph[1]
    assert np.array_equal(graph, tree), f"in graph mode {graph}, in tree mode {tree}"
    return graph


@mistake()
def what_to_differentiate_is_a_prefix_filter(batches: Batches):
    """nnx.DiffState says what to differentiate: in graph mode alone."""

    def by_diff_state(model, optimizer, batch, rngs):
        key = rngs.dropout()
        objective = lambda model: loss_fn(model, batch, key)[0]
        loss, grads = nnx.value_and_grad(objective, argnums=nnx.DiffState(0, trained))(model)
        optimizer.update(model, grads)
        return loss

    recipe(batches, update=by_diff_state)


@mistake()
def the_whole_model_is_differentiated(batches: Batches):
    """nnx.value_and_grad of the model, and the optimizer picks what it trains."""

    def of_all(model, optimizer, batch, rngs):
        key = rngs.dropout()
        loss, grads = nnx.value_and_grad(lambda model: loss_fn(model, batch, key)[0])(model)
        optimizer.update(model, grads)
        return loss

    recipe(batches, update=of_all)


@mistake()
def rngs_are_stored_in_the_model(batches: Batches):
    """A model that holds its nnx.Rngs, as layers of Flax may, differentiated whole."""

    def stored(model, optimizer, batch, rngs):
        model.rngs = nnx.data(nnx.Rngs(dropout=1))
        loss, grads = nnx.value_and_grad(lambda model: loss_fn(model, batch, model.rngs.dropout())[0])(model)
        optimizer.update(model, grads)
        return loss

    recipe(batches, update=stored)


@mistake()
def the_structure_changes_inside_the_step(batches: Batches):
    """A step that gives the model a new attribute, which it has at the next one."""

    def grown(model, optimizer, batch, rngs):
        loss = update(model, optimizer, batch, rngs)
        if not hasattr(model, "last"):
            model.last = nnx.Variable(loss)
            return loss
        return loss + model.last[...]

    recipe(batches, update=grown)


if __name__ == "__main__":
    demonstrate(__file__)
