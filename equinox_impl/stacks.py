"""Encoder and decoder: stacks of blocks, as Equinox modules."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from core.cache import DecoderCache, KVCache, Slots, as_slots, empty_slots
from core.config import MaybeNone, TransformerConfig
from core.depth import over_layers
from core.layers import site_keys
from core.masks import Mask, Offset, Padding
from core.positions import position_ids
from core.relative import extend_history
from equinox_impl.blocks import DecoderBlock, EncoderBlock
from equinox_impl.layers import Dropout, LayerNorm, PositionEmbedding, RMSNorm, norm_layer
from equinox_impl.relative import T5Positions
from equinox_impl.scan import StackedBlocks, stack


class Encoder(eqx.Module):
    """A stack of encoder blocks over vectors of any kind: `[*B, S, D] -> [*B, S, D]`."""

    blocks: tuple[EncoderBlock, ...] | StackedBlocks[EncoderBlock]
    config: TransformerConfig = eqx.field(static=True, repr=False)
    dropout: Dropout
    norm: LayerNorm | RMSNorm | MaybeNone
    position_embedding: PositionEmbedding
    relative: T5Positions | MaybeNone

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        layers = config.num_encoder_layers
        position_key, relative_key = site_keys(key, layers + 2)[layers:]
        self.blocks = stack(functools.partial(EncoderBlock, config), config, layers, key=key)
        self.config = config
        self.dropout = Dropout(config.stack_dropout_rate)
        self.norm = None if config.norm_order == "post" else norm_layer(config, config.d_model)
        self.position_embedding = PositionEmbedding(config, key=position_key)
        self.relative = None
        if config.positions == "t5":
            self.relative = T5Positions(config, bidirectional=True, key=relative_key)

    def __call__(
        self,
        x: Float[Array, "*B S D"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B S D"]:
        """The memory that a decoder reads; `mask` broadcasts to `[*B, N, S, S]`."""
        return self.run(x, mask=mask, key=key)[0]

    @jax.named_scope("encoder")
    def run(
        self,
        x: Float[Array, "*B S D"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        positions: Integer[Array, "*B S"] | None = None,
        return_weights: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B S D"], dict[str, Any]]:
        """The same, and each block's attention weights by name if asked for.

        `positions` are for absolute encodings, where they do not count from 0 on.
        """
        x = self.position_embedding(x.astype(jnp.dtype(self.config.dtype)), positions=positions)
        x = self.dropout(x, key=site_keys(key, 1)[0])
        relative = None if self.relative is None else self.relative()

        def layer(block: EncoderBlock, x: Array, _: Array | None, key: PRNGKeyArray | None, depth_rate: Array | None):
            return block.run(
                x, mask=mask, relative=relative, return_weights=return_weights, depth_rate=depth_rate, key=key
            )

        x, extras = over_layers(layer, x, self.blocks, config=self.config, key=key)
        return x if self.norm is None else self.norm(x), extras


class Decoder(eqx.Module):
    """A stack of decoder blocks over vectors: `[*B, T, D]`, `[*B, S, D] -> [*B, T, D]`."""

    blocks: tuple[DecoderBlock, ...] | StackedBlocks[DecoderBlock]
    config: TransformerConfig = eqx.field(static=True, repr=False)
    dropout: Dropout
    norm: LayerNorm | RMSNorm | MaybeNone
    position_embedding: PositionEmbedding
    relative: T5Positions | MaybeNone

    def __init__(self, config: TransformerConfig, *, cross_attention: bool = True, key: PRNGKeyArray):
        block = functools.partial(DecoderBlock, config, cross_attention=cross_attention)
        layers = config.num_decoder_layers
        position_key, relative_key = site_keys(key, layers + 2)[layers:]
        self.blocks = stack(block, config, layers, key=key)
        self.config = config
        self.dropout = Dropout(config.stack_dropout_rate)
        self.norm = None if config.norm_order == "post" else norm_layer(config, config.d_model)
        self.position_embedding = PositionEmbedding(config, key=position_key)
        self.relative = None
        if config.positions == "t5":
            self.relative = T5Positions(config, bidirectional=False, key=relative_key)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | None = None,
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        memory_mask: Mask | Bool[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B T D"]:
        """The decoder's output; `mask` broadcasts to `[*B, N, T, T]`, `memory_mask` to `[*B, N, T, S]`."""
        return self.run(x, memory, mask=mask, memory_mask=memory_mask, key=key)[0]

    @jax.named_scope("decoder")
    def run(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | None = None,
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        memory_mask: Mask | Bool[Array, "..."] | None = None,
        positions: Integer[Array, "*B T"] | None = None,
        prefix: Offset | None = None,
        history: tuple[Float[Array, "*B M D"], ...] | None = None,
        return_weights: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B T D"], dict[str, Any]]:
        """The same, and each block's attention weights by name if asked for.

        `positions` are for absolute encodings, where they do not count from 0 on; the first `prefix` tokens see each
        other. A configuration with a history_length adds "history", to be given with the segment that follows: each
        block's last inputs, which its attention reads as if they stood before x, without gradients to them.
        """
        x = self.position_embedding(x.astype(jnp.dtype(self.config.dtype)), positions=positions)
        x = self.dropout(x, key=site_keys(key, 1)[0])
        relative = None if self.relative is None else self.relative()

        def layer(
            block: DecoderBlock, x: Array, past: Array | None, key: PRNGKeyArray | None, depth_rate: Array | None
        ):
            kept = {}
            if self.config.history_length:
                past_inputs = x[..., :0, :] if past is None else past
                kept["history"] = extend_history(past_inputs, x, self.config.history_length)
            x, extra = block.run(
                x, memory, mask=mask, memory_mask=memory_mask, prefix=prefix, relative=relative, history=past,
                return_weights=return_weights, depth_rate=depth_rate, key=key,
            )  # fmt: skip
            return x, extra | kept

        x, extras = over_layers(layer, x, self.blocks, self._histories(x, history), config=self.config, key=key)
        if self.config.history_length:
            extras["history"] = tuple(extras.pop(f"blocks.{i}.history") for i in range(len(self.blocks)))
        return x if self.norm is None else self.norm(x), extras

    def _histories(self, x: Array, history: tuple[Array, ...] | None) -> tuple[Array, ...] | None:
        if history is None:
            return None
        if not self.config.history_length:
            raise ValueError("a history needs history_length in the configuration, got 0")
        if len(history) != len(self.blocks):
            raise ValueError(f"history holds each block's inputs, {len(self.blocks)} here, got {len(history)}")
        if any((*past.shape[:-2], past.shape[-1]) != (*x.shape[:-2], x.shape[-1]) for past in history):
            shapes = [tuple(past.shape) for past in history]
            raise ValueError(f"a history must fit its segment {x.shape} in all but the length, got {shapes}")
        return tuple(jax.lax.stop_gradient(past.astype(x.dtype)) for past in history)

    def init_cache(
        self,
        batch: tuple[int, ...],
        capacity: int,
        memory: Float[Array, "*B S D"] | None = None,
        *,
        memory_mask: Padding | None = None,
        prefix: Integer[Array, "*B"] | None = None,
    ) -> DecoderCache:
        """An empty cache of `capacity` tokens a row, with the memory's keys and values computed once.

        The first `prefix` tokens of each row, which come in one step, see each other.
        """
        if self.config.positions == "learned" and capacity > self.config.max_length:
            raise ValueError(
                f"learned positions end at max_length={self.config.max_length}, the cache was to hold {capacity}; "
                "generate less or raise max_length in the configuration"
            )
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        empty = functools.partial(empty_slots, batch, capacity, config.kv_heads, config.head_dim, dtype)
        slots = [empty(value_width=config.value_width) for _ in self.blocks]
        projected = (
            ()
            if memory is None
            else tuple(
                as_slots(block.cross_attention.keys_values(memory))
                for block in self.blocks
                if block.cross_attention is not None
            )
        )
        return DecoderCache(tuple(slots), projected, memory_mask, jnp.zeros(batch, jnp.int32), prefix)

    @jax.named_scope("decoder")
    def step(
        self, x: Float[Array, "*B T D"], cache: DecoderCache, *, count: Integer[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], DecoderCache]:
        """The output at T more tokens, of which the first `count` of each row are real."""
        if len(cache.attention) != len(self.blocks) or cache.length.shape != x.shape[:-2]:
            raise ValueError(
                "a cache goes with its model and its batch, "
                f"got {len(cache.attention)} layers and rows {cache.length.shape} for {len(self.blocks)} layers and "
                f"rows {x.shape[:-2]}"
            )
        x = x.astype(jnp.dtype(self.config.dtype))
        x = self.position_embedding(x, positions=position_ids(x, cache.length))
        relative = None if self.relative is None else self.relative()
        memories: tuple[Slots | None, ...] = cache.memory or (None,) * len(self.blocks)
        grown = []
        for i, (block, slots, memory) in enumerate(zip(self.blocks, cache.attention, memories, strict=True)):
            with jax.named_scope(f"blocks.{i}"):
                x, extra = block.run(
                    x, memory, memory_mask=cache.memory_mask, prefix=cache.prefix, relative=relative,
                    cache=KVCache(slots, cache.length, cache.owners),
                )  # fmt: skip
            grown.append(extra["attention"].slots)
        length = cache.length + (x.shape[-2] if count is None else count)
        x = x if self.norm is None else self.norm(x)
        return x, cache._replace(attention=tuple(grown), length=length)
