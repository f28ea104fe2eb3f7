"""Equinox modules that hold the parameters of core's small layers.

Array fields stand in alphabetical order, so that leaves flatten in the order of Flax NNX, by name: sums over a whole
tree, such as the norm that gradients are clipped by, then agree in bits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from core.config import MaybeNone, Positions, TransformerConfig, check_rate
from core.layers import (
    attend,
    branch_dropout,
    dropout_key,
    embed,
    embedding_init,
    kernel_init,
    layer_norm,
    linear,
    rms_norm,
    site_keys,
    unembed,
)
from core.positions import add_positions, position_ids


class Linear(eqx.Module):
    """x kernel + bias: `[*B, in] -> [*B, out]`; kernel `[in, out]`, bias `[out]`."""

    bias: Float[Array, "O"] | MaybeNone
    kernel: Float[Array, "I O"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        param_dtype: DTypeLike = "float32",
        key: PRNGKeyArray,
    ):
        (kernel_key,), dtype = site_keys(key, 1), jnp.dtype(param_dtype)
        self.bias = jnp.zeros(out_features, dtype) if use_bias else None
        self.kernel = kernel_init(kernel_key, (in_features, out_features), dtype)

    def __call__(self, x: Float[Array, "*B I"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*B O"]:
        return linear(x, self.kernel, self.bias)


class LayerNorm(eqx.Module):
    """Layer normalisation over the last axis; scale `[D]`, bias `[D]`."""

    bias: Float[Array, "D"]
    epsilon: float = eqx.field(static=True)
    scale: Float[Array, "D"]

    def __init__(self, features: int, *, epsilon: float = 1e-6, param_dtype: DTypeLike = "float32"):
        self.bias = jnp.zeros(features, jnp.dtype(param_dtype))
        self.epsilon = epsilon
        self.scale = jnp.ones(features, jnp.dtype(param_dtype))

    def __call__(self, x: Float[Array, "*B D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*B D"]:
        return layer_norm(x, self.scale, self.bias, epsilon=self.epsilon)


class RMSNorm(eqx.Module):
    """Root mean square normalisation over the last axis; scale `[D]`."""

    epsilon: float = eqx.field(static=True)
    scale: Float[Array, "D"]

    def __init__(self, features: int, *, epsilon: float = 1e-6, param_dtype: DTypeLike = "float32"):
        self.epsilon = epsilon
        self.scale = jnp.ones(features, jnp.dtype(param_dtype))

    def __call__(self, x: Float[Array, "*B D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale, epsilon=self.epsilon)


def norm_layer(config: TransformerConfig, features: int) -> LayerNorm | RMSNorm:
    """The norm that the configuration names."""
    layer = LayerNorm if config.norm == "layer_norm" else RMSNorm
    return layer(features, epsilon=config.norm_epsilon, param_dtype=config.param_dtype)


class Embedding(eqx.Module):
    """Tokens to vectors, times scale; embedding `[V, D]`. Where it is tied, vectors to logits too."""

    embedding: Float[Array, "V D"]
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        scale: float = 1.0,
        param_dtype: DTypeLike = "float32",
        key: PRNGKeyArray,
    ):
        (table_key,) = site_keys(key, 1)
        self.embedding = embedding_init(table_key, (vocab_size, features), jnp.dtype(param_dtype))
        self.scale = scale

    @jax.named_scope("embedding")
    def __call__(self, tokens: Integer[Array, "*B"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*B D"]:
        return embed(tokens, self.embedding, scale=self.scale)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits against every row, not scaled."""
        return attend(x, self.embedding)


class Unembedding(eqx.Module):
    """Vectors to logits over a vocabulary; kernel `[D, V]`."""

    kernel: Float[Array, "D V"]

    def __init__(self, features: int, vocab_size: int, *, param_dtype: DTypeLike = "float32", key: PRNGKeyArray):
        (kernel_key,) = site_keys(key, 1)
        self.kernel = kernel_init(kernel_key, (features, vocab_size), jnp.dtype(param_dtype))

    def __call__(self, x: Float[Array, "*B D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*B V"]:
        return unembed(x, self.kernel)


class PositionEmbedding(eqx.Module):
    """Adds where a token stands; embedding `[max_length, D]` if positions are learned, else nothing to learn."""

    embedding: Float[Array, "L D"] | MaybeNone
    kind: Positions = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        self.embedding = None
        self.kind = config.positions
        if config.positions == "learned":
            (table_key,), shape = site_keys(key, 1), (config.max_length, config.d_model)
            self.embedding = embedding_init(table_key, shape, jnp.dtype(config.param_dtype))

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        *,
        positions: Integer[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B T D"]:
        """Positions `[*B, T]`, 1 where they broadcast; None: from 0 on."""
        table = self.embedding
        return add_positions(x, position_ids(x) if positions is None else positions, kind=self.kind, embedding=table)


class Dropout(eqx.Module):
    """Dropout by a key given at the call. With `inference` the identity.

    `depth_rate` is the rate at which a whole example is dropped, for the branch of a residual.
    """

    depth_rate: float = eqx.field(static=True)
    inference: bool
    rate: float = eqx.field(static=True)

    def __init__(self, rate: float, *, depth_rate: float = 0.0, inference: bool = False):
        check_rate("the dropout rate", rate)
        check_rate("the stochastic depth rate", depth_rate)
        self.depth_rate = depth_rate
        self.inference = inference
        self.rate = rate

    def __call__(
        self, x: Float[Array, "*S"], *, depth_rate: Float[Array, ""] | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*S"]:
        """A `depth_rate` here is that of the layer at hand, where one block stands for many."""
        own_rate = self.depth_rate if depth_rate is None else depth_rate
        return branch_dropout(x, self.rate, own_rate, key=self.site_key(key))

    def site_key(self, key: PRNGKeyArray | None) -> PRNGKeyArray | None:
        """The key to use here and now: None in inference; ValueError if training lacks one."""
        rate = max(self.rate, self.depth_rate)
        return dropout_key(key, rate=rate, deterministic=self.inference)
