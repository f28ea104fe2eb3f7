"""Freeze a subtree, in NNX: a filter says what is trained, to the gradient and to the optimizer."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from nnx_impl import DecoderOnlyTransformer, loss_fn, to_weights

trained = nnx.All(nnx.Param, nnx.PathContains("decoder"))


@nnx.jit
def train_step(model, optimizer, batch):
    graphdef, params, rest = nnx.split(model, trained, ...)
    objective = lambda params: loss_fn(nnx.merge(graphdef, params, rest), batch)
    grads, metrics = jax.grad(objective, has_aux=True)(params)
    optimizer.update(model, grads)
    return metrics.loss


def recipe(batches: Batches, *, train_step: Callable[..., Any] = train_step, wrt: Any = trained):
    """The decoder learns, by AdamW with decay; the embedding stays as it was."""
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(0.01, weight_decay=0.1), wrt=wrt)
    before = to_weights(model)
    losses = [train_step(model, optimizer, batch) for batch in islice(batches, 2)]

    changed = moved(before, to_weights(model))
    assert "embedding.embedding" not in changed, "the frozen embedding has moved"
    assert changed == {name for name in before if name.startswith("decoder.")}
    return jnp.stack(losses)


@mistake()
def the_optimizer_waits_for_gradients_of_all(batches: Batches):
    """Gradients are those of the decoder, the optimizer is wrt=nnx.Param."""
    recipe(batches, wrt=nnx.Param)


@mistake()
def gradients_are_set_to_zero(batches: Batches):
    """The embedding's gradients are set to zero instead: weight decay moves it all the same."""

    @nnx.jit
    def step(model, optimizer, batch):
        grads, metrics = nnx.grad(lambda model: loss_fn(model, batch), has_aux=True)(model)
        zeroed = lambda path, grad: grad.replace(jnp.zeros_like(grad)) if "embedding" in path else grad
        optimizer.update(model, nnx.map_state(zeroed, grads))
        return metrics.loss

    recipe(batches, train_step=step, wrt=nnx.Param)


@mistake()
def gradients_are_taken_of_all(batches: Batches):
    """The optimizer trains the decoder, and gets the gradients of all."""

    @nnx.jit
    def step(model, optimizer, batch):
        grads, metrics = nnx.grad(lambda model: loss_fn(model, batch), has_aux=True)(model)
        optimizer.update(model, grads)
        return metrics.loss

    recipe(batches, train_step=step)


if __name__ == "__main__":
    demonstrate(__file__)
