"""The blocks of a stack as one Flax NNX block with stacked parameters, for a scan over layers."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from core.config import TransformerConfig
from nnx_impl.blocks import DecoderBlock, EncoderBlock

Block = TypeVar("Block", bound=EncoderBlock | DecoderBlock)


class StackedBlocks(nnx.Module, Generic[Block]):
    """Blocks held as one, `stacked`, whose parameters have a leading axis of layers; number i is `blocks[i]`, a copy.

    >>> config = TransformerConfig(d_model=8, num_heads=2, d_ff=16, scan_layers=True)
    >>> blocks = stack(lambda **given: EncoderBlock(config, **given), config, 3, rngs=nnx.Rngs(0))
    >>> blocks.stacked.attention.q_proj.kernel.shape, blocks[2].attention.q_proj.kernel.shape
    ((3, 8, 8), (8, 8))
    """

    def __init__(self, make: Callable[..., Block], depth_rates: tuple[float, ...], *, rngs: nnx.Rngs):
        each = jax.tree.map(lambda *x: jnp.stack(x), *(rngs.fork() for _ in depth_rates))
        self.depth_rates = depth_rates
        self.stacked = jax.vmap(lambda rngs: make(depth_rate=depth_rates[-1], rngs=rngs))(each)
        _rename_axes(self.stacked, lambda axes: ("layers", *axes))

    def __len__(self) -> int:
        return len(self.depth_rates)

    def __getitem__(self, index: int) -> Block:
        arrays, block_of = self.split()
        block = block_of(jax.tree.map(lambda x: x[index], arrays))
        block.dropout.depth_rate = self.depth_rates[index]
        _rename_axes(block, lambda axes: axes[1:])
        return block

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def split(self) -> tuple[PyTree[Array], Callable[[PyTree[Array]], Block]]:
        """The parameters, and what makes a block of one layer's."""
        graphdef, params = nnx.split(self.stacked)
        return params, lambda params: nnx.merge(graphdef, params)


def stack(
    make: Callable[..., Block], config: TransformerConfig, layers: int, *, rngs: nnx.Rngs
) -> nnx.List[Block] | StackedBlocks[Block]:
    """So many blocks, each by randomness of its own, as the configuration holds them."""
    depth_rates = tuple(config.depth_rate(i, layers) for i in range(layers))
    if config.scan_layers and layers:
        return StackedBlocks(make, depth_rates, rngs=rngs)
    return nnx.List([make(depth_rate=rate, rngs=rngs.fork()) for rate in depth_rates])


def _rename_axes(block: nnx.Module, renamed: Callable[[tuple], tuple]) -> None:
    for param in jax.tree.leaves(block, is_leaf=lambda x: isinstance(x, nnx.Param)):
        param.set_metadata(out_sharding=renamed(param.get_metadata()["out_sharding"]))
