"""Equinox modules that hold what relative positions learn."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from core.config import TransformerConfig
from core.layers import kernel_init, relative_init, site_keys
from core.relative import T5, Shaw, TransformerXL


class T5Positions(eqx.Module):
    """A logit for each bucket of distances and head, which all blocks of a stack share; embedding `[buckets, N]`."""

    bidirectional: bool = eqx.field(static=True)
    embedding: Float[Array, "R N"]
    max_distance: int = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, bidirectional: bool, key: PRNGKeyArray):
        (table_key,), shape = site_keys(key, 1), (config.relative_buckets, config.num_heads)
        self.bidirectional = bidirectional
        self.embedding = relative_init(table_key, shape, jnp.dtype(config.param_dtype))
        self.max_distance = config.relative_distance

    def __call__(self) -> T5:
        return T5(self.embedding, bidirectional=self.bidirectional, max_distance=self.max_distance)


class ShawPositions(eqx.Module):
    """A key and a value for each distance; key_embedding, value_embedding `[2 limit + 1, H or Hv]`."""

    key_embedding: Float[Array, "R H"]
    value_embedding: Float[Array, "R Hv"]

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        keys = iter(site_keys(key, 2))
        rows, dtype = 2 * config.relative_distance + 1, jnp.dtype(config.param_dtype)
        self.key_embedding = relative_init(next(keys), (rows, config.head_dim), dtype)
        self.value_embedding = relative_init(next(keys), (rows, config.value_width), dtype)

    def __call__(self) -> Shaw:
        return Shaw(self.key_embedding, self.value_embedding)


class TransformerXLPositions(eqx.Module):
    """content_bias (u) and position_bias (v) `[N, H]`, and the kernel `[D, N * H]` that projects distances."""

    content_bias: Float[Array, "N H"]
    kernel: Float[Array, "D O"]
    position_bias: Float[Array, "N H"]

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        keys, width, shape = iter(site_keys(key, 3)), config.d_model, (config.num_heads, config.head_dim)
        dtype = jnp.dtype(config.param_dtype)
        self.content_bias = relative_init(next(keys), shape, dtype)
        self.kernel = kernel_init(next(keys), (width, width), dtype)
        self.position_bias = relative_init(next(keys), shape, dtype)

    def __call__(self) -> TransformerXL:
        return TransformerXL(self.content_bias, self.kernel, self.position_bias)
