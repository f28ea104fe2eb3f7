"""Accumulate gradients, in NNX: a scan over micro-batches, each weighted by its tokens, then one update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer, loss_fn, to_weights

tx = optax.sgd(0.1)


@nnx.jit
def train_step(model, optimizer, batch):
    """The first axis of the batch is that of micro-batches."""
    graphdef, params = nnx.split(model)
    total = batch.target_mask.sum()

    def add(grads, micro):
        share = micro.target_mask.sum() / total
        objective = lambda params: share * loss_fn(nnx.merge(graphdef, params), micro)[0]
        return jax.tree.map(jnp.add, grads, jax.grad(objective)(params)), None

    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)
    optimizer.update(model, grads)


def recipe(batches: Batches, *, train_step: Callable[..., Any] = train_step, tx: Any = tx):
    """Three micro-batches of one row each, of 2, 5 and 4 tokens: the same step as with the batch of three."""
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batch, before = next(batches), to_weights(model)
    train_step(model, optimizer, jax.tree.map(lambda x: x[:, None], batch))

    whole = jax.jit(jax.grad(lambda model: loss_fn(model, batch)[0]))(DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0)))
    expected = {name: before[name] - 0.1 * grad for name, grad in to_weights(whole).items()}
    after = to_weights(model)
    off = max(float(np.abs(after[name] - expected[name]).max()) for name in expected)
    assert off < 1e-6, f"off by {off:.1e} from the step of the whole batch"
    return after["embedding.embedding"][3]


@mistake("optax #290, #1567")
def optax_means_the_means(batches: Batches):
    """optax.MultiSteps, which averages over micro-batches, however many tokens each has."""

    @nnx.jit
    def step(model, optimizer, batch):
        for i in range(3):
            micro = jax.tree.map(lambda x: x[i], batch)  # noqa: B023
            optimizer.update(model, nnx.grad(lambda model: loss_fn(model, micro)[0])(model))  # noqa: B023

    recipe(batches, train_step=step, tx=optax.MultiSteps(tx, 3))


@mistake()
def gradients_are_added_and_not_divided(batches: Batches):
    """The sum of each micro-batch's mean: a step three times as long."""

    @nnx.jit
    def step(model, optimizer, batch):
        graphdef, params = nnx.split(model)

        def add(grads, micro):
            objective = lambda params: loss_fn(nnx.merge(graphdef, params), micro)[0]
            return jax.tree.map(jnp.add, grads, jax.grad(objective)(params)), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)
        optimizer.update(model, grads)

    recipe(batches, train_step=step)


@mistake()
def the_optimizer_is_updated_inside_the_scan(batches: Batches):
    """jax.lax.scan around a function that updates the model in place."""

    @nnx.jit
    def step(model, optimizer, batch):
        def one(carry, micro):
            optimizer.update(model, nnx.grad(lambda model: loss_fn(model, micro)[0])(model))
            return carry, None

        jax.lax.scan(one, None, batch)

    recipe(batches, train_step=step)


if __name__ == "__main__":
    demonstrate(__file__)
