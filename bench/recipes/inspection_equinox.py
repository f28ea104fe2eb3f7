"""Count, print and inspect, in Equinox: sizes of the arrays, the tree as text, a model of shapes alone."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer


def is_shaped(leaf):
    """An array, or the shape of one."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def count(model):
    return sum(array.size for array in jax.tree.leaves(eqx.filter(model, is_shaped)))


def recipe(batches: Batches, *, count: Callable[[Any], int] = count, printed: Callable[[Any], str] = eqx.tree_pformat):
    """672 parameters, by hand as by program; the text names each module; a model of 10^9 costs no memory."""
    model = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    found = count(model)
    by_hand = 11 * 8 + 4 * 8 * 8 + (2 * 8 * 16 + 16 + 8) + 3 * 2 * 8
    assert found == by_hand == 672, f"counted {found}, not 672"

    text = printed(model)
    assert "feed_forward=FeedForward(" in text, "the text does not name the feed-forward network"
    assert "kernel=f32[8,16]" in text, "the text does not tell shapes"
    large = CONFIG.replace(target_vocab_size=50_000, d_model=4096, d_ff=16384, num_decoder_layers=4)
    billions = count(eqx.filter_eval_shape(DecoderOnlyTransformer, large, key=jax.random.key(0)))
    assert billions > 10**9, f"counted {billions}"
    return np.array([found, billions])


@mistake()
def all_leaves_are_counted(batches: Batches):
    """np.size of every leaf: the switches of dropout count too."""
    recipe(batches, count=lambda model: sum(np.size(leaf) for leaf in jax.tree.leaves(model)))


@mistake("equinox #681")
def every_leaf_is_taken_for_an_array(batches: Batches):
    """leaf.size of every leaf: some are bools."""
    recipe(batches, count=lambda model: sum(leaf.size for leaf in jax.tree.leaves(model)))


@mistake()
def only_arrays_are_counted_where_there_are_shapes(batches: Batches):
    """eqx.is_array of a model from eqx.filter_eval_shape: it has shapes and no arrays."""
    recipe(batches, count=lambda model: sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))))


if __name__ == "__main__":
    demonstrate(__file__)
