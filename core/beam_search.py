"""Beam search over any `step(tokens [*B, W, 1], cache) -> (logits [*B, W, 1, V], cache)`, as one compiled loop."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from core.constraints import FREE, Constraints, forbid, penalised
from core.decoding import EOS, PAD, Step, check_lengths, token_ids
from core.layers import wide_dtype

_BLOCK = 64


class Hypotheses(NamedTuple):
    """What a search has found for each row, best first."""

    tokens: Integer[Array, "*B n L"]  # the end, then padding
    scores: Float[Array, "*B n"]  # log probability over the penalty of the length; -inf: there are no more, all padding


class Beams(NamedTuple):
    """The arguments of `beam_search` that shape the search."""

    beam_size: int
    n_best: int
    length_penalty: float


class _State(NamedTuple):
    """W slots a row. One that has ended keeps its hypothesis; the others hold the best that go on."""

    position: Integer[Array, ""]
    tokens: Integer[Array, "*B W L"]
    last: Integer[Array, "*B W"]
    log_prob: Float[Array, "*B W"]
    length: Integer[Array, "*B W"]
    ended: Bool[Array, "*B W"]
    failed: Bool[Array, "*B"]
    cache: Any


def beam_search(
    step: Step,
    tokens: Integer[Array, "*B"],
    cache: Any,
    *,
    max_length: int,
    beam_size: int = 4,
    n_best: int = 1,
    length_penalty: float = 0.6,
    constraints: Constraints = FREE,
    forced: Integer[Array, "... P"] | None = None,
    eos_id: int = EOS,
    pad_id: int = PAD,
    select: Callable[[Any, Integer[Array, "*B W"]], Any] | None = None,
    spread: Callable[[Any, int], Any] | None = None,
) -> Hypotheses:
    """The n best of what W = beam_size slots hold in the end, by log P / ((5 + length) / 6)^a, a = length_penalty.

    The score is that of Wu et al. (2016), the end token counts. A hypothesis that ends keeps its slot, so that it is
    never lost, and the search goes on with one less (Bahdanau et al. 2015): with one slot it is greedy decoding, with
    slots for all V^L sequences it is exhaustive, which is why W may be above V. It stops when no
    hypothesis that goes on could still come among the n best.

    `tokens` `[*B]` and `cache` are those of one hypothesis a row, every leaf of the cache with the axes *B first;
    `select(cache, parents)` makes slot i of each row go on from what slot parents[i] held, `spread(cache, W)` makes W
    slots of each row to begin with; by default both copy all leaves. A repetition penalty changes
    the log probabilities, other constraints only what may be chosen. Logits of NaN give tokens -1 and scores NaN.
    """
    check_beams(Beams(beam_size, n_best, length_penalty))
    last = token_ids("tokens", tokens)
    check_lengths(last.shape, max_length, constraints, forced)
    batch, beams, rank = last.shape, (*last.shape, beam_size), last.ndim
    select = select or (lambda cache, parents: jax.tree.map(lambda x: _take(x, parents, rank), cache))
    spread = spread or (lambda cache, size: jax.tree.map(lambda x: _spread(x, rank, size), cache))
    forced = None if forced is None else jnp.expand_dims(jnp.broadcast_to(forced, (*batch, forced.shape[-1])), -2)
    forced = None if forced is None else jnp.broadcast_to(forced, (*beams, forced.shape[-1]))

    def final(log_prob: Array, length: Array) -> Array:
        return log_prob / penalty(length.astype(log_prob.dtype), length_penalty)

    def is_open(state: _State) -> Bool[Array, "*B"]:
        """Whether a hypothesis that goes on could come among the best; its score can only fall from here."""
        length = jnp.stack([state.position + 1, jnp.int32(max_length)])
        reach = final(state.log_prob[..., None], length.reshape((1,) * (rank + 1) + (2,))).max(axis=-1)
        reach = jnp.where(state.ended, -jnp.inf, reach).max(axis=-1)
        kept = jnp.where(state.ended, final(state.log_prob, state.length), -jnp.inf)
        return ~state.failed & (reach > -jnp.inf) & (reach >= jax.lax.top_k(kept, n_best)[0][..., -1])

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.position < max_length) & is_open(state).any()

    def extend(state: _State) -> _State:
        logits, cache = step(state.last[..., None], state.cache)
        logits = penalised(logits.squeeze(-2).astype(wide_dtype(logits)), state.tokens, state.position, constraints)
        vocab = logits.shape[-1]
        going = ~state.ended & (state.log_prob > -jnp.inf)
        failed = state.failed | (going & jnp.isnan(logits).any(axis=-1)).any(axis=-1)
        extended = state.log_prob[..., None] + jax.nn.log_softmax(logits)
        extended = jnp.where(going[..., None] & ~jnp.isnan(extended), extended, -jnp.inf)
        extended = forbid(extended, state.tokens, state.position, constraints, eos_id=eos_id, forced=forced)
        best, place = highest(extended.reshape(*batch, beam_size * vocab), beam_size)

        turn = jnp.cumsum(~state.ended, axis=-1) - 1  # of the slots that are free
        place = _take(place, turn, rank)
        itself = jnp.broadcast_to(jnp.arange(beam_size, dtype=jnp.int32), beams)
        parents = jnp.where(state.ended, itself, place // vocab)
        log_prob = jnp.where(state.ended, state.log_prob, _take(best, turn, rank))
        new = jnp.where(state.ended, pad_id, place % vocab)
        grown = jax.lax.dynamic_update_index_in_dim(_take(state.tokens, parents, rank), new, state.position, rank + 1)
        length = jnp.where(state.ended, state.length, state.position + 1)
        ended = state.ended | ((new == eos_id) & (log_prob > -jnp.inf))
        return _State(state.position + 1, grown, new, log_prob, length, ended, failed, select(cache, parents))

    first = jnp.broadcast_to(jnp.arange(beam_size) == 0, beams)  # at the beginning all slots are the same one
    start = _State(
        position=jnp.int32(0),
        tokens=jnp.full((*beams, max_length), pad_id, jnp.int32),
        last=jnp.broadcast_to(last[..., None], beams),
        log_prob=jnp.where(first, 0.0, -jnp.inf),
        length=jnp.zeros(beams, jnp.int32),
        ended=jnp.zeros(beams, bool),
        failed=jnp.zeros(batch, bool),
        cache=spread(cache, beam_size),
    )
    end = jax.lax.while_loop(unfinished, extend, start) if max_length else start
    complete = end.ended | (end.position == max_length)
    scores = jnp.where(complete, final(end.log_prob, end.length), -jnp.inf)
    scores, order = jax.lax.top_k(scores, n_best)
    failed = end.failed[..., None]
    tokens = jnp.where((scores == -jnp.inf)[..., None], pad_id, _take(end.tokens, order, rank))
    tokens = jnp.where(failed[..., None], -1, tokens)
    return Hypotheses(tokens, jnp.where(failed, jnp.nan, scores))


def penalty(length: Float[Array, "*B"], length_penalty: float) -> Float[Array, "*B"]:
    """((5 + length) / 6) ** length_penalty, by which a log probability is divided (Wu et al. 2016, equation 14)."""
    return ((5 + length) / 6) ** length_penalty


def check_beams(beams: Beams) -> None:
    """ValueError unless 1 <= n_best <= beam_size and the penalty is finite."""
    if beams.beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beams.beam_size}")
    if not 1 <= beams.n_best <= beams.beam_size:
        raise ValueError(f"n_best must lie in [1, beam_size {beams.beam_size}], got {beams.n_best}")
    if not math.isfinite(beams.length_penalty):
        raise ValueError(f"length_penalty must be finite, got {beams.length_penalty}")


def highest(scores: Float[Array, "*B V"], n: int) -> tuple[Float[Array, "*B n"], Integer[Array, "*B n"]]:
    """`jax.lax.top_k`, of equals the lowest ids first, by a look at the n best blocks alone; NaN may not be there.

    A score that is among the n best lies in one of the n blocks with the highest scores, of equals the first blocks.
    """
    *batch, size = scores.shape
    width = math.gcd(size, _BLOCK)
    if size // width <= n or width == 1:
        best, place = jax.lax.top_k(scores, n)
        return best, place
    blocks = scores.reshape(*batch, size // width, width)
    chosen, rank = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), n)[1]), len(batch)
    best, place = jax.lax.top_k(_take(blocks, chosen, rank).reshape(*batch, n * width), n)
    return best, _take(chosen, place // width, rank) * width + place % width


def _spread(x: Array, rank: int, beam_size: int) -> Array:
    """Every row of the leading axes for each of its slots."""
    shape = (*x.shape[:rank], beam_size, *x.shape[rank:])
    return jnp.broadcast_to(jnp.expand_dims(x, rank), shape)


def _take(x: Array, slots: Array, rank: int) -> Array:
    """`[*B, n, ...]`: of each row the slots that are named."""
    return jnp.take_along_axis(x, slots.reshape(slots.shape + (1,) * (x.ndim - rank - 1)), axis=rank)
