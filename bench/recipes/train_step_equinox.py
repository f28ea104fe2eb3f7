"""A train step of one's own, in Equinox: the new model and optimizer state are returned."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from equinox_impl import DecoderOnlyTransformer, loss_fn, to_weights

tx = optax.sgd(0.1, momentum=0.9)


@eqx.filter_jit
def train_step(model, opt_state, batch):
    (loss, _), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, batch)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, loss


def recipe(batches: Batches, *, train_step: Callable[..., Any] = train_step, trained: Callable = eqx.is_inexact_array):
    """Three steps: every parameter has moved, and the last loss is below the first."""
    model = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, trained))
    before, losses = to_weights(model), []
    for batch in islice(batches, 3):
        model, opt_state, loss = train_step(model, opt_state, batch)
        losses.append(loss)

    still = before.keys() - moved(before, to_weights(model))
    assert not still, f"parameters that did not move: {len(still)} of {len(before)}"
    assert losses[2] < losses[0]
    return jnp.stack(losses)


@mistake("equinox #681")
def the_optimizer_is_given_the_whole_model(batches: Batches):
    """tx.init(model) without eqx.filter: the model holds more than arrays."""
    recipe(batches, trained=lambda leaf: True)


@mistake()
def the_new_model_is_not_returned(batches: Batches):
    """The step computes the new model, and returns the old one."""

    @eqx.filter_jit
    def step(model, opt_state, batch):
        (loss, _), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, batch)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        eqx.apply_updates(model, updates)
        return model, opt_state, loss

    recipe(batches, train_step=step)


@mistake("equinox #681")
def jax_jit_traces_what_is_no_array(batches: Batches):
    """jax.jit instead of eqx.filter_jit: the switch of dropout becomes a traced value."""

    @jax.jit
    def step(model, opt_state, batch):
        (loss, _), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, batch)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, loss

    recipe(batches, train_step=step)


if __name__ == "__main__":
    demonstrate(__file__)
