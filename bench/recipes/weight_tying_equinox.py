"""Tie weights, in Equinox: the embedding is used twice, and held once."""

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
from equinox_impl import DecoderOnlyTransformer, Embedding, loss_fn, to_weights

UNTIED = CONFIG.replace(tie_embeddings="none")
tx = optax.sgd(0.1)


def tied():
    """A model whose configuration ties: `logits` calls `embedding.attend`."""
    return DecoderOnlyTransformer(CONFIG.replace(tie_embeddings="target"), key=jax.random.key(0))


def recipe(batches: Batches, *, tied: Callable[[], Any] = tied):
    """The table's gradient is the sum of those of both uses, and after a step both still read the same."""
    model, untied, batch = tied(), DecoderOnlyTransformer(UNTIED, key=jax.random.key(0)), next(batches)
    head = lambda m: m.output_proj.kernel
    untied = eqx.tree_at(head, untied, model.embedding.embedding.T)  # the same numbers, held twice
    gradients = eqx.filter_jit(eqx.filter_grad(lambda model: loss_fn(model, batch)[0]))
    grads, parts = gradients(model), gradients(untied)
    total = parts.embedding.embedding + head(parts).T
    assert np.allclose(grads.embedding.embedding, total, atol=1e-5), "the table has the gradient of one use alone"

    params = eqx.filter(model, eqx.is_inexact_array)
    model = eqx.apply_updates(model, tx.update(grads, tx.init(params))[0])
    read, written = model.embedding(jnp.arange(11)) / model.embedding.scale, model.logits(jnp.eye(8)).T
    assert np.allclose(read, written, atol=1e-6), "after a step the two uses differ"
    assert len(to_weights(model)) == len(to_weights(untied)) - 1
    return total[3]


class Attend(eqx.Module):
    """A projection to logits that holds the embedding it uses."""

    table: Embedding

    def __call__(self, x):
        return self.table.attend(x)


@mistake("equinox #469, #476")
def a_module_is_held_twice(batches: Batches):
    """Two modules hold one embedding: to a tree these are two."""

    def shared():
        model = DecoderOnlyTransformer(UNTIED, key=jax.random.key(0))
        return eqx.tree_at(lambda m: m.output_proj, model, Attend(model.embedding))

    recipe(batches, tied=shared)


@mistake()
def the_array_is_copied(batches: Batches):
    """The projection is given the table's numbers."""

    def copied():
        model = DecoderOnlyTransformer(UNTIED, key=jax.random.key(0))
        return eqx.tree_at(lambda m: m.output_proj.kernel, model, model.embedding.embedding.T)

    recipe(batches, tied=copied)


@mistake()
def shared_is_called_as_the_model(batches: Batches):
    """eqx.nn.Shared wraps a model, and is used without calling it first."""

    def shared() -> Any:
        model = DecoderOnlyTransformer(UNTIED, key=jax.random.key(0))
        return eqx.nn.Shared(model, lambda m: m.output_proj.kernel, lambda m: m.embedding.embedding.T)

    recipe(batches, tied=shared)


if __name__ == "__main__":
    demonstrate(__file__)
