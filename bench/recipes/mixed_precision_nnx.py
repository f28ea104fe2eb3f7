"""Mixed precision, in NNX: parameters and their updates in float32, activations in bfloat16."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from core.config import TransformerConfig
from nnx_impl import DecoderOnlyTransformer, loss_fn, to_weights

Cast = Callable[[Any], Any]


def recipe(
    batches: Batches,
    *,
    config: Callable[[], TransformerConfig] = lambda: CONFIG.replace(dtype="bfloat16"),
    cast: Cast = lambda model: model,
):
    """Blocks compute in bfloat16; logits, gradients and parameters are float32, so that small updates count."""
    model = cast(DecoderOnlyTransformer(config(), rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-4), wrt=nnx.Param)
    before = to_weights(model)

    @nnx.jit
    def train_step(model, optimizer, batch):
        grads, (logits, hidden) = nnx.grad(objective, has_aux=True)(model, batch)
        optimizer.update(model, grads)
        return logits, hidden, jax.tree.leaves(grads)

    logits, hidden, grads = train_step(model, optimizer, next(batches))
    weights = to_weights(model)
    assert hidden.dtype == jnp.bfloat16, f"blocks compute in {hidden.dtype}"
    assert logits.dtype == jnp.float32
    assert {array.dtype for array in [*grads, *weights.values()]} == {jnp.dtype("float32")}, "parameters are narrow"
    assert moved(before, weights) == weights.keys()
    return logits[0]


def objective(model, batch):
    loss, _ = loss_fn(model, batch)
    x = model.decoder(model.embedding(batch.inputs))
    return loss, (model.logits(x), x)


@mistake()
def parameters_are_narrow_too(batches: Batches):
    """param_dtype="bfloat16" as well: updates of a thousandth vanish in 8 bits."""
    recipe(batches, config=lambda: CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16"))


@mistake()
def the_params_are_cast_and_the_config_is_not(batches: Batches):
    """The state is cast to bfloat16: the blocks go on in the dtype of the configuration."""

    def cast(model):
        graphdef, state = nnx.split(model)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))

    recipe(batches, config=lambda: CONFIG, cast=cast)


if __name__ == "__main__":
    demonstrate(__file__)
