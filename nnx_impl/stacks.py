"""Encoder and decoder: stacks of blocks, as Flax NNX modules."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Integer

from core.cache import DecoderCache, KeysValues, KVCache, empty_keys_values
from core.config import TransformerConfig
from core.layers import site_keys
from nnx_impl.blocks import DecoderBlock, EncoderBlock
from nnx_impl.layers import Dropout, PositionEmbedding, Rngs, call_key, norm_layer


class Encoder(nnx.Module):
    """A stack of encoder blocks over vectors of any kind: `[*B, S, D] -> [*B, S, D]`."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([EncoderBlock(config, rngs=rngs.fork()) for _ in range(config.num_encoder_layers)])
        self.config = config
        self.dropout = Dropout(config.dropout_rate)
        self.norm = norm_layer(config) if config.norm_order == "pre" else nnx.data(None)
        self.position_embedding = PositionEmbedding(config, rngs=rngs.fork())

    def __call__(
        self, x: Float[Array, "*B S D"], *, mask: Bool[Array, "..."] | None = None, rngs: Rngs | None = None
    ) -> Float[Array, "*B S D"]:
        """The memory that a decoder reads; `mask` broadcasts to `[*B, N, S, S]`."""
        return self.run(x, mask=mask, rngs=rngs)[0]

    def run(
        self,
        x: Float[Array, "*B S D"],
        *,
        mask: Bool[Array, "..."] | None = None,
        return_weights: bool = False,
        rngs: Rngs | None = None,
    ) -> tuple[Float[Array, "*B S D"], dict[str, Array]]:
        """The same, and each block's attention weights by name if asked for."""
        keys = site_keys(call_key(rngs, self.dropout), 1 + len(self.blocks))
        x = self.position_embedding(x.astype(jnp.dtype(self.config.dtype)))
        x = self.dropout(x, rngs=keys[0])
        extras = {}
        for i, (block, key) in enumerate(zip(self.blocks, keys[1:], strict=True)):
            x, extra = block.run(x, mask=mask, return_weights=return_weights, rngs=key)
            extras |= {f"blocks.{i}.{name}": value for name, value in extra.items()}
        return x if self.norm is None else self.norm(x), extras


class Decoder(nnx.Module):
    """A stack of decoder blocks over vectors: `[*B, T, D]`, `[*B, S, D] -> [*B, T, D]`."""

    def __init__(self, config: TransformerConfig, *, cross_attention: bool = True, rngs: nnx.Rngs):
        self.blocks = nnx.List(
            [
                DecoderBlock(config, cross_attention=cross_attention, rngs=rngs.fork())
                for _ in range(config.num_decoder_layers)
            ]
        )
        self.config = config
        self.dropout = Dropout(config.dropout_rate)
        self.norm = norm_layer(config) if config.norm_order == "pre" else nnx.data(None)
        self.position_embedding = PositionEmbedding(config, rngs=rngs.fork())

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        memory_mask: Bool[Array, "..."] | None = None,
        rngs: Rngs | None = None,
    ) -> Float[Array, "*B T D"]:
        """The decoder's output; `mask` broadcasts to `[*B, N, T, T]`, `memory_mask` to `[*B, N, T, S]`."""
        return self.run(x, memory, mask=mask, memory_mask=memory_mask, rngs=rngs)[0]

    def run(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        memory_mask: Bool[Array, "..."] | None = None,
        return_weights: bool = False,
        rngs: Rngs | None = None,
    ) -> tuple[Float[Array, "*B T D"], dict[str, Array]]:
        """The same, and each block's attention weights by name if asked for."""
        keys = site_keys(call_key(rngs, self.dropout), 1 + len(self.blocks))
        x = self.position_embedding(x.astype(jnp.dtype(self.config.dtype)))
        x = self.dropout(x, rngs=keys[0])
        extras = {}
        for i, (block, key) in enumerate(zip(self.blocks, keys[1:], strict=True)):
            x, extra = block.run(x, memory, mask=mask, memory_mask=memory_mask, return_weights=return_weights, rngs=key)
            extras |= {f"blocks.{i}.{name}": value for name, value in extra.items()}
        return x if self.norm is None else self.norm(x), extras

    def init_cache(
        self,
        batch: tuple[int, ...],
        capacity: int,
        memory: Float[Array, "*B S D"] | None = None,
        *,
        memory_mask: Bool[Array, "*B 1 1 S"] | None = None,
    ) -> DecoderCache:
        """An empty cache of `capacity` tokens a row, with the memory's keys and values computed once."""
        if self.config.positions == "learned" and capacity > self.config.max_length:
            raise ValueError(
                f"learned positions end at max_length={self.config.max_length}, the cache was to hold {capacity}; "
                "generate less or raise max_length in the configuration"
            )
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        slots = [empty_keys_values(batch, capacity, config.kv_heads, config.head_dim, dtype) for _ in self.blocks]
        projected = (
            ()
            if memory is None
            else tuple(
                block.cross_attention.keys_values(memory) for block in self.blocks if block.cross_attention is not None
            )
        )
        return DecoderCache(tuple(slots), projected, memory_mask, jnp.zeros(batch, jnp.int32))

    def step(
        self, x: Float[Array, "*B T D"], cache: DecoderCache, *, count: Integer[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], DecoderCache]:
        """The output at T more tokens, of which the first `count` of each row are real."""
        x = self.position_embedding(x.astype(jnp.dtype(self.config.dtype)), offset=cache.length)
        memories: tuple[KeysValues | None, ...] = cache.memory or (None,) * len(self.blocks)
        grown = []
        for block, slots, memory in zip(self.blocks, cache.attention, memories, strict=True):
            x, extra = block.run(x, memory, memory_mask=cache.memory_mask, cache=KVCache(slots, cache.length))
            grown.append(extra["attention"].keys_values)
        length = cache.length + (x.shape[-2] if count is None else count)
        x = x if self.norm is None else self.norm(x)
        return x, cache._replace(attention=tuple(grown), length=length)
