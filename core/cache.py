"""Keys and values of the tokens seen so far, so that a decoding step costs one token, not all of them."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from core.attention import Rules, dot_product_attention
from core.layers import known_values
from core.masks import Offset, Padding, Prefix, causal_or_prefix


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
    memory_mask: Padding | None
    length: Integer[Array, "*B"]  # tokens so far, the same for all layers
    prefix: Integer[Array, "*B"] | None = None  # of them, those that see each other


def empty_keys_values(
    batch: tuple[int, ...], capacity: int, heads: int, width: int, dtype, *, value_width: int | None = None
) -> KeysValues:
    """Room for `capacity` tokens in each row; values are as wide as keys unless given."""
    shape = (*batch, capacity, heads)
    values = width if value_width is None else value_width
    return KeysValues(jnp.zeros((*shape, width), dtype), jnp.zeros((*shape, values), dtype))


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


def select_beams(cache: DecoderCache, parents: Integer[Array, "*B W"]) -> DecoderCache:
    """Slot i of each row goes on from what slot parents[i] of that row has seen; the memory is that of the row."""

    def pick(x: Array) -> Array:
        slots = parents.reshape(parents.shape + (1,) * (x.ndim - parents.ndim))
        return jnp.take_along_axis(x, slots, axis=parents.ndim - 1)

    return cache._replace(
        attention=jax.tree.map(pick, cache.attention),
        length=pick(cache.length),
        prefix=None if cache.prefix is None else pick(cache.prefix),
    )


def cached_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K Hv"],
    cache: KVCache,
    *,
    prefix: Offset | None = None,
    implementation: str | None = None,
    **rules: Unpack[Rules],
) -> tuple[Float[Array, "*B T N Hv"], KVCache]:
    """Causal attention of T new tokens to themselves and to all before; NaN in a row that overflowed.

    The first `prefix` tokens see each other, if they come at once. Of `rules`, a mask or bias meets the cache's slots
    as keys.
    """
    appended = append(cache, k, v)
    slots = appended.keys_values
    mask = causal_or_prefix(prefix)
    if prefix is not None:
        mask = mask & Prefix(appended.length)  # none of the slots that are not filled yet
    rules = {**rules, "mask": mask & rules.get("mask"), "q_offset": cache.length}
    out = dot_product_attention(q, *slots, implementation=implementation, **rules)
    overflowed = appended.length > slots.k.shape[-3]
    return jnp.where(overflowed[..., None, None, None], jnp.nan, out), appended
