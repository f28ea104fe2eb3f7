"""Multi-head attention as an Equinox module."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from core.attention import Rules, attention_with_weights, dot_product_attention, merge_heads, split_heads
from core.cache import KeysValues, KVCache, Slots, cached_attention, slot_attention
from core.config import MaybeNone, TransformerConfig
from core.layers import site_keys
from core.masks import Mask, Offset, causal_or_prefix, combine
from core.positions import position_ids
from core.relative import ALiBi, Relative
from core.rotary import rotary, rotary_settings
from equinox_impl.layers import Dropout, LayerNorm, Linear, RMSNorm, norm_layer
from equinox_impl.relative import ShawPositions, TransformerXLPositions


class MultiHeadAttention(eqx.Module):
    """Attention of x to itself or to a memory (Vaswani et al. 2017, section 3.2.2).

    Fewer key/value heads than heads share them in groups (Ainslie et al. 2023). Positions and the window act in
    self-attention only, so a module for memories has `positions=False`.
    """

    config: TransformerConfig = eqx.field(static=True, repr=False)
    dropout: Dropout
    k_norm: LayerNorm | RMSNorm | MaybeNone
    k_proj: Linear
    o_proj: Linear
    q_norm: LayerNorm | RMSNorm | MaybeNone
    q_proj: Linear
    relative: ShawPositions | TransformerXLPositions | MaybeNone
    sinks: Float[Array, "N"] | MaybeNone
    v_proj: Linear

    def __init__(self, config: TransformerConfig, *, positions: bool = True, key: PRNGKeyArray):
        linear = functools.partial(Linear, use_bias=config.attention_bias, param_dtype=config.param_dtype)
        heads, kv_heads, width, value_width = config.num_heads, config.kv_heads, config.head_dim, config.value_width
        keys = iter(site_keys(key, 5))
        self.config = config
        self.dropout = Dropout(config.attention_dropout_rate)
        self.k_norm = norm_layer(config, width) if config.qk_norm else None
        self.k_proj = linear(config.d_model, kv_heads * width, key=next(keys))
        self.o_proj = linear(heads * value_width, config.d_model, key=next(keys))
        self.q_norm = norm_layer(config, width) if config.qk_norm else None
        self.q_proj = linear(config.d_model, heads * width, key=next(keys))
        self.relative = None
        if positions and config.positions == "shaw":
            self.relative = ShawPositions(config, key=next(keys))
        elif positions and config.positions == "transformer_xl":
            self.relative = TransformerXLPositions(config, key=next(keys))
        self.sinks = None
        if config.attention_sinks:
            self.sinks = jnp.zeros(heads, jnp.dtype(config.param_dtype))
        self.v_proj = linear(config.d_model, kv_heads * value_width, key=next(keys))

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | Slots | None = None,
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        bias: Float[Array, "..."] | None = None,
        causal: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B T D"]:
        """The attended values; memory may come as vectors, or projected by `keys_values`.

        `bias` is added to the logits `[*B, N, T, S]`, 1 where it broadcasts; -inf hides.
        """
        return self.run(x, memory, mask=mask, bias=bias, causal=causal, key=key)[0]

    def run(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | Slots | None = None,
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        bias: Float[Array, "..."] | None = None,
        causal: bool = False,
        prefix: Offset | None = None,
        relative: Relative | None = None,
        history: Float[Array, "*B M D"] | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B T D"], KVCache | Float[Array, "*B N T S"] | None]:
        """The same, and what was asked for besides: the cache with x appended, or the weights `[*B, N, T, S]`.

        With `causal`, every query sees the first `prefix` keys nevertheless. `relative` is a relative encoding that
        the stack shares, `history` what x is a continuation of: keys and values before its own.
        """
        if memory is not None and (history is not None or cache is not None):
            raise ValueError("a memory is attended to as it is: history and cache go without")
        if isinstance(memory, Slots) and (return_weights or self.dropout.site_key(key) is not None):
            raise ValueError("a memory in slots is for decoding: weights and dropout go without")
        if cache is not None and (any(x is not None for x in (mask, bias, history)) or return_weights):
            raise ValueError(
                "attention with a cache is causal self-attention: mask, bias, history and weights go without"
            )
        with jax.named_scope("q_proj"):
            q = split_heads(self.q_proj(x), self.config.num_heads)
        q = q if self.q_norm is None else self.q_norm(q)
        read = x if history is None else jnp.concatenate([history, x], axis=-2)
        rules: Rules = {**self.rules(), "bias": bias}
        if isinstance(memory, Slots):
            rules["mask"], form = mask, self.config.attention_implementation
            return self.o_proj(merge_heads(slot_attention(q, memory, implementation=form, **rules))), None
        k, v = memory if isinstance(memory, KeysValues) else self.keys_values(read if memory is None else memory)
        if memory is None:
            before = None if cache is None else cache.length
            offset = 0 if history is None else history.shape[-2]
            if cache is None:
                rules["q_offset"] = offset
            rules["relative"] = relative if self.relative is None else self.relative()
            rules["window"] = self.config.attention_window
            if self.config.positions == "alibi":
                rules["relative"] = ALiBi()
            if self.config.positions == "rotary":
                settings = rotary_settings(self.config)
                q = rotary(q, position_ids(x, offset if before is None else before), **settings)
                k = rotary(k, position_ids(read, before), **settings)
        if cache is not None:
            out, extra = cached_attention(
                q, k, v, cache, prefix=prefix, implementation=self.config.attention_implementation, **rules
            )
        else:
            rules["mask"] = combine(mask, causal_or_prefix(prefix=prefix) if causal else None)
            drop_key, rate = self.dropout.site_key(key), self.dropout.rate
            if return_weights:
                out, extra = attention_with_weights(q, k, v, dropout_key=drop_key, dropout_rate=rate, **rules)
            else:
                form = self.config.attention_implementation
                out, extra = (
                    dot_product_attention(
                        q, k, v, dropout_key=drop_key, dropout_rate=rate, implementation=form, **rules
                    ),
                    None,
                )
        with jax.named_scope("o_proj"):
            return self.o_proj(merge_heads(out)), extra

    def keys_values(self, memory: Float[Array, "*B S D"]) -> KeysValues:
        """The projected keys and values of a memory, to be computed once and read at every step."""
        heads = self.config.kv_heads
        with jax.named_scope("k_proj"):
            k = split_heads(self.k_proj(memory), heads)
        with jax.named_scope("v_proj"):
            v = split_heads(self.v_proj(memory), heads)
        return KeysValues(k if self.k_norm is None else self.k_norm(k), v)

    def rules(self) -> Rules:
        """What the configuration says of every attention, that to a memory too."""
        config, sinks = self.config, self.sinks
        return {"scale": config.attention_scale, "soft_cap": config.attention_soft_cap, "sinks": sinks}
