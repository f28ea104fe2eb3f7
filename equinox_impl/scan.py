"""The blocks of a stack as one Equinox block with stacked parameters, for a scan over layers."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from core.config import TransformerConfig
from core.layers import site_keys
from equinox_impl.blocks import DecoderBlock, EncoderBlock

Block = TypeVar("Block", bound=EncoderBlock | DecoderBlock)


class StackedBlocks(eqx.Module, Generic[Block]):
    """Blocks held as one, `stacked`, whose parameters have a leading axis of layers; number i is `blocks[i]`, a copy.

    >>> config = TransformerConfig(d_model=8, num_heads=2, d_ff=16, scan_layers=True)
    >>> blocks = stack(lambda **given: EncoderBlock(config, **given), config, 3, key=jax.random.key(0))
    >>> blocks.stacked.attention.q_proj.kernel.shape, blocks[2].attention.q_proj.kernel.shape
    ((3, 8, 8), (8, 8))
    """

    depth_rates: tuple[float, ...] = eqx.field(static=True)
    stacked: Block

    def __init__(self, make: Callable[..., Block], depth_rates: tuple[float, ...], *, key: PRNGKeyArray):
        each = jnp.stack(site_keys(key, len(depth_rates)))
        self.depth_rates = depth_rates
        self.stacked = eqx.filter_vmap(lambda key: make(depth_rate=depth_rates[-1], key=key))(each)

    def __len__(self) -> int:
        return len(self.depth_rates)

    def __getitem__(self, index: int) -> Block:
        arrays, block_of = self.split()
        block = block_of(jax.tree.map(lambda x: x[index], arrays))
        own = dataclasses.replace(block.dropout, depth_rate=self.depth_rates[index])
        return eqx.tree_at(lambda block: block.dropout, block, own)

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def split(self) -> tuple[PyTree[Array], Callable[[PyTree[Array]], Block]]:
        """The parameters, and what makes a block of one layer's."""
        params, static = eqx.partition(self.stacked, eqx.is_array)
        return params, lambda params: eqx.combine(params, static)


def stack(
    make: Callable[..., Block], config: TransformerConfig, layers: int, *, key: PRNGKeyArray
) -> tuple[Block, ...] | StackedBlocks[Block]:
    """So many blocks, each by randomness of its own, as the configuration holds them."""
    depth_rates = tuple(config.depth_rate(i, layers) for i in range(layers))
    if config.scan_layers and layers:
        return StackedBlocks(make, depth_rates, key=key)
    return tuple(make(depth_rate=rate, key=own) for rate, own in zip(depth_rates, site_keys(key, layers), strict=True))
