"""Multi-head attention as a Flax NNX module."""

import functools

from flax import nnx
from jaxtyping import Array, Bool, Float

from core.attention import attention_with_weights, merge_heads, split_heads
from core.cache import KeysValues, KVCache, cached_attention
from core.config import TransformerConfig
from core.positions import position_ids, rotary
from nnx_impl.layers import Dropout, Linear, Rngs


class MultiHeadAttention(nnx.Module):
    """Attention of x to itself or to a memory (Vaswani et al. 2017, section 3.2.2).

    Fewer key/value heads than heads share them in groups (Ainslie et al. 2023). Rotary positions turn the
    queries and keys of self-attention only.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=config.attention_bias, param_dtype=config.param_dtype)
        inward, outward = ("embed", "heads"), ("heads", "embed")
        width, kv_width = config.d_model, config.kv_heads * config.head_dim
        self.config = config
        self.dropout = Dropout(config.attention_dropout_rate)
        self.k_proj = linear(config.d_model, kv_width, axes=inward, rngs=rngs.fork())
        self.o_proj = linear(width, config.d_model, axes=outward, rngs=rngs.fork())
        self.q_proj = linear(config.d_model, width, axes=inward, rngs=rngs.fork())
        self.v_proj = linear(config.d_model, kv_width, axes=inward, rngs=rngs.fork())

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        causal: bool = False,
        rngs: Rngs | None = None,
    ) -> Float[Array, "*B T D"]:
        """The attended values; memory may come as vectors, or projected by `keys_values`."""
        return self.run(x, memory, mask=mask, causal=causal, rngs=rngs)[0]

    def run(
        self,
        x: Float[Array, "*B T D"],
        memory: Float[Array, "*B S D"] | KeysValues | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
        return_weights: bool = False,
        rngs: Rngs | None = None,
    ) -> tuple[Float[Array, "*B T D"], KVCache | Float[Array, "*B N T S"] | None]:
        """The same, and what was asked for besides: the cache with x appended, or the weights `[*B, N, T, S]`."""
        if cache is not None and (memory is not None or mask is not None or return_weights):
            raise ValueError("attention with a cache is causal self-attention: memory, mask and weights go without")
        q = split_heads(self.q_proj(x), self.config.num_heads)
        k, v = memory if isinstance(memory, KeysValues) else self.keys_values(x if memory is None else memory)
        if self.config.positions == "rotary" and memory is None:
            positions = position_ids(x, None if cache is None else cache.length)
            q, k = (rotary(heads, positions, theta=self.config.rotary_theta) for heads in (q, k))
        if cache is not None:
            out, extra = cached_attention(q, k, v, cache)
        else:
            drop_key, rate = self.dropout.site_key(rngs), self.dropout.rate
            out, weights = attention_with_weights(
                q, k, v, mask=mask, causal=causal, dropout_key=drop_key, dropout_rate=rate
            )
            extra = weights if return_weights else None
        return self.o_proj(merge_heads(out)), extra

    def keys_values(self, memory: Float[Array, "*B S D"]) -> KeysValues:
        """The projected keys and values of a memory, to be computed once and read at every step."""
        heads = self.config.kv_heads
        return KeysValues(split_heads(self.k_proj(memory), heads), split_heads(self.v_proj(memory), heads))
