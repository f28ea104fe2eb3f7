"""Mixed precision, in Equinox: parameters and their updates in float32, activations in bfloat16."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from core.config import TransformerConfig
from equinox_impl import DecoderOnlyTransformer, loss_fn, to_weights

Cast = Callable[[Any], Any]
tx = optax.sgd(1e-4)


def recipe(
    batches: Batches,
    *,
    config: Callable[[], TransformerConfig] = lambda: CONFIG.replace(dtype="bfloat16"),
    cast: Cast = lambda model: model,
):
    """Blocks compute in bfloat16; logits, gradients and parameters are float32, so that small updates count."""
    model = DecoderOnlyTransformer(config(), key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model, opt_state, batch):
        grads, aux = eqx.filter_grad(lambda model: objective(cast(model), batch), has_aux=True)(model)
        updates, opt_state = tx.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, *aux, grads

    before = to_weights(model)
    model, opt_state, logits, hidden, grads = train_step(model, opt_state, next(batches))
    weights = to_weights(model)
    assert hidden.dtype == jnp.bfloat16, f"blocks compute in {hidden.dtype}"
    assert logits.dtype == jnp.float32
    dtypes = {array.dtype for array in [*jax.tree.leaves(grads), *weights.values()]}
    assert dtypes == {jnp.dtype("float32")}, "parameters are narrow"
    assert moved(before, weights) == weights.keys()
    return logits[0]


def objective(model, batch):
    loss, _ = loss_fn(model, batch)
    x = model.decoder(model.embedding(batch.inputs))
    return loss, (model.logits(x), x)


def narrow(model):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model)


@mistake()
def parameters_are_narrow_too(batches: Batches):
    """param_dtype="bfloat16" as well: updates of a thousandth vanish in 8 bits."""
    recipe(batches, config=lambda: CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16"))


@mistake("equinox #221")
def the_model_is_cast_and_the_config_is_not(batches: Batches):
    """The arrays are cast inside the loss, as goes for eqx.nn layers: the blocks go on in the dtype of the config."""
    recipe(batches, config=lambda: CONFIG, cast=narrow)


@mistake("equinox #221")
def the_model_is_cast_beside_the_config(batches: Batches):
    """The arrays are cast inside the loss as well; the scales of norms here are 1, which bfloat16 holds."""
    recipe(batches, cast=narrow)


if __name__ == "__main__":
    demonstrate(__file__)
