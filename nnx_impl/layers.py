"""Flax NNX modules that hold the parameters of core's small layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, Key, PRNGKeyArray

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
    unembed,
)
from core.positions import add_positions, position_ids

Rngs = nnx.Rngs | nnx.RngStream | PRNGKeyArray


def call_key(rngs: Rngs | None, dropout: "Dropout") -> PRNGKeyArray | None:
    """The key of one call: the next one of an NNX stream, or the key given; none where dropout is off."""
    return None if dropout.deterministic else stream_key(rngs, "dropout")


def stream_key(rngs: Rngs | Key[Array, "..."] | None, stream: str) -> Key[Array, "..."] | None:
    """The next key of the stream of that name, or of the one stream given, or the key that came."""
    if isinstance(rngs, nnx.Rngs):
        return rngs[stream]()
    return rngs() if isinstance(rngs, nnx.RngStream) else rngs


def sharded(*axes: str) -> dict[str, Any]:
    """Metadata that names a parameter's axes, for `nnx.get_partition_spec` and `nnx.logical_axis_rules`.

    Not eager: a model can be built under a mesh that knows none of these names.
    """
    return {"out_sharding": axes, "eager_sharding": False}


class Part(nnx.Module):
    """A module inside a model: its repr leaves the configuration to the model's own, which has it once."""

    def __nnx_repr__(self):
        return (shown for shown in super().__nnx_repr__() if getattr(shown, "key", None) != "config")


class Linear(nnx.Module):
    """x kernel + bias: `[*B, in] -> [*B, out]`; kernel `[in, out]`, bias `[out]`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        param_dtype: DTypeLike = "float32",
        axes: tuple[str, str] = ("in", "out"),
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(param_dtype)
        kernel = kernel_init(rngs.params(), (in_features, out_features), dtype)
        self.bias: nnx.Param[Array] | MaybeNone = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(out_features, dtype), **sharded(axes[1]))
        self.kernel = nnx.Param(kernel, **sharded(*axes))

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        return linear(x, self.kernel[...], None if self.bias is None else self.bias[...])


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis; scale `[D]`, bias `[D]`."""

    def __init__(
        self, features: int, *, epsilon: float = 1e-6, param_dtype: DTypeLike = "float32", axes: tuple[str] = ("embed",)
    ):
        self.bias = nnx.Param(jnp.zeros(features, jnp.dtype(param_dtype)), **sharded(*axes))
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features, jnp.dtype(param_dtype)), **sharded(*axes))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return layer_norm(x, self.scale[...], self.bias[...], epsilon=self.epsilon)


class RMSNorm(nnx.Module):
    """Root mean square normalisation over the last axis; scale `[D]`."""

    def __init__(
        self, features: int, *, epsilon: float = 1e-6, param_dtype: DTypeLike = "float32", axes: tuple[str] = ("embed",)
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features, jnp.dtype(param_dtype)), **sharded(*axes))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], epsilon=self.epsilon)


def norm_layer(config: TransformerConfig, features: int, *, axes: tuple[str] = ("embed",)) -> LayerNorm | RMSNorm:
    """The norm that the configuration names."""
    layer = LayerNorm if config.norm == "layer_norm" else RMSNorm
    return layer(features, epsilon=config.norm_epsilon, param_dtype=config.param_dtype, axes=axes)


class Embedding(nnx.Module):
    """Tokens to vectors, times scale; embedding `[V, D]`. Where it is tied, vectors to logits too."""

    def __init__(
        self, vocab_size: int, features: int, *, scale: float = 1.0, param_dtype: DTypeLike = "float32", rngs: nnx.Rngs
    ):
        table = embedding_init(rngs.params(), (vocab_size, features), jnp.dtype(param_dtype))
        self.embedding = nnx.Param(table, **sharded("vocab", "embed"))
        self.scale = scale

    @jax.named_scope("embedding")
    def __call__(self, tokens: Integer[Array, "*B"]) -> Float[Array, "*B D"]:
        return embed(tokens, self.embedding[...], scale=self.scale)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits against every row, not scaled."""
        return attend(x, self.embedding[...])


class Unembedding(nnx.Module):
    """Vectors to logits over a vocabulary; kernel `[D, V]`."""

    def __init__(self, features: int, vocab_size: int, *, param_dtype: DTypeLike = "float32", rngs: nnx.Rngs):
        kernel = kernel_init(rngs.params(), (features, vocab_size), jnp.dtype(param_dtype))
        self.kernel = nnx.Param(kernel, **sharded("embed", "vocab"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return unembed(x, self.kernel[...])


class PositionEmbedding(nnx.Module):
    """Adds where a token stands; embedding `[max_length, D]` if positions are learned, else nothing to learn."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.embedding: nnx.Param[Array] | MaybeNone = nnx.data(None)
        self.kind: Positions = config.positions
        if config.positions == "learned":
            shape = (config.max_length, config.d_model)
            table = embedding_init(rngs.params(), shape, jnp.dtype(config.param_dtype))
            self.embedding = nnx.Param(table, **sharded("position", "embed"))

    def __call__(
        self, x: Float[Array, "*B T D"], *, positions: Integer[Array, "..."] | None = None
    ) -> Float[Array, "*B T D"]:
        """Positions `[*B, T]`, 1 where they broadcast; None: from 0 on."""
        table = None if self.embedding is None else self.embedding[...]
        return add_positions(x, position_ids(x) if positions is None else positions, kind=self.kind, embedding=table)


class Dropout(nnx.Module):
    """Dropout by a key given at the call; nothing random is stored. In evaluation the identity.

    `depth_rate` is the rate at which a whole example is dropped, for the branch of a residual.
    """

    def __init__(self, rate: float, *, depth_rate: float = 0.0, deterministic: bool = False):
        check_rate("the dropout rate", rate)
        check_rate("the stochastic depth rate", depth_rate)
        self.depth_rate = depth_rate
        self.deterministic = deterministic
        self.rate = rate

    def __call__(
        self, x: Float[Array, "*S"], *, depth_rate: Float[Array, ""] | None = None, rngs: Rngs | None = None
    ) -> Float[Array, "*S"]:
        """A `depth_rate` here is that of the layer at hand, where one block stands for many."""
        own_rate = self.depth_rate if depth_rate is None else depth_rate
        return branch_dropout(x, self.rate, own_rate, key=self.site_key(rngs))

    def site_key(self, rngs: Rngs | None) -> PRNGKeyArray | None:
        """The key to use here and now: None in evaluation; ValueError if training lacks one."""
        rate = max(self.rate, self.depth_rate)
        return dropout_key(call_key(rngs, self), rate=rate, deterministic=self.deterministic)

    def set_view(self, deterministic: bool | None = None):
        """Read by `nnx.view`.

        Args:
          deterministic: True switches dropout off, False on.
        """
        if deterministic is not None:
            self.deterministic = deterministic
