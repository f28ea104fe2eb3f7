"""A train step of one's own, in NNX: the model and its optimizer are updated in place."""

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


@nnx.jit
def train_step(model, optimizer, batch):
    (loss, _), grads = nnx.value_and_grad(lambda model: loss_fn(model, batch), has_aux=True)(model)
    optimizer.update(model, grads)
    return loss


def recipe(batches: Batches, *, train_step: Callable[..., Any] = train_step, wrt: Any = nnx.Param):
    """Three steps: every parameter has moved, and the last loss is below the first."""
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), **({} if wrt is None else {"wrt": wrt}))
    before = to_weights(model)
    losses = jnp.stack([train_step(model, optimizer, batch) for batch in islice(batches, 3)])

    still = before.keys() - moved(before, to_weights(model))
    assert not still, f"parameters that did not move: {len(still)} of {len(before)}"
    assert losses[2] < losses[0]
    assert optimizer.step[...] == 3
    return losses


@mistake("flax #4842")
def the_optimizer_is_not_given_the_model(batches: Batches):
    """optimizer.update(grads), as it was before flax 0.11."""

    @nnx.jit
    def step(model, optimizer, batch):
        (loss, _), grads = nnx.value_and_grad(lambda model: loss_fn(model, batch), has_aux=True)(model)
        optimizer.update(grads)
        return loss

    recipe(batches, train_step=step)


@mistake("flax #5060")
def the_optimizer_is_not_told_what_to_train(batches: Batches):
    """nnx.Optimizer without wrt, as it was before flax 0.11."""
    recipe(batches, wrt=None)


@mistake()
def jax_jit_forgets_what_is_updated_inside(batches: Batches):
    """jax.jit instead of nnx.jit: the updates stay inside."""

    @jax.jit
    def step(model, optimizer, batch):
        (loss, _), grads = nnx.value_and_grad(lambda model: loss_fn(model, batch), has_aux=True)(model)
        optimizer.update(model, grads)
        return loss

    recipe(batches, train_step=step)


if __name__ == "__main__":
    demonstrate(__file__)
