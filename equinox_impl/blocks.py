"""The encoder's and the decoder's block as Equinox modules."""

import functools
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from core.cache import KeysValues, KVCache, Slots
from core.config import Activation, MaybeNone, TransformerConfig
from core.layers import GATED, feed_forward, residual, site_keys
from core.masks import Mask, Offset
from core.relative import Relative
from equinox_impl.attention import MultiHeadAttention
from equinox_impl.layers import Dropout, LayerNorm, Linear, RMSNorm, norm_layer


class FeedForward(eqx.Module):
    """Position-wise feed-forward network of width F; a gated one has a gate beside the up projection."""

    activation: Activation = eqx.field(static=True)
    down_proj: Linear
    gate_proj: Linear | MaybeNone
    up_proj: Linear

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        linear = functools.partial(Linear, use_bias=config.feed_forward_bias, param_dtype=config.param_dtype)
        keys = iter(site_keys(key, 3))
        self.activation = config.activation
        self.down_proj = linear(config.d_ff, config.d_model, key=next(keys))
        self.gate_proj = None
        if config.activation in GATED:
            self.gate_proj = linear(config.d_model, config.d_ff, key=next(keys))
        self.up_proj = linear(config.d_model, config.d_ff, key=next(keys))

    @jax.named_scope("feed_forward")
    def __call__(self, x: Float[Array, "*B D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "*B D"]:
        return feed_forward(x, self.up_proj, self.down_proj, self.gate_proj, activation=self.activation)


class EncoderBlock(eqx.Module):
    """Self-attention, then feed-forward, each inside a residual."""

    attention: MultiHeadAttention
    attention_norm: LayerNorm | RMSNorm
    attention_out_norm: LayerNorm | RMSNorm | MaybeNone
    config: TransformerConfig = eqx.field(static=True, repr=False)
    dropout: Dropout
    feed_forward: FeedForward
    feed_forward_norm: LayerNorm | RMSNorm
    feed_forward_out_norm: LayerNorm | RMSNorm | MaybeNone

    def __init__(self, config: TransformerConfig, *, depth_rate: float = 0.0, key: PRNGKeyArray):
        keys = iter(site_keys(key, 2))
        norm = functools.partial(norm_layer, config, config.d_model)
        sandwich = config.norm_order == "sandwich"
        self.attention = MultiHeadAttention(config, key=next(keys))
        self.attention_norm = norm()
        self.attention_out_norm = norm() if sandwich else None
        self.config = config
        self.dropout = Dropout(config.dropout_rate, depth_rate=depth_rate)
        self.feed_forward = FeedForward(config, key=next(keys))
        self.feed_forward_norm = norm()
        self.feed_forward_out_norm = norm() if sandwich else None

    def __call__(
        self,
        x: Float[Array, "*B S D"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B S D"]:
        """The block's output."""
        return self.run(x, mask=mask, key=key)[0]

    def run(
        self,
        x: Float[Array, "*B S D"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        relative: Relative | None = None,
        return_weights: bool = False,
        depth_rate: Float[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B S D"], dict[str, Any]]:
        """The same, and its attention weights by name if asked for.

        `relative` is what the stack shares, `depth_rate` that of the layer where the block stands for many.
        """
        keys = site_keys(key, 3)
        stem = x if self.config.parallel_residual else None
        wrap = functools.partial(residual, norm_order=self.config.norm_order, stem=stem)
        x, weights = wrap(
            x,
            functools.partial(
                jax.named_scope("attention")(self.attention.run), mask=mask, relative=relative,
                return_weights=return_weights, key=keys[0],
            ),
            norm=self.attention_norm,
            out_norm=self.attention_out_norm,
            dropout=functools.partial(self.dropout, depth_rate=depth_rate, key=keys[1]),
        )  # fmt: skip
        x, _ = wrap(
            x,
            lambda x: (self.feed_forward(x), None),
            norm=self.feed_forward_norm,
            out_norm=self.feed_forward_out_norm,
            dropout=functools.partial(self.dropout, depth_rate=depth_rate, key=keys[2]),
        )
        return x, {} if weights is None else {"attention": weights}


class DecoderBlock(eqx.Module):
    """Causal self-attention, attention to a memory unless there is none, feed-forward, each inside a residual."""

    attention: MultiHeadAttention
    attention_norm: LayerNorm | RMSNorm
    attention_out_norm: LayerNorm | RMSNorm | MaybeNone
    config: TransformerConfig = eqx.field(static=True, repr=False)
    cross_attention: MultiHeadAttention | MaybeNone
    cross_attention_norm: LayerNorm | RMSNorm | MaybeNone
    cross_attention_out_norm: LayerNorm | RMSNorm | MaybeNone
    dropout: Dropout
    feed_forward: FeedForward
    feed_forward_norm: LayerNorm | RMSNorm
    feed_forward_out_norm: LayerNorm | RMSNorm | MaybeNone

    def __init__(
        self, config: TransformerConfig, *, cross_attention: bool = True, depth_rate: float = 0.0, key: PRNGKeyArray
    ):
        keys = iter(site_keys(key, 3))
        norm = functools.partial(norm_layer, config, config.d_model)
        sandwich = config.norm_order == "sandwich"
        self.attention = MultiHeadAttention(config, key=next(keys))
        self.attention_norm = norm()
        self.attention_out_norm = norm() if sandwich else None
        self.config = config
        self.cross_attention = None
        if cross_attention:
            self.cross_attention = MultiHeadAttention(config, positions=False, key=next(keys))
        self.cross_attention_norm = norm() if cross_attention else None
        self.cross_attention_out_norm = norm() if cross_attention and sandwich else None
        self.dropout = Dropout(config.dropout_rate, depth_rate=depth_rate)
        self.feed_forward = FeedForward(config, key=next(keys))
        self.feed_forward_norm = norm()
        self.feed_forward_out_norm = norm() if sandwich else None

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | Slots | None = None,
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        memory_mask: Mask | Bool[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B T D"]:
        """The block's output. `mask` is joined with the causal one."""
        return self.run(x, memory, mask=mask, memory_mask=memory_mask, key=key)[0]

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
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B T D"], dict[str, Any]]:
        """The same, and by name the grown cache or the attention weights, if asked for.

        The first `prefix` tokens see each other; `relative` is what the stack shares; `history` is this block's input
        at the tokens before; `depth_rate` is that of the layer where the block stands for many.
        """
        if (memory is None) != (self.cross_attention is None):
            raise ValueError("a block with cross-attention needs a memory, and one without takes none")
        keys = site_keys(key, 5)
        stem = x if self.config.parallel_residual else None
        wrap = functools.partial(residual, norm_order=self.config.norm_order, stem=stem)
        if history is not None and self.config.norm_order != "post":
            history = self.attention_norm(history)
        x, extra = wrap(
            x,
            functools.partial(
                jax.named_scope("attention")(self.attention.run), mask=mask, causal=True, prefix=prefix,
                relative=relative, history=history, cache=cache, return_weights=return_weights, key=keys[0],
            ),
            norm=self.attention_norm,
            out_norm=self.attention_out_norm,
            dropout=functools.partial(self.dropout, depth_rate=depth_rate, key=keys[1]),
        )  # fmt: skip
        cross_extra = None
        if self.cross_attention is not None:
            x, cross_extra = wrap(
                x,
                functools.partial(
                    jax.named_scope("cross_attention")(self.cross_attention.run), memory=memory, mask=memory_mask,
                    return_weights=return_weights, key=keys[2],
                ),
                norm=self.cross_attention_norm,
                out_norm=self.cross_attention_out_norm,
                dropout=functools.partial(self.dropout, depth_rate=depth_rate, key=keys[3]),
            )  # fmt: skip
        x, _ = wrap(
            x,
            lambda x: (self.feed_forward(x), None),
            norm=self.feed_forward_norm,
            out_norm=self.feed_forward_out_norm,
            dropout=functools.partial(self.dropout, depth_rate=depth_rate, key=keys[4]),
        )
        extras = {"attention": extra, "cross_attention": cross_extra}
        return x, {name: value for name, value in extras.items() if value is not None}
