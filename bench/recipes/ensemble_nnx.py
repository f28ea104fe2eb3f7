"""An ensemble, in NNX: nnx.vmap makes the members and calls them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer


@nnx.vmap
def members(rngs):
    return DecoderOnlyTransformer(CONFIG, rngs=rngs)


@nnx.jit
@nnx.vmap(in_axes=(0, None))
def logits(model, tokens):
    return model(tokens)


def recipe(
    batches: Batches,
    *,
    made: Callable[[nnx.Rngs], Any] = lambda rngs: members(rngs.split(3)),
    logits: Callable[..., Any] = logits,
):
    """Three members see the same batch; each differs from the others, and is what it would be alone."""
    ensemble = made(nnx.Rngs(0))
    outputs = logits(ensemble, next(batches).inputs)

    assert outputs.shape == (3, 3, 5, 11), f"not [members, B, T, V]: {outputs.shape}"
    assert len(np.unique(outputs[:, 0, 0, 0])) == 3, "members are equal"
    alone = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(jax.random.split(nnx.Rngs(0).default(), 3)[1]))
    assert np.array_equal(ensemble.embedding.embedding[1], alone.embedding.embedding[...])
    return outputs[:, 0, 0]


@mistake("flax #4195")
def every_member_is_made_of_the_same_key(batches: Batches):
    """The rngs are not split: each member draws the same numbers."""
    same = nnx.vmap(lambda _: DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0)))
    recipe(batches, made=lambda _: same(jnp.arange(3)))


@mistake("flax #4195")
def rngs_are_broadcast(batches: Batches):
    """One nnx.Rngs for all members, with in_axes=None."""
    recipe(batches, made=nnx.vmap(lambda rngs: DecoderOnlyTransformer(CONFIG, rngs=rngs), in_axes=None, axis_size=3))


@mistake("equinox #662")
def the_batch_is_mapped_too(batches: Batches):
    """in_axes left out: with as many rows as members, each member sees one row."""
    recipe(batches, logits=nnx.jit(nnx.vmap(lambda model, tokens: model(tokens))))


@mistake()
def the_ensemble_is_called_as_one_model(batches: Batches):
    """Without nnx.vmap: every array has an axis too many."""
    recipe(batches, logits=lambda model, tokens: model(tokens))


if __name__ == "__main__":
    demonstrate(__file__)
