"""Train and evaluate, in Equinox: eqx.nn.inference_mode gives a copy with dropout off, of the same arrays."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer


@eqx.filter_jit
def logits(model, tokens, key=None):
    return model(tokens, key=key)


def recipe(
    batches: Batches,
    *,
    evaluation: Callable[[Any], Any] = eqx.nn.inference_mode,
    logits: Callable[..., Any] = logits,
    step_key: Callable[..., Any] = jax.random.fold_in,
):
    """Evaluation repeats itself, training does not."""
    model, key = DecoderOnlyTransformer(CONFIG.replace(dropout_rate=0.5), key=jax.random.key(0)), jax.random.key(1)
    quiet_model, tokens = evaluation(model), next(batches).inputs
    first = logits(model, tokens, step_key(key, 0))
    quiet = logits(quiet_model, tokens)
    assert np.array_equal(logits(quiet_model, tokens), quiet)
    second = logits(model, tokens, step_key(key, 1))

    assert not np.array_equal(first, quiet), "no dropout in training"
    assert not np.array_equal(first, second), "every step drops the same"
    return quiet[0, 0], first[0, 0], second[0, 0]


@mistake()
def the_switch_is_assigned(batches: Batches):
    """model.inference = True, on a frozen module."""

    def switched(model):
        model.inference = True
        return model

    recipe(batches, evaluation=switched)


@mistake()
def the_copy_is_not_used(batches: Batches):
    """eqx.nn.inference_mode returns a copy; the old model is called."""

    def forgotten(model):
        eqx.nn.inference_mode(model)
        return model

    recipe(batches, evaluation=forgotten)


@mistake()
def every_step_has_the_same_key(batches: Batches):
    """The key is passed on as it is, and neither split nor folded."""
    recipe(batches, step_key=lambda key, step: key)


@mistake("equinox #681")
def jax_jit_traces_the_switch(batches: Batches):
    """jax.jit instead of eqx.filter_jit: `inference` becomes a traced value."""
    recipe(batches, logits=jax.jit(lambda model, tokens, key=None: model(tokens, key=key)))


if __name__ == "__main__":
    demonstrate(__file__)
