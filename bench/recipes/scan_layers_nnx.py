"""Scan over layers with rematerialisation, in NNX: one block whose parameters have a leading axis of layers."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import EncoderBlock

LAYERS = 3


@nnx.vmap
def stacked(rngs):
    return EncoderBlock(CONFIG, rngs=rngs)


def scanned(blocks, x, mask=None):
    """x after all blocks; each is computed again in the backward pass."""
    graphdef, params = nnx.split(blocks)

    @jax.checkpoint
    def layer(x, params):
        return nnx.merge(graphdef, params)(x, mask=mask), None

    return jax.lax.scan(layer, x, params)[0]


def looped(blocks, x):
    for block in unstacked(blocks):
        x = block(x)
    return x


def unstacked(blocks):
    return [jax.tree.map(operator.itemgetter(i), blocks) for i in range(LAYERS)]


def recipe(
    batches: Batches,
    *,
    stacked: Callable[..., Any] = lambda rngs: stacked(rngs.split(LAYERS)),
    scanned: Callable[..., Any] = scanned,
):
    """The scan gives what a loop over the layers gives, gradients too; the layers differ."""
    blocks = stacked(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (*next(batches).source.shape, 8))
    square = lambda run: jax.jit(jax.value_and_grad(lambda blocks, x: jnp.square(run(blocks, x)).sum()))
    (loss, grads), (expected, expected_grads) = square(scanned)(blocks, x), square(looped)(blocks, x)

    kernels = blocks.attention.q_proj.kernel
    assert kernels.shape == (LAYERS, 8, 8)
    assert len(np.unique(kernels[:, 0, 0])) == LAYERS, "all layers begin as the same"
    assert np.allclose(loss, expected, rtol=1e-5), f"scanned {loss:.3f}, looped {expected:.3f}"
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.allclose(found, wanted, atol=1e-4)
    return loss


@mistake("flax #4195")
def every_layer_is_made_of_the_same_key(batches: Batches):
    """The rngs are broadcast and not split."""
    same = nnx.vmap(lambda rngs: EncoderBlock(CONFIG, rngs=rngs), in_axes=None, axis_size=LAYERS)
    recipe(batches, stacked=same)


@mistake()
def the_blocks_are_in_a_list(batches: Batches):
    """jax.lax.scan over an nnx.List of blocks, not over one block of stacked parameters."""

    def listed(blocks, x):
        each = nnx.List(unstacked(blocks))
        return jax.lax.scan(lambda x, block: (block(x), None), x, each)[0]

    recipe(batches, scanned=listed)


@mistake()
def nnx_scan_is_given_no_axes(batches: Batches):
    """nnx.scan with the arguments in the order (blocks, x) and the axes left out: the first is the carry."""
    recipe(batches, scanned=nnx.scan(lambda blocks, x: (blocks(x), None)))


if __name__ == "__main__":
    demonstrate(__file__)
