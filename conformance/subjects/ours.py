"""Adapters of this project's own functions."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from conformance.adapters import (
    Attention,
    Buckets,
    Cache,
    Dropout,
    Loss,
    Norm,
    RelativeShift,
    Rotary,
    Sampling,
    Search,
    Sinusoid,
    Slopes,
    WeightsFile,
    compiled,
)
from conformance.cases import gaussian
from core import layers, losses, relative, sampling, weights
from core.attention import IMPLEMENTATIONS, dot_product_attention
from core.beam_search import beam_search
from core.blockwise import blockwise_attention
from core.cache import KVCache, cached_attention, empty_slots
from core.positions import sinusoidal_table
from core.rotary import rotary


def random_key(seed):
    """The key of a seed; none for none."""
    return None if seed is None else jax.random.key(seed)


def attend(function, q, k, v, *, dropout_seed=None, **options):
    return function(q, k, v, dropout_key=random_key(dropout_seed), **options)


ATTENTIONS = {
    "materialised": functools.partial(dot_product_attention, implementation="materialised"),
    "blockwise": functools.partial(blockwise_attention, block=(2, 3)),  # the arrays of the laws are small
}
attentions = tuple(
    Attention(f"isoformer, {name}", functools.partial(attend, ATTENTIONS[name]), Attention.flags.keys())
    for name in IMPLEMENTATIONS
)
attention = attentions[0]


def normed(x, scale, bias, *, epsilon):
    return layers.layer_norm(x, scale, bias, epsilon=epsilon)


layer_norm = Norm("isoformer.layer_norm", normed, {"jax", "bfloat16", "float64", "centre", "bias"})
rms_norm = Norm("isoformer.rms_norm", layers.rms_norm, {"jax", "bfloat16", "float64"})


def turn(layout, x, *, positions, theta):
    return rotary(x, positions, theta=theta, layout=layout)


CAN_TURN = {"jax", "bfloat16", "float64", "positions"}
rotary_half = Rotary("isoformer, half", functools.partial(turn, "half"), CAN_TURN)
rotary_interleaved = Rotary("isoformer, interleaved", functools.partial(turn, "interleaved"), CAN_TURN)


def drop(x, *, rate, seed=None):
    return layers.dropout(x, rate, key=random_key(seed))


dropout = Dropout("isoformer.dropout", drop, {"jax", "bfloat16", "float64"})


def table(*, length, d_model):
    return sinusoidal_table(length, d_model)


sinusoid = Sinusoid("isoformer.sinusoidal_table", table, {"odd width"})


def buckets(distances, *, bidirectional, num_buckets, max_distance):
    by_distance = relative.t5_buckets(num_buckets, max_distance, bidirectional=bidirectional)
    return by_distance[np.clip(-distances, -max_distance, max_distance) + max_distance]


t5_buckets = Buckets("isoformer.t5_buckets", buckets)


def slopes(*, num_heads):
    return np.array(relative.alibi_slopes(num_heads))


alibi_slopes = Slopes("isoformer.alibi_slopes", slopes)


def shift(x):
    return relative.rel_shift(x, x.shape[-1] - x.shape[-2] + 1)


rel_shift = RelativeShift("isoformer.rel_shift", shift, {"jax", "leading axes"})


def mean_loss(logits, labels, weights, *, label_smoothing=0.0):
    return losses.cross_entropy(logits, labels, weights=weights, label_smoothing=label_smoothing)


loss = Loss("isoformer.cross_entropy", mean_loss, {"jax", "smoothing"})
weights_file = WeightsFile(
    "isoformer.weights", weights.save, {"bfloat16", "checksum", "safetensors"}, load=weights.load
)


# the cache: tokens of width 8 are projected by fixed matrices to 4 query heads over 2 key heads

HEADS, KEY_HEADS, WIDTH = 4, 2, 3
_kernels = [gaussian((8, heads * WIDTH), 20, i) for i, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS))]


def project(x):
    return (
        (x @ kernel).reshape(*x.shape[:-1], heads, WIDTH)
        for kernel, heads in zip(_kernels, (HEADS, KEY_HEADS, KEY_HEADS), strict=True)
    )


def empty(rows, capacity):
    slots = empty_slots((rows,), capacity, KEY_HEADS, WIDTH, jnp.float32)
    return KVCache(slots, jnp.zeros(rows, jnp.int32))


def attend_to_cache(x, state):
    q, k, v = project(x)
    return cached_attention(q, k, v, state)


_step = compiled(attend_to_cache)
_whole = compiled(lambda x: dot_product_attention(*project(x), causal=True))


def step(state, x):
    return _step(x, state)


def select(state, rows):
    return jax.tree.map(lambda x: x[rows], state)


def truncate(state, lengths):
    return state._replace(length=jnp.asarray(lengths, jnp.int32))


cache = Cache(
    "isoformer.cache",
    step,
    {"chunks", "reorder", "truncate", "ragged"},
    width=8,
    start=empty,
    full=_whole,
    select=select,
    truncate=truncate,
)


# beam search and sampling


class Fed(NamedTuple):
    """What a hypothesis knows: its row's table, how many tokens it was fed, and their sum."""

    table: Float[Array, "*B L V V"]
    number: Int[Array, "*B"]
    total: Int[Array, "*B"]


def look_up(tokens: Int[Array, "B W 1"], fed: Fed) -> tuple[Float[Array, "B W 1 V"], Fed]:
    last = tokens[..., 0]
    total = fed.total + last
    place = (last + total) % fed.table.shape[-1]
    logits = jax.vmap(jax.vmap(lambda table, n, i: table[n, i]))(fed.table, fed.number, place)
    return logits[..., None, :], Fed(fed.table, fed.number + 1, total)


def best_tokens(table, first, *, max_length, beam_size, eos, pad, length_penalty=0.0):
    start = Fed(table, jnp.zeros_like(first), jnp.zeros_like(first))
    options = {"max_length": max_length, "beam_size": beam_size, "length_penalty": length_penalty}
    return beam_search(look_up, first, start, **options, eos_id=eos, pad_id=pad).tokens[:, 0]


search = Search("isoformer.beam_search", best_tokens, {"jax", "length penalty"})


def one_token(logits, *, seed, **rules):
    keys = sampling.row_keys(jax.random.key(seed), logits.shape[:1])
    return sampling.draw(logits, keys, sampling.Sampling(**rules))


drawing = Sampling("isoformer.sampling", one_token, {"jax", "temperature", "top k", "top p"})
adapters = (
    *attentions, cache, layer_norm, rms_norm, rotary_half, rotary_interleaved, sinusoid, t5_buckets, alibi_slopes,
    rel_shift, dropout, loss, weights_file, search, drawing,
)  # fmt: skip
