"""A right attention in JAX, every pair of a query and a key by itself: slow, and without a line of the others."""

import jax
import jax.numpy as jnp
import numpy as np

from conformance.adapters import Attention, lenient


class JaxAttention:
    """What an exhibit makes wrong is an attribute or a method."""

    keys_are_hidden = True

    def __call__(
        self, q, k, v, *, mask=None, bias=None, causal=False, q_offset=None, window=None, scale=None,
        soft_cap=None, sinks=None, dropout_rate=0.0, dropout_seed=None,
    ):  # fmt: skip
        check(q, k, v, mask, dropout_rate)
        dtype, (*batch, T, N, H), S = jnp.promote_types(q.dtype, jnp.float32), q.shape, k.shape[-3]
        pairs = (*batch, N, T, S)
        allowed = jnp.ones(pairs, bool) if mask is None else jnp.broadcast_to(mask, pairs)
        if causal or window is not None:
            if T != S and q_offset is None:
                raise ValueError(f"with T={T} queries and S={S} keys, q_offset must say where the queries stand")
            stands = jnp.zeros(batch, jnp.int32) if q_offset is None else jnp.broadcast_to(q_offset, batch)
            key_minus_query = jnp.arange(S) - jnp.arange(T)[:, None] - stands[..., None, None, None]
            left, right = (S + T, S + T) if window is None else window
            far = jnp.where(key_minus_query < 0, -key_minus_query > left, key_minus_query > (0 if causal else right))
            allowed &= ~far
        if bias is not None:
            allowed &= bias != -jnp.inf
        nothing = jnp.zeros((), dtype)
        shown = lambda x: jnp.where(allowed[..., None], x, nothing)
        by_head = lambda x: jnp.repeat(x.astype(dtype), N // x.shape[-2], axis=-2).swapaxes(-2, -3)
        asking, asked, given = by_head(q)[..., None, :], by_head(k)[..., None, :, :], by_head(v)[..., None, :, :]
        if self.keys_are_hidden:
            asking, asked = shown(asking), shown(asked)
        logits = (asking * (H**-0.5 if scale is None else scale) * asked).sum(-1)
        logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
        logits = logits if bias is None else logits + jnp.where(allowed, bias, 0).astype(dtype)
        weights = self.softmax(logits, allowed, None if sinks is None else sinks.astype(dtype)[:, None, None])
        if dropout_seed is not None and dropout_rate:
            stays = jax.random.bernoulli(jax.random.key(dropout_seed), 1 - dropout_rate, pairs)
            weights = jnp.where(stays, weights / (1 - dropout_rate), 0)
        return (weights[..., None] * shown(given)).sum(-2).swapaxes(-2, -3).astype(v.dtype)

    def softmax(self, logits, allowed, sinks):
        lowest = jnp.full((), jnp.finfo(logits.dtype).min, logits.dtype)
        highest = jnp.where(allowed, logits, lowest).max(-1, keepdims=True, initial=lowest)
        highest = jax.lax.stop_gradient(highest if sinks is None else jnp.maximum(highest, sinks))
        exponentials = jnp.where(allowed, jnp.exp(jnp.where(allowed, logits, highest) - highest), 0)
        total = exponentials.sum(-1, keepdims=True) + (0 if sinks is None else jnp.exp(sinks - highest))
        return exponentials / jnp.where(total == 0, 1, total)


def check(q, k, v, mask, rate) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate lies in [0, 1), got {rate}")
    if q.shape[-2] % k.shape[-2] or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)):
        raise ValueError("q, k and v are floats, and the key heads divide the query heads")
    if mask is not None and (mask.dtype != np.dtype(bool) or mask.ndim != q.ndim):
        raise ValueError(f"a mask is bool, of rank {q.ndim}, got {mask.dtype} of rank {mask.ndim}")


jax_attention = Attention("JAX, pair by pair", JaxAttention(), Attention.flags.keys(), lenient)
