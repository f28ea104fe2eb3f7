"""Freeze a subtree, in Equinox: the model is partitioned, and only one part is differentiated and optimised."""

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

tx = optax.adamw(0.01, weight_decay=0.1)


def of_decoder(model):
    """True for each array of the decoder."""
    nothing = jax.tree.map(lambda _: False, model)
    return eqx.tree_at(lambda m: m.decoder, nothing, jax.tree.map(eqx.is_inexact_array, model.decoder))


@eqx.filter_jit
def train_step(model, opt_state, batch, filter_spec):
    params, frozen = eqx.partition(model, filter_spec)
    objective = lambda params: loss_fn(eqx.combine(params, frozen), batch)
    grads, metrics = eqx.filter_grad(objective, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, metrics.loss


def recipe(
    batches: Batches,
    *,
    train_step: Callable[..., Any] = train_step,
    filter_spec: Callable[[Any], Any] = of_decoder,
    optimised: Callable[[Any], Any] = of_decoder,
):
    """The decoder learns, by AdamW with decay; the embedding stays as it was."""
    model = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, optimised(model)))
    before, losses = to_weights(model), []
    for batch in islice(batches, 2):
        model, opt_state, loss = train_step(model, opt_state, batch, filter_spec(model))
        losses.append(loss)

    changed = moved(before, to_weights(model))
    assert "embedding.embedding" not in changed, "the frozen embedding has moved"
    assert changed == {name for name in before if name.startswith("decoder.")}
    return jnp.stack(losses)


@mistake()
def the_optimizer_waits_for_gradients_of_all(batches: Batches):
    """Gradients are those of the decoder, the optimizer's state is that of the whole model."""
    recipe(batches, optimised=lambda model: eqx.is_inexact_array)


@mistake()
def gradients_are_set_to_zero(batches: Batches):
    """The embedding's gradients are set to zero instead: weight decay moves it all the same."""

    @eqx.filter_jit
    def step(model, opt_state, batch, _):
        grads, metrics = eqx.filter_grad(lambda model: loss_fn(model, batch), has_aux=True)(model)
        grads = eqx.tree_at(lambda g: g.embedding.embedding, grads, replace_fn=jnp.zeros_like)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, metrics.loss

    recipe(batches, train_step=step, optimised=lambda model: eqx.is_inexact_array)


@mistake()
def the_whole_decoder_is_marked_true(batches: Batches):
    """True at the decoder itself, without asking which of its leaves are arrays."""
    marked = lambda model: eqx.tree_at(lambda m: m.decoder, jax.tree.map(lambda _: False, model), True)
    recipe(batches, filter_spec=marked, optimised=marked)


if __name__ == "__main__":
    demonstrate(__file__)
