"""Scan over layers with rematerialisation, in Equinox: one block whose arrays have a leading axis of layers."""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import EncoderBlock

LAYERS = 3


@eqx.filter_vmap
def stacked(key):
    return EncoderBlock(CONFIG, key=key)


def scanned(blocks, x, mask=None):
    """x after all blocks; each is computed again in the backward pass."""
    params, rest = eqx.partition(blocks, eqx.is_array)

    @eqx.filter_checkpoint
    def layer(x, params):
        return eqx.combine(params, rest)(x, mask=mask), None

    return jax.lax.scan(layer, x, params)[0]


def looped(blocks, x):
    for block in unstacked(blocks):
        x = block(x)
    return x


def unstacked(blocks):
    params, rest = eqx.partition(blocks, eqx.is_array)
    return [eqx.combine(jax.tree.map(operator.itemgetter(i), params), rest) for i in range(LAYERS)]


def recipe(
    batches: Batches,
    *,
    stacked: Callable[..., Any] = lambda key: stacked(jax.random.split(key, LAYERS)),
    scanned: Callable[..., Any] = scanned,
):
    """The scan gives what a loop over the layers gives, gradients too; the layers differ."""
    blocks = stacked(jax.random.fold_in(jax.random.key(0), 0))  # the first key that nnx.Rngs(0) gives
    x = jax.random.normal(jax.random.key(1), (*next(batches).source.shape, 8))
    square = lambda run: eqx.filter_jit(eqx.filter_value_and_grad(lambda blocks, x: jnp.square(run(blocks, x)).sum()))
    (loss, grads), (expected, expected_grads) = square(scanned)(blocks, x), square(looped)(blocks, x)

    kernels = blocks.attention.q_proj.kernel
    assert kernels.shape == (LAYERS, 8, 8)
    assert len(np.unique(kernels[:, 0, 0])) == LAYERS, "all layers begin as the same"
    assert np.allclose(loss, expected, rtol=1e-5), f"scanned {loss:.3f}, looped {expected:.3f}"
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.allclose(found, wanted, atol=1e-4)
    return loss


@mistake()
def every_layer_is_made_of_the_same_key(batches: Batches):
    """The key is broadcast and not split."""
    same = eqx.filter_vmap(lambda key: EncoderBlock(CONFIG, key=key), in_axes=None, axis_size=LAYERS)
    recipe(batches, stacked=same)


@mistake()
def the_block_is_not_partitioned(batches: Batches):
    """jax.lax.scan over the block itself, which holds more than arrays."""
    recipe(batches, scanned=lambda blocks, x: jax.lax.scan(lambda x, block: (block(x), None), x, blocks)[0])


@mistake()
def the_blocks_are_in_a_tuple(batches: Batches):
    """jax.lax.scan over a tuple of blocks, not over one block of stacked arrays."""

    def listed(blocks, x):
        each, rest = eqx.partition(tuple(unstacked(blocks)), eqx.is_array)
        layer = lambda x, params: (eqx.combine(params, rest[0])(x), None)
        return jax.lax.scan(layer, x, each)[0]

    recipe(batches, scanned=listed)


if __name__ == "__main__":
    demonstrate(__file__)
