"""Donate buffers, in NNX: a step writes the new weights where the old ones were."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from nnx_impl import DecoderOnlyTransformer, evaluation, loss_fn, to_weights


def update(model, optimizer, batch):
    grads, metrics = nnx.grad(lambda model: loss_fn(model, batch), has_aux=True)(model)
    optimizer.update(model, grads)
    return metrics.loss


train_step = nnx.jit(update, donate_argnames=("model", "optimizer"))


def recipe(
    batches: Batches,
    *,
    train_step: Callable[..., Any] = train_step,
    keep: Callable[[Any], Any] = lambda weights: jax.tree.map(jnp.copy, weights),
):
    """The model's old buffers are gone; a copy made before and the batch, which comes again, are not."""
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    old, kept, first = to_weights(model), keep(to_weights(model)), next(batches)
    losses = [train_step(model, optimizer, batch) for batch in (first, next(batches), first)]

    assert all(array.is_deleted() for array in old.values()), "the old buffers are still held"
    assert moved(kept, to_weights(model)) == old.keys()
    return jnp.stack(losses)


@mistake()
def what_is_kept_is_not_a_copy(batches: Batches):
    """The best weights so far are kept without a copy, and read after the next step."""
    recipe(batches, keep=lambda weights: weights)


@mistake()
def the_names_to_donate_are_not_those_of_the_step(batches: Batches):
    """donate_argnames with a name that the step does not have."""
    recipe(batches, train_step=nnx.jit(update, donate_argnames=("model", "opt")))


@mistake()
def nothing_is_donated(batches: Batches):
    """nnx.jit alone: weights and optimizer are in memory twice during a step."""
    recipe(batches, train_step=nnx.jit(update))


@mistake()
def a_view_goes_along_with_the_donated_model(batches: Batches):
    """A view for evaluation is passed to the same step: it holds the Variables that are donated."""

    @nnx.jit(donate_argnames=("model", "optimizer"))
    def both(model, optimizer, view, batch):
        update(model, optimizer, batch)
        return loss_fn(view, batch)[0]

    recipe(batches, train_step=lambda model, optimizer, batch: both(model, optimizer, evaluation(model), batch))


if __name__ == "__main__":
    demonstrate(__file__)
