"""Accumulate gradients, in Equinox: a scan over micro-batches, each weighted by its tokens, then one update."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer, loss_fn, to_weights

tx = optax.sgd(0.1)


@eqx.filter_jit
def train_step(model, opt_state, batch, tx):
    """The first axis of the batch is that of micro-batches."""
    params = eqx.filter(model, eqx.is_inexact_array)
    total = batch.target_mask.sum()

    def add(grads, micro):
        share = micro.target_mask.sum() / total
        objective = lambda model: share * loss_fn(model, micro)[0]
        return jax.tree.map(jnp.add, grads, eqx.filter_grad(objective)(model)), None

    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state


def recipe(batches: Batches, *, train_step: Callable[..., Any] = train_step, tx: Any = tx):
    """Three micro-batches of one row each, of 2, 5 and 4 tokens: the same step as with the batch of three."""
    model = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    batch, before = next(batches), to_weights(model)
    whole = eqx.filter_jit(eqx.filter_grad(lambda model: loss_fn(model, batch)[0]))(model)
    model, opt_state = train_step(model, opt_state, jax.tree.map(lambda x: x[:, None], batch), tx)

    expected = {name: before[name] - 0.1 * grad for name, grad in to_weights(whole).items()}
    after = to_weights(model)
    off = max(float(np.abs(after[name] - expected[name]).max()) for name in expected)
    assert off < 1e-6, f"off by {off:.1e} from the step of the whole batch"
    return after["embedding.embedding"][3]


@mistake("optax #290, #1567")
def optax_means_the_means(batches: Batches):
    """optax.MultiSteps, which averages over micro-batches, however many tokens each has."""

    @eqx.filter_jit
    def step(model, opt_state, batch, tx):
        for i in range(3):
            micro = jax.tree.map(lambda x: x[i], batch)  # noqa: B023
            grads = eqx.filter_grad(lambda model: loss_fn(model, micro)[0])(model)  # noqa: B023
            updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
            model = eqx.apply_updates(model, updates)
        return model, opt_state

    recipe(batches, train_step=step, tx=optax.MultiSteps(tx, 3))


@mistake()
def gradients_are_added_and_not_divided(batches: Batches):
    """The sum of each micro-batch's mean: a step three times as long."""

    @eqx.filter_jit
    def step(model, opt_state, batch, tx):
        params = eqx.filter(model, eqx.is_inexact_array)

        def add(grads, micro):
            return jax.tree.map(jnp.add, grads, eqx.filter_grad(lambda model: loss_fn(model, micro)[0])(model)), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    recipe(batches, train_step=step)


@mistake()
def the_whole_model_is_carried(batches: Batches):
    """jax.lax.scan carries the model itself, which holds more than arrays."""

    @eqx.filter_jit
    def step(model, opt_state, batch, tx):
        def one(carry, micro):
            model, opt_state = carry
            grads = eqx.filter_grad(lambda model: loss_fn(model, micro)[0])(model)
            updates, opt_state = tx.update(grads, opt_state)
            return (eqx.apply_updates(model, updates), opt_state), None

        return jax.lax.scan(one, (model, opt_state), batch)[0]

    recipe(batches, train_step=step)


if __name__ == "__main__":
    demonstrate(__file__)
