"""Keys and values of the tokens seen so far, so that a decoding step costs one token, not all of them.

They lie in slots, heads before positions, so that the products of a step read them where they are. Beams do not move
them either: `owners` tells in whose slots each beam's past is, and a source is held once for all beams of its row.
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from core.attention import Rules, check_implementation, dot_product_attention
from core.layers import known_values
from core.logits import check_rules, check_values
from core.masks import Offset, Padding, Prefix, causal_or_prefix
from core.step_attention import step_attention

_OWNED_UP_TO = 8
"""Beams, for each reads what all of its row have in their slots; of more the slots are moved."""


class KeysValues(NamedTuple):
    """What attention reads: k `[*B, S, K, H]`, v `[*B, S, K, Hv]`."""

    k: Float[Array, "*B S K H"]
    v: Float[Array, "*B S K Hv"]


class Slots(NamedTuple):
    """The same with the heads first: k `[*B, K, S, H]`, v `[*B, K, S, Hv]`."""

    k: Float[Array, "*B K S H"]
    v: Float[Array, "*B K S Hv"]


class KVCache(NamedTuple):
    """Slots for S tokens a row, the first `length` of them filled; rows may differ in length."""

    slots: Slots
    length: Integer[Array, "*B"]
    owners: Integer[Array, "*B S"] | None = None  # whose slot holds this beam's position s; None: its own


class DecoderCache(NamedTuple):
    """All that a decoder carries from step to step. `memory` is computed once, from one source."""

    attention: tuple[Slots, ...]  # by layer, S = capacity
    memory: tuple[Slots, ...]  # by layer, S = source length; empty without cross-attention; beams may share it
    memory_mask: Padding | None
    length: Integer[Array, "*B"]  # tokens so far, the same for all layers
    prefix: Integer[Array, "*B"] | None = None  # of them, those that see each other
    owners: Integer[Array, "*B S"] | None = None  # of beams, as in KVCache


def empty_slots(
    batch: tuple[int, ...], capacity: int, heads: int, width: int, dtype, *, value_width: int | None = None
) -> Slots:
    """Room for `capacity` tokens in each row; values are as wide as keys unless given."""
    shape = (*batch, heads, capacity)
    values = width if value_width is None else value_width
    return Slots(jnp.zeros((*shape, width), dtype), jnp.zeros((*shape, values), dtype))


def as_slots(keys_values: KeysValues) -> Slots:
    """What is read at many steps, laid out for them."""
    # without the barrier XLA may put this off to where it is read, and do it at every step
    return jax.lax.optimization_barrier(Slots(*(x.swapaxes(-2, -3) for x in keys_values)))


def append(cache: KVCache, k: Float[Array, "*B T K H"], v: Float[Array, "*B T K Hv"]) -> KVCache:
    """Writes T tokens a row behind those it has. ValueError for too many, where `length` is known.

    Under jit an overflow cannot raise: nothing is overwritten, `length` tells, and attention gives NaN.
    """
    for name, new, slots in (("k", k, cache.slots.k), ("v", v, cache.slots.v)):
        *batch, heads, room, width = slots.shape
        if (*new.shape[:-3], *new.shape[-2:]) != (*batch, heads, width) or new.dtype != slots.dtype:
            raise ValueError(
                f"{name} must fit the cache in all but its length, got {new.dtype}{list(new.shape)} "
                f"for a cache of {slots.dtype}{[*batch, room, heads, width]}"
            )
    check_values(k, v)
    capacity, added = cache.slots.k.shape[-2], k.shape[-3]
    length = cache.length
    if length.shape != k.shape[:-3] or not jnp.issubdtype(length.dtype, jnp.signedinteger):
        raise ValueError(
            f"a cache's length must be an int32 for each row {list(k.shape[:-3])}, "
            f"got {length.dtype}{list(length.shape)}"
        )
    known = known_values(length)
    if known is not None and (known < 0).any():
        raise ValueError(f"a cache's length must be at least 0, got {known.min()}")
    filled = 0 if known is None else int(known.max(initial=0))
    if filled + added > capacity:
        raise ValueError(
            f"the cache holds {capacity} tokens a row, {filled} are there and {added} more came; "
            "make it with a larger max_length"
        )

    def write(slots: Array, new: Array, start: Array) -> Array:
        index = start + jnp.arange(added, dtype=start.dtype)
        return slots.at[:, index].set(new.swapaxes(0, 1), mode="drop", unique_indices=True)

    for _ in length.shape:
        write = jax.vmap(write)
    return cache._replace(
        slots=Slots(write(cache.slots.k, k, length), write(cache.slots.v, v, length)), length=length + added
    )


def spread_beams(cache: DecoderCache, beam_size: int) -> DecoderCache:
    """W = beam_size beams for each row, all with what the row has seen; the memory is the row's."""

    def spread(x: Array) -> Array:
        return jnp.broadcast_to(jnp.expand_dims(x, rank), (*x.shape[:rank], beam_size, *x.shape[rank:]))

    rank, owners = cache.length.ndim, None
    if cache.attention and beam_size <= _OWNED_UP_TO:
        shape = (*cache.length.shape, beam_size, cache.attention[0].k.shape[-2])
        owners = jax.lax.broadcasted_iota(jnp.int32, shape, rank)
    return DecoderCache(
        attention=jax.tree.map(spread, cache.attention),
        memory=jax.tree.map(lambda x: jnp.expand_dims(x, rank), cache.memory),
        memory_mask=jax.tree.map(lambda x: jnp.expand_dims(x, rank), cache.memory_mask),
        length=spread(cache.length),
        prefix=None if cache.prefix is None else spread(cache.prefix),
        owners=owners,
    )


