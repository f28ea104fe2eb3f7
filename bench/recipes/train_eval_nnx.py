"""Train and evaluate, in NNX: a view with dropout off shares its parameters with the model."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer


@nnx.jit
def logits(model, tokens, rngs=None):
    return model(tokens, rngs=rngs)


def recipe(
    batches: Batches,
    *,
    evaluation: Callable[[Any], Any] = lambda model: nnx.view(model, deterministic=True),
    logits: Callable[..., Any] = logits,
):
    """Evaluation repeats itself, training does not."""
    model, rngs = DecoderOnlyTransformer(CONFIG.replace(dropout_rate=0.5), rngs=nnx.Rngs(0)), nnx.Rngs(dropout=1)
    quiet_model, tokens = evaluation(model), next(batches).inputs
    first = logits(model, tokens, rngs)
    quiet = logits(quiet_model, tokens)
    assert np.array_equal(logits(quiet_model, tokens), quiet)
    second = logits(model, tokens, rngs)

    assert not np.array_equal(first, quiet), "no dropout in training"
    assert not np.array_equal(first, second), "every step drops the same"
    return quiet[0, 0], first[0, 0], second[0, 0]


@mistake()
def the_mode_is_set_for_good(batches: Batches):
    """model.eval() changes the model itself, and nobody calls model.train()."""

    def switched(model):
        model.eval()
        return model

    recipe(batches, evaluation=switched)


@mistake()
def training_is_given_no_rngs(batches: Batches):
    """The call in training mode without rngs."""
    recipe(batches, logits=nnx.jit(lambda model, tokens, rngs=None: model(tokens)))


@mistake()
def jax_jit_does_not_count(batches: Batches):
    """jax.jit instead of nnx.jit: the count of the stream is updated inside, and lost."""
    import jax

    recipe(batches, logits=jax.jit(lambda model, tokens, rngs=None: model(tokens, rngs=rngs)))


@mistake()
def a_view_is_asked_for_by_another_name(batches: Batches):
    """nnx.view(model, inference=True), the name of Equinox."""
    recipe(batches, evaluation=lambda model: nnx.view(model, inference=True))


if __name__ == "__main__":
    demonstrate(__file__)
