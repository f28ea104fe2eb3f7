"""An average of the weights, in Equinox: a second model whose arrays are averaged, and nothing else."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from equinox_impl import DecoderOnlyTransformer, loss_fn, to_weights

tx = optax.sgd(0.1)


def averaged(ema, model):
    old, rest = eqx.partition(ema, eqx.is_inexact_array)
    new = eqx.filter(model, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda a, w: 0.75 * a + 0.25 * w, old, new), rest)


@eqx.filter_jit
def train_step(model, opt_state, ema, batch):
    grads = eqx.filter_grad(lambda model: loss_fn(model, batch)[0])(model)
    updates, opt_state = tx.update(grads, opt_state)
    model = eqx.apply_updates(model, updates)
    return model, opt_state, averaged(ema, model)


def recipe(batches: Batches, *, train_step: Callable[..., Any] = train_step):
    """After each step, average = 0.75 average + 0.25 weights; the averaged model is neither the first nor the last."""
    model = ema = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    weights = expected = jax.tree.map(np.asarray, to_weights(model))
    for batch in (next(batches), next(batches)):
        model, opt_state, ema = train_step(model, opt_state, ema, batch)
        weights = jax.tree.map(np.asarray, to_weights(model))
        expected = {name: 0.75 * expected[name] + 0.25 * weights[name] for name in weights}

    found = to_weights(ema)
    assert moved(found, weights), "the average is the last weights"
    for name in found:
        assert np.allclose(found[name], expected[name], atol=1e-6), f"{name} is not the average"
    assert jax.tree.structure(ema) == jax.tree.structure(model)
    assert ema.decoder.dropout.inference is model.decoder.dropout.inference, "a switch was averaged"
    return found["embedding.embedding"][0]


@mistake()
def all_leaves_are_averaged(batches: Batches):
    """jax.tree.map over the whole model: the switch of dropout is averaged too."""

    def step(model, opt_state, ema, batch):
        model, opt_state, _ = train_step(model, opt_state, ema, batch)
        return model, opt_state, jax.tree.map(lambda a, w: 0.75 * a + 0.25 * w, ema, model)

    recipe(batches, train_step=step)


@mistake()
def the_average_begins_as_the_model_that_is_donated(batches: Batches):
    """ema = model, without a copy, and a step that donates: both are the same buffers."""

    @eqx.filter_jit(donate="all-except-first")
    def donated(batch, model, opt_state, ema):
        return train_step(model, opt_state, ema, batch)

    recipe(batches, train_step=lambda model, opt_state, ema, batch: donated(batch, model, opt_state, ema))


@mistake()
def the_average_is_updated_before_the_step(batches: Batches):
    """The average is taken of the model as it was: it lags by a step."""

    def step(model, opt_state, ema, batch):
        return *train_step(model, opt_state, ema, batch)[:2], averaged(ema, model)

    recipe(batches, train_step=step)


if __name__ == "__main__":
    demonstrate(__file__)
