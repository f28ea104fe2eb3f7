"""The encoder's and the decoder's block as Flax NNX modules."""

import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from core.cache import KeysValues, KVCache, Slots
from core.config import Activation, MaybeNone, TransformerConfig
from core.layers import GATED, feed_forward, residual, site_keys
from core.masks import Mask, Offset
from core.relative import Relative
from nnx_impl.attention import MultiHeadAttention
from nnx_impl.layers import Dropout, LayerNorm, Linear, Part, RMSNorm, Rngs, call_key, norm_layer


class FeedForward(nnx.Module):
    """Position-wise feed-forward network of width F; a gated one has a gate beside the up projection."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=config.feed_forward_bias, param_dtype=config.param_dtype)
        inward, outward = ("embed", "mlp"), ("mlp", "embed")
        self.activation: Activation = config.activation
        self.down_proj = linear(config.d_ff, config.d_model, axes=outward, rngs=rngs.fork())
        self.gate_proj: Linear | MaybeNone = nnx.data(None)
        if config.activation in GATED:
            self.gate_proj = linear(config.d_model, config.d_ff, axes=inward, rngs=rngs.fork())
        self.up_proj = linear(config.d_model, config.d_ff, axes=inward, rngs=rngs.fork())

    @jax.named_scope("feed_forward")
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return feed_forward(x, self.up_proj, self.down_proj, self.gate_proj, activation=self.activation)


class EncoderBlock(Part):
    """Self-attention, then feed-forward, each inside a residual."""

    def __init__(self, config: TransformerConfig, *, depth_rate: float = 0.0, rngs: nnx.Rngs):
        norm = functools.partial(norm_layer, config, config.d_model)
        sandwich = config.norm_order == "sandwich"
        self.attention = MultiHeadAttention(config, rngs=rngs.fork())
        self.attention_norm = norm()
        self.attention_out_norm: LayerNorm | RMSNorm | MaybeNone = nnx.data(norm() if sandwich else None)
        self.config = config
        self.dropout = Dropout(config.dropout_rate, depth_rate=depth_rate)
        self.feed_forward = FeedForward(config, rngs=rngs.fork())
        self.feed_forward_norm = norm()
        self.feed_forward_out_norm: LayerNorm | RMSNorm | MaybeNone = nnx.data(norm() if sandwich else None)

    def __call__(
        self, x: Float[Array, "*B S D"], *, mask: Mask | Bool[Array, "..."] | None = None, rngs: Rngs | None = None
    ) -> Float[Array, "*B S D"]:
        """The block's output."""
        return self.run(x, mask=mask, rngs=rngs)[0]

    def run(
        self,
        x: Float[Array, "*B S D"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        relative: Relative | None = None,
        return_weights: bool = False,
        depth_rate: Float[Array, ""] | None = None,
        rngs: Rngs | None = None,
    ) -> tuple[Float[Array, "*B S D"], dict[str, Any]]:
        """The same, and its attention weights by name if asked for.

        `relative` is what the stack shares, `depth_rate` that of the layer where the block stands for many.
        """
        keys = site_keys(call_key(rngs, self.dropout), 3)
        stem = x if self.config.parallel_residual else None
        wrap = functools.partial(residual, norm_order=self.config.norm_order, stem=stem)
        x, weights = wrap(
            x,
            functools.partial(
                jax.named_scope("attention")(self.attention.run), mask=mask, relative=relative,
                return_weights=return_weights, rngs=keys[0],
            ),
            norm=self.attention_norm,
            out_norm=self.attention_out_norm,
            dropout=functools.partial(self.dropout, depth_rate=depth_rate, rngs=keys[1]),
        )  # fmt: skip
        x, _ = wrap(
            x,
            lambda x: (self.feed_forward(x), None),
            norm=self.feed_forward_norm,
            out_norm=self.feed_forward_out_norm,
            dropout=functools.partial(self.dropout, depth_rate=depth_rate, rngs=keys[2]),
        )
        return x, {} if weights is None else {"attention": weights}


class DecoderBlock(Part):
    """Causal self-attention, attention to a memory unless there is none, feed-forward, each inside a residual."""

    def __init__(
        self, config: TransformerConfig, *, cross_attention: bool = True, depth_rate: float = 0.0, rngs: nnx.Rngs
    ):
        norm = functools.partial(norm_layer, config, config.d_model)
        sandwich = config.norm_order == "sandwich"
        self.attention = MultiHeadAttention(config, rngs=rngs.fork())
        self.attention_norm = norm()
        self.attention_out_norm: LayerNorm | RMSNorm | MaybeNone = nnx.data(norm() if sandwich else None)
        self.config = config
        self.cross_attention: MultiHeadAttention | MaybeNone = nnx.data(None)
        if cross_attention:
            self.cross_attention = MultiHeadAttention(config, positions=False, rngs=rngs.fork())
        self.cross_attention_norm: LayerNorm | RMSNorm | MaybeNone = nnx.data(norm() if cross_attention else None)
        self.cross_attention_out_norm: LayerNorm | RMSNorm | MaybeNone = nnx.data(
            norm() if cross_attention and sandwich else None
        )
        self.dropout = Dropout(config.dropout_rate, depth_rate=depth_rate)
        self.feed_forward = FeedForward(config, rngs=rngs.fork())
        self.feed_forward_norm = norm()
        self.feed_forward_out_norm: LayerNorm | RMSNorm | MaybeNone = nnx.data(norm() if sandwich else None)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | Slots | None = None,
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        memory_mask: Mask | Bool[Array, "..."] | None = None,
        rngs: Rngs | None = None,
    ) -> Float[Array, "*B T D"]:
        """The block's output. `mask` is joined with the causal one."""
        return self.run(x, memory, mask=mask, memory_mask=memory_mask, rngs=rngs)[0]

    def run(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | Slots | None = None,
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        memory_mask: Mask | Bool[Array, "..."] | None = None,
        prefix: Offset | None = None,
        relative: Relative | None = None,
        history: Float[Array, "*B M D"] | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
        depth_rate: Float[Array, ""] | None = None,
        rngs: Rngs | None = None,
    ) -> tuple[Float[Array, "*B T D"], dict[str, Any]]:
        """The same, and by name the grown cache or the attention weights, if asked for.

        The first `prefix` tokens see each other; `relative` is what the stack shares; `history` is this block's input
        at the tokens before; `depth_rate` is that of the layer where the block stands for many.
        """
        if (memory is None) != (self.cross_attention is None):
            raise ValueError("a block with cross-attention needs a memory, and one without takes none")
        keys = site_keys(call_key(rngs, self.dropout), 5)
        stem = x if self.config.parallel_residual else None
        wrap = functools.partial(residual, norm_order=self.config.norm_order, stem=stem)
        if history is not None and self.config.norm_order != "post":
            history = self.attention_norm(history)
        x, extra = wrap(
            x,
            functools.partial(
                jax.named_scope("attention")(self.attention.run), mask=mask, causal=True, prefix=prefix,
                relative=relative, history=history, cache=cache, return_weights=return_weights, rngs=keys[0],
            ),
            norm=self.attention_norm,
            out_norm=self.attention_out_norm,
            dropout=functools.partial(self.dropout, depth_rate=depth_rate, rngs=keys[1]),
        )  # fmt: skip
        cross_extra = None
        if self.cross_attention is not None:
            x, cross_extra = wrap(
                x,
                functools.partial(
                    jax.named_scope("cross_attention")(self.cross_attention.run), memory=memory, mask=memory_mask,
                    return_weights=return_weights, rngs=keys[2],
                ),
                norm=self.cross_attention_norm,
                out_norm=self.cross_attention_out_norm,
                dropout=functools.partial(self.dropout, depth_rate=depth_rate, rngs=keys[3]),
            )  # fmt: skip
        x, _ = wrap(
            x,
            lambda x: (self.feed_forward(x), None),
            norm=self.feed_forward_norm,
            out_norm=self.feed_forward_out_norm,
            dropout=functools.partial(self.dropout, depth_rate=depth_rate, rngs=keys[4]),
        )
        extras = {"attention": extra, "cross_attention": cross_extra}
        return x, {name: value for name, value in extras.items() if value is not None}
