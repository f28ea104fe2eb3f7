"""Tie weights, in NNX: the embedding is used twice, and held once."""

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
from nnx_impl import DecoderOnlyTransformer, Embedding, loss_fn, to_weights

UNTIED = CONFIG.replace(tie_embeddings="none")


def tied():
    """A model whose configuration ties: `logits` calls `embedding.attend`."""
    return DecoderOnlyTransformer(CONFIG.replace(tie_embeddings="target"), rngs=nnx.Rngs(0))


def recipe(batches: Batches, *, tied: Callable[[], Any] = tied, grad: Callable[..., Any] = nnx.grad):
    """The table's gradient is the sum of those of both uses, and after a step both still read the same."""
    model, untied, batch = tied(), DecoderOnlyTransformer(UNTIED, rngs=nnx.Rngs(0)), next(batches)
    nnx.update(untied.output_proj, {"kernel": model.embedding.embedding[...].T})  # the same numbers, held twice
    gradients = nnx.jit(grad(lambda model: loss_fn(model, batch)[0]))
    grads, parts = gradients(model), gradients(untied)
    total = parts.embedding.embedding[...] + parts.output_proj.kernel[...].T
    assert np.allclose(grads.embedding.embedding, total, atol=1e-5), "the table has the gradient of one use alone"

    nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param).update(model, grads)
    read, written = model.embedding(jnp.arange(11)) / model.embedding.scale, model.logits(jnp.eye(8)).T
    assert np.allclose(read, written, atol=1e-6), "after a step the two uses differ"
    assert len(to_weights(model)) == len(to_weights(untied)) - 1
    return total[3]


class Attend(nnx.Module):
    """A projection to logits that holds the embedding it uses."""

    def __init__(self, table: Embedding):
        self.table = table

    def __call__(self, x):
        return self.table.attend(x)


def shared():
    model: Any = DecoderOnlyTransformer(UNTIED, rngs=nnx.Rngs(0))
    model.output_proj = Attend(model.embedding)
    return model


@mistake()
def the_array_is_copied(batches: Batches):
    """The projection is given the table's numbers, in a Param of its own."""

    def copied():
        model = DecoderOnlyTransformer(UNTIED, rngs=nnx.Rngs(0))
        nnx.update(model.output_proj, {"kernel": model.embedding.embedding[...].T})
        return model

    recipe(batches, tied=copied)


@mistake()
def a_module_is_held_twice(batches: Batches):
    """Two modules hold one embedding, in graph mode and under NNX's own transforms."""
    recipe(batches, tied=shared)


@mistake()
def a_module_is_held_twice_under_jax_grad(batches: Batches):
    """Two modules hold one embedding, and jax.grad takes the model for a tree."""
    recipe(batches, tied=shared, grad=jax.grad)


@mistake()
def a_module_is_held_twice_in_tree_mode(batches: Batches):
    """Two modules hold one embedding, in the mode that is to become the default."""
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        recipe(batches, tied=shared)


if __name__ == "__main__":
    demonstrate(__file__)