def select_beams(cache: DecoderCache, parents: Integer[Array, "*B W"]) -> DecoderCache:
    """Beam i of each row goes on from what beam parents[i] of that row has seen; the memory is that of the row."""

    def pick(x: Array) -> Array:
        beams = parents.reshape(parents.shape + (1,) * (x.ndim - parents.ndim))
        return jnp.take_along_axis(x, beams, axis=parents.ndim - 1)

    length, prefix = pick(cache.length), None if cache.prefix is None else pick(cache.prefix)
    if cache.owners is None:
        return cache._replace(attention=jax.tree.map(pick, cache.attention), length=length, prefix=prefix)
    shape, axis = cache.owners.shape, parents.ndim
    filled = jax.lax.broadcasted_iota(jnp.int32, shape, axis) < length[..., None]
    itself = jax.lax.broadcasted_iota(jnp.int32, shape, axis - 1)
    return cache._replace(length=length, prefix=prefix, owners=jnp.where(filled, pick(cache.owners), itself))


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
    if taken := {"causal", "q_offset"} & rules.keys():
        raise TypeError(f"attention with a cache is causal by its length: {', '.join(sorted(taken))} go without")
    if q.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"q and k must be of the same new tokens [*B, T], got q {q.shape}, k {k.shape}")
    appended = append(cache, k, v)
    mask = causal_or_prefix(prefix)
    if prefix is not None:
        mask = mask & Prefix(appended.length)  # none of the slots that are not filled yet
    rules = {**rules, "mask": mask & rules.get("mask"), "q_offset": cache.length}
    out = slot_attention(q, appended.slots, owners=cache.owners, implementation=implementation, **rules)
    overflowed = appended.length > appended.slots.k.shape[-2]
    return jnp.where(overflowed[..., None, None, None], jnp.nan, out), appended


def slot_attention(
    q: Float[Array, "*B T N H"],
    slots: Slots,
    *,
    owners: Integer[Array, "*B S"] | None = None,
    implementation: str | None = None,
    **rules: Unpack[Rules],
) -> Float[Array, "*B T N Hv"]:
    """`dot_product_attention` to what lies in slots; a single query, as in decoding, reads them without a copy.

    Where the slots are one for all beams, `[*B, 1, K, S, H]`, no rule may go by position.
    """
    check_implementation(implementation)
    check_rules(rules)  # dropout is none: it would depend on how many queries come at once
    if owners is not None and q.shape[-3] != 1:
        raise ValueError(f"beams that share their slots take one token at a time, got T={q.shape[-3]}")
    if q.shape[:-3] != slots.k.shape[:-3]:
        queries = q.swapaxes(-3, -4)  # the beams are the queries of their row
        return slot_attention(queries, slots, implementation=implementation, **rules).swapaxes(-3, -4)
    k, v = (x.swapaxes(-2, -3) for x in slots)
    if q.shape[-3] == 1:
        return step_attention(q, k, v, owners=owners, **rules)
    return dot_product_attention(q, k, v, implementation=implementation, **rules)
