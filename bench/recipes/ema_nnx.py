"""An average of the weights, in NNX: nnx.EMA, and a model that reads it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from nnx_impl import DecoderOnlyTransformer, loss_fn, to_weights


@nnx.jit
def train_step(model, optimizer, ema, batch):
    grads = nnx.grad(lambda model: loss_fn(model, batch)[0])(model)
    optimizer.update(model, grads)
    ema.update(model)


def recipe(
    batches: Batches,
    *,
    averaged: Callable[[Any], Any] = lambda model: nnx.EMA(model, decay=0.75, only=nnx.Param),
    train_step: Callable[..., Any] = train_step,
):
    """After each step, average = 0.75 average + 0.25 weights; the averaged model is neither the first nor the last."""
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    optimizer, ema = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), averaged(model)
    weights = expected = jax.tree.map(np.asarray, to_weights(model))
    for batch in (next(batches), next(batches)):
        train_step(model, optimizer, ema, batch)
        weights = jax.tree.map(np.asarray, to_weights(model))
        expected = {name: 0.75 * expected[name] + 0.25 * weights[name] for name in weights}

    found = to_weights(ema.apply_to(model))
    assert moved(found, weights), "the average is the last weights"
    for name in found:
        assert np.allclose(found[name], expected[name], atol=1e-6), f"{name} is not the average"
    return found["embedding.embedding"][0]


@mistake()
def the_average_holds_the_models_own_variables(batches: Batches):
    """The average begins as nnx.state(model), whose Variables are the model's own."""

    class Average:
        def __init__(self, model):
            self.params = nnx.state(model, nnx.Param)

        def apply_to(self, model):
            return nnx.merge(nnx.graphdef(model), self.params)

    @nnx.jit
    def step(model, optimizer, params, batch):
        grads = nnx.grad(lambda model: loss_fn(model, batch)[0])(model)
        optimizer.update(model, grads)
        average = jax.tree.map(lambda a, w: 0.75 * a + 0.25 * w, params, nnx.state(model, nnx.Param))
        nnx.update(params, average)

    def run(model, optimizer, ema, batch):
        step(model, optimizer, ema.params, batch)

    recipe(batches, averaged=Average, train_step=run)


@mistake()
def the_average_is_updated_before_the_step(batches: Batches):
    """ema.update(model) comes before optimizer.update: the average lags by a step."""

    @nnx.jit
    def step(model, optimizer, ema, batch):
        ema.update(model)
        optimizer.update(model, nnx.grad(lambda model: loss_fn(model, batch)[0])(model))

    recipe(batches, train_step=step)


if __name__ == "__main__":
    demonstrate(__file__)
