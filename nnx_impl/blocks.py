"""The encoder's and the decoder's block as Flax NNX modules."""

import functools
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float

from core.cache import KeysValues, KVCache
from core.config import Activation, NormOrder, TransformerConfig
from core.layers import feed_forward, residual, site_keys
from nnx_impl.attention import MultiHeadAttention
from nnx_impl.layers import Dropout, Linear, Rngs, call_key, norm_layer


class FeedForward(nnx.Module):
    """Position-wise feed-forward network of width F; swiglu has a gate beside the up projection."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=config.feed_forward_bias, param_dtype=config.param_dtype)
        inward, outward = ("embed", "mlp"), ("mlp", "embed")
        self.activation: Activation = config.activation
        self.down_proj = linear(config.d_ff, config.d_model, axes=outward, rngs=rngs.fork())
        self.gate_proj = nnx.data(None)
        if config.activation == "swiglu":
            self.gate_proj = linear(config.d_model, config.d_ff, axes=inward, rngs=rngs.fork())
        self.up_proj = linear(config.d_model, config.d_ff, axes=inward, rngs=rngs.fork())

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return feed_forward(x, self.up_proj, self.down_proj, self.gate_proj, activation=self.activation)


class EncoderBlock(nnx.Module):
    """Self-attention, then feed-forward, each inside a residual."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.attention = MultiHeadAttention(config, rngs=rngs.fork())
        self.attention_norm = norm_layer(config)
        self.dropout = Dropout(config.dropout_rate)
        self.feed_forward = FeedForward(config, rngs=rngs.fork())
        self.feed_forward_norm = norm_layer(config)
        self.norm_order: NormOrder = config.norm_order

    def __call__(
        self, x: Float[Array, "*B S D"], *, mask: Bool[Array, "..."] | None = None, rngs: Rngs | None = None
    ) -> Float[Array, "*B S D"]:
        """The block's output."""
        return self.run(x, mask=mask, rngs=rngs)[0]

    def run(
        self,
        x: Float[Array, "*B S D"],
        *,
        mask: Bool[Array, "..."] | None = None,
        return_weights: bool = False,
        rngs: Rngs | None = None,
    ) -> tuple[Float[Array, "*B S D"], dict[str, Any]]:
        """The same, and its attention weights by name if asked for."""
        keys = site_keys(call_key(rngs, self.dropout), 3)
        wrap = functools.partial(residual, norm_order=self.norm_order)
        x, weights = wrap(
            x,
            functools.partial(self.attention.run, mask=mask, return_weights=return_weights, rngs=keys[0]),
            norm=self.attention_norm,
            dropout=functools.partial(self.dropout, rngs=keys[1]),
        )
        x, _ = wrap(
            x,
            lambda x: (self.feed_forward(x), None),
            norm=self.feed_forward_norm,
            dropout=functools.partial(self.dropout, rngs=keys[2]),
        )
        return x, {} if weights is None else {"attention": weights}


class DecoderBlock(nnx.Module):
    """Causal self-attention, attention to a memory unless there is none, feed-forward, each inside a residual."""

    def __init__(self, config: TransformerConfig, *, cross_attention: bool = True, rngs: nnx.Rngs):
        self.attention = MultiHeadAttention(config, rngs=rngs.fork())
        self.attention_norm = norm_layer(config)
        self.cross_attention = nnx.data(None)
        self.cross_attention_norm = nnx.data(None)
        if cross_attention:
            self.cross_attention = MultiHeadAttention(config, rngs=rngs.fork())
            self.cross_attention_norm = norm_layer(config)
        self.dropout = Dropout(config.dropout_rate)
        self.feed_forward = FeedForward(config, rngs=rngs.fork())
        self.feed_forward_norm = norm_layer(config)
        self.norm_order: NormOrder = config.norm_order

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        memory_mask: Bool[Array, "..."] | None = None,
        rngs: Rngs | None = None,
    ) -> Float[Array, "*B T D"]:
        """The block's output. `mask` is joined with the causal one."""
        return self.run(x, memory, mask=mask, memory_mask=memory_mask, rngs=rngs)[0]

    def run(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        memory_mask: Bool[Array, "..."] | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
        rngs: Rngs | None = None,
    ) -> tuple[Float[Array, "*B T D"], dict[str, Any]]:
        """The same, and by name what was asked for besides: the grown cache, or the attention weights."""
        if (memory is None) != (self.cross_attention is None):
            raise ValueError("a decoder block with cross-attention needs a memory, and one without takes none")
        keys = site_keys(call_key(rngs, self.dropout), 5)
        wrap = functools.partial(residual, norm_order=self.norm_order)
        x, extra = wrap(
            x,
            functools.partial(
                self.attention.run, mask=mask, causal=True, cache=cache, return_weights=return_weights, rngs=keys[0]
            ),
            norm=self.attention_norm,
            dropout=functools.partial(self.dropout, rngs=keys[1]),
        )
        cross_extra = None
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            x, cross_extra = wrap(
                x,
                functools.partial(
                    self.cross_attention.run,
                    memory=memory,
                    mask=memory_mask,
                    return_weights=return_weights,
                    rngs=keys[2],
                ),
                norm=self.cross_attention_norm,
                dropout=functools.partial(self.dropout, rngs=keys[3]),
            )
        x, _ = wrap(
            x,
            lambda x: (self.feed_forward(x), None),
            norm=self.feed_forward_norm,
            dropout=functools.partial(self.dropout, rngs=keys[4]),
        )
        extras = {"attention": extra, "cross_attention": cross_extra}
        return x, {name: value for name, value in extras.items() if value is not None}
