"""Flax NNX modules that hold what relative positions learn."""

import jax.numpy as jnp
from flax import nnx

from core.config import TransformerConfig
from core.layers import kernel_init, relative_init
from core.relative import T5, Shaw, TransformerXL
from nnx_impl.layers import sharded


class T5Positions(nnx.Module):
    """A logit for each bucket of distances and head, which all blocks of a stack share; embedding `[buckets, N]`."""

    def __init__(self, config: TransformerConfig, *, bidirectional: bool, rngs: nnx.Rngs):
        shape = (config.relative_buckets, config.num_heads)
        table = relative_init(rngs.params(), shape, jnp.dtype(config.param_dtype))
        self.bidirectional = bidirectional
        self.embedding = nnx.Param(table, **sharded("position", "heads"))
        self.max_distance = config.relative_distance

    def __call__(self) -> T5:
        return T5(self.embedding[...], bidirectional=self.bidirectional, max_distance=self.max_distance)


class ShawPositions(nnx.Module):
    """A key and a value for each distance; key_embedding, value_embedding `[2 limit + 1, H or Hv]`."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        rows, dtype = 2 * config.relative_distance + 1, jnp.dtype(config.param_dtype)
        keys = relative_init(rngs.params(), (rows, config.head_dim), dtype)
        values = relative_init(rngs.params(), (rows, config.value_width), dtype)
        self.key_embedding = nnx.Param(keys, **sharded("position", "head"))
        self.value_embedding = nnx.Param(values, **sharded("position", "head"))

    def __call__(self) -> Shaw:
        return Shaw(self.key_embedding[...], self.value_embedding[...])


class TransformerXLPositions(nnx.Module):
    """content_bias (u) and position_bias (v) `[N, H]`, and the kernel `[D, N * H]` that projects distances."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, shape = config.d_model, (config.num_heads, config.head_dim)
        dtype = jnp.dtype(config.param_dtype)
        self.content_bias = nnx.Param(relative_init(rngs.params(), shape, dtype), **sharded("heads", "head"))
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, width), dtype), **sharded("embed", "heads"))
        self.position_bias = nnx.Param(relative_init(rngs.params(), shape, dtype), **sharded("heads", "head"))

    def __call__(self) -> TransformerXL:
        return TransformerXL(self.content_bias[...], self.kernel[...], self.position_bias[...])
