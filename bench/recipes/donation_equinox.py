"""Donate buffers, in Equinox: a step writes the new weights where the old ones were."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from equinox_impl import DecoderOnlyTransformer, loss_fn, to_weights

tx = optax.sgd(0.1)


def update(batch, model, opt_state):
    grads, metrics = eqx.filter_grad(lambda model: loss_fn(model, batch), has_aux=True)(model)
    updates, opt_state = tx.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state, metrics.loss


train_step = eqx.filter_jit(update, donate="all-except-first")


def recipe(
    batches: Batches,
    *,
    train_step: Callable[..., Any] = train_step,
    keep: Callable[[Any], Any] = lambda weights: jax.tree.map(jnp.copy, weights),
):
    """The model's old buffers are gone; a copy made before and the batch, which comes again, are not."""
    model = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    old, kept, first = to_weights(model), keep(to_weights(model)), next(batches)
    losses = []
    for batch in (first, next(batches), first):
        model, opt_state, loss = train_step(batch, model, opt_state)
        losses.append(loss)

    assert all(array.is_deleted() for array in old.values()), "the old buffers are still held"
    assert moved(kept, to_weights(model)) == old.keys()
    return jnp.stack(losses)


@mistake()
def what_is_kept_is_not_a_copy(batches: Batches):
    """The best weights so far are kept without a copy, and read after the next step."""
    recipe(batches, keep=lambda weights: weights)


@mistake()
def the_old_model_is_used_again(batches: Batches):
    """The loop goes on with the model that it gave away."""
    first = []

    def step(batch, model, opt_state):
        first.append(model)
        return train_step(batch, first[0], opt_state)

    recipe(batches, train_step=step)


@mistake()
def everything_is_donated(batches: Batches):
    """donate="all": the batch, which comes again, is given away too; here no output is of its shape."""
    recipe(batches, train_step=eqx.filter_jit(update, donate="all"))


@mistake()
def nothing_is_donated(batches: Batches):
    """eqx.filter_jit alone: weights and optimizer are in memory twice during a step."""
    recipe(batches, train_step=eqx.filter_jit(update))


@mistake()
def arguments_to_donate_are_named_as_in_jax(batches: Batches):
    """donate_argnums, which jax.jit has and eqx.filter_jit has not."""
    options: dict[str, Any] = {"donate_argnums": (1, 2)}
    recipe(batches, train_step=eqx.filter_jit(update, **options))


if __name__ == "__main__":
    demonstrate(__file__)
