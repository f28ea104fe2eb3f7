"""An ensemble, in Equinox: eqx.filter_vmap makes the members and calls them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer


@eqx.filter_vmap
def members(key):
    return DecoderOnlyTransformer(CONFIG, key=key)


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
def logits(model, tokens):
    return model(tokens)


def recipe(
    batches: Batches,
    *,
    made: Callable[[Any], Any] = lambda key: members(jax.random.split(key, 3)),
    logits: Callable[..., Any] = logits,
):
    """Three members see the same batch; each differs from the others, and is what it would be alone."""
    key = jax.random.fold_in(jax.random.key(0), 0)  # the first key that nnx.Rngs(0) gives
    ensemble = made(key)
    outputs = logits(ensemble, next(batches).inputs)

    assert outputs.shape == (3, 3, 5, 11), f"not [members, B, T, V]: {outputs.shape}"
    assert len(np.unique(outputs[:, 0, 0, 0])) == 3, "members are equal"
    alone = DecoderOnlyTransformer(CONFIG, key=jax.random.split(key, 3)[1])
    assert np.array_equal(ensemble.embedding.embedding[1], alone.embedding.embedding)
    return outputs[:, 0, 0]


@mistake()
def every_member_is_made_of_the_same_key(batches: Batches):
    """The key is not split: each member draws the same numbers."""
    recipe(
        batches, made=eqx.filter_vmap(lambda key: DecoderOnlyTransformer(CONFIG, key=key), in_axes=None, axis_size=3)
    )


@mistake("equinox #662")
def the_batch_is_mapped_too(batches: Batches):
    """in_axes left out: with as many rows as members, each member sees one row."""
    recipe(batches, logits=eqx.filter_jit(eqx.filter_vmap(lambda model, tokens: model(tokens))))


@mistake()
def the_ensemble_is_called_as_one_model(batches: Batches):
    """Without eqx.filter_vmap: every array has an axis too many."""
    recipe(batches, logits=lambda model, tokens: model(tokens))


@mistake()
def jax_vmap_maps_what_is_no_array(batches: Batches):
    """jax.vmap instead of eqx.filter_vmap: the model holds more than arrays."""
    recipe(batches, logits=jax.vmap(lambda model, tokens: model(tokens), in_axes=(0, None)))


if __name__ == "__main__":
    demonstrate(__file__)
