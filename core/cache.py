"""Keys and values of the tokens seen so far, so that a decoding step costs one token, not all of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from core.attention import dot_product_attention
from core.layers import known_values


class KeysValues(NamedTuple):
    """What attention reads: k `[*B, S, K, H]`, v `[*B, S, K, Hv]`."""

    k: Float[Array, "*B S K H"]
    v: Float[Array, "*B S K Hv"]


class KVCache(NamedTuple):
    """Slots for S tokens a row, the first `length` of them filled; rows may differ in length."""

    keys_values: KeysValues
    length: Integer[Array, "*B"]


class DecoderCache(NamedTuple):
    """All that a decoder carries from step to step. `memory` is computed once, from one source."""

    attention: tuple[KeysValues, ...]  # by layer, S = capacity
    memory: tuple[KeysValues, ...]  # by layer, S = source length; empty without cross-attention
    memory_mask: Bool[Array, "*B 1 1 S"] | None
    length: Integer[Array, "*B"]  # tokens so far, the same for all layers


def empty_keys_values(batch: tuple[int, ...], capacity: int, heads: int, width: int, dtype) -> KeysValues:
    """Room for `capacity` tokens in each row."""
    shape = (*batch, capacity, heads, width)
    return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def append(cache: KVCache, k: Float[Array, "*B T K H"], v: Float[Array, "*B T K Hv"]) -> KVCache:
    """Writes T tokens a row behind those it has. ValueError for too many, where `length` is known.

    Under jit an overflow cannot raise: nothing is overwritten, `length` tells, and attention gives NaN.
    """
    for name, new, slots in (("k", k, cache.keys_values.k), ("v", v, cache.keys_values.v)):
        others = [(*array.shape[:-3], *array.shape[-2:]) for array in (new, slots)]
        if others[0] != others[1] or new.dtype != slots.dtype:
            raise ValueError(
                f"{name} must fit the cache in all but its length, got {new.dtype}{list(new.shape)} "
                f"for a cache of {slots.dtype}{list(slots.shape)}"
            )
    capacity, added = cache.keys_values.k.shape[-3], k.shape[-3]
    length = cache.length
    known = known_values(length)
    filled = 0 if known is None else int(known.max(initial=0))
    if filled + added > capacity:
        raise ValueError(
            f"the cache holds {capacity} tokens a row, {filled} are there and {added} more came; "
            "make it with a larger max_length"
        )

    def write(slots: Array, new: Array, start: Array) -> Array:
        index = start + jnp.arange(added, dtype=start.dtype)
        return slots.at[index].set(new, mode="drop", unique_indices=True)

    for _ in length.shape:
        write = jax.vmap(write)
    slots = cache.keys_values
    return KVCache(KeysValues(write(slots.k, k, length), write(slots.v, v, length)), length + added)


def cached_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K Hv"],
    cache: KVCache,
) -> tuple[Float[Array, "*B T N Hv"], KVCache]:
    """Causal attention of T new tokens to themselves and to all before; NaN in a row that overflowed."""
    appended = append(cache, k, v)
    slots = appended.keys_values
    out = dot_product_attention(q, *slots, causal=True, q_offset=cache.length)
    overflowed = appended.length > slots.k.shape[-3]
    return jnp.where(overflowed[..., None, None, None], jnp.nan, out), appended
