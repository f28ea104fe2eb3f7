"""Generation from any `step(tokens [*B, 1], cache) -> (logits [*B, 1, V], cache)`, as one compiled loop."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Key

from core.constraints import FREE, Constraints, check_id, check_ids, forbid, penalised
from core.layers import check_integers, known_values
from core.sampling import Sampling, by_row, check_keys, draw, likeliest

Step = Callable[[Integer[Array, "*B 1"], Any], tuple[Float[Array, "*B 1 V"], Any]]

PAD, BOS, EOS = 0, 1, 2
"""The ids of padding, beginning and end that are assumed unless others are given."""


def greedy(
    step: Step,
    tokens: Integer[Array, "*B"],
    cache: Any,
    *,
    max_length: int,
    constraints: Constraints = FREE,
    forced: Integer[Array, "... P"] | None = None,
    eos_id: int = EOS,
    pad_id: int = PAD,
) -> Integer[Array, "*B L"]:
    """The likeliest token each time, ties to the lowest id, L = max_length tokens a row.

    `tokens` is the last token of each row, not yet fed. A row ends with `eos_id`, padding follows; the loop
    ends when all rows have ended. `forced` says which token must stand where, -1 for any. Logits of NaN (a poisoned
    cache) cannot choose a token: such a row gets -1.
    """
    rules = {"constraints": constraints, "forced": forced, "eos_id": eos_id, "pad_id": pad_id}
    return _decode(lambda logits, index: likeliest(logits), step, tokens, cache, max_length=max_length, **rules)


def sample(
    step: Step,
    tokens: Integer[Array, "*B"],
    cache: Any,
    *,
    keys: Key[Array, "*B"],
    sampling: Sampling,
    max_length: int,
    constraints: Constraints = FREE,
    forced: Integer[Array, "... P"] | None = None,
    eos_id: int = EOS,
    pad_id: int = PAD,
) -> Integer[Array, "*B L"]:
    """Tokens drawn at random, otherwise as `greedy`. Token t of a row is drawn with fold_in(key of the row, t)."""
    check_keys(keys, tokens.shape)
    drawn = lambda logits, index: draw(logits, by_row(lambda key: jax.random.fold_in(key, index))(keys), sampling)
    rules = {"constraints": constraints, "forced": forced, "eos_id": eos_id, "pad_id": pad_id}
    return _decode(drawn, step, tokens, cache, max_length=max_length, **rules)


def _decode(
    choose: Callable[[Array, Array], Array],
    step: Step,
    tokens: Integer[Array, "*B"],
    cache: Any,
    *,
    max_length: int,
    constraints: Constraints,
    forced: Integer[Array, "... P"] | None,
    eos_id: int,
    pad_id: int,
) -> Integer[Array, "*B L"]:
    """One token a row each time; `choose(logits [*B, V], index)` sees -inf where a token is not allowed."""
    first = token_ids("tokens", tokens)
    check_lengths(first.shape, max_length, constraints, forced)

    def unfinished(state) -> Array:
        index, _, ended, _, _ = state
        return (index < max_length) & ~ended.all()

    def extend(state):
        index, last, ended, out, cache = state
        logits, cache = step(last[..., None], cache)
        logits = penalised(logits[..., 0, :], out, index, constraints)
        chosen = choose(forbid(logits, out, index, constraints, eos_id=eos_id, forced=forced), index)
        chosen = jnp.where(jnp.isnan(logits.max(axis=-1)), -1, chosen)
        chosen = jnp.where(ended, pad_id, chosen)
        out = jax.lax.dynamic_update_index_in_dim(out, chosen, index, axis=out.ndim - 1)
        return index + 1, chosen, ended | (chosen == eos_id), out, cache

    out = jnp.full((*tokens.shape, max_length), pad_id, jnp.int32)
    if max_length == 0:
        return out
    start = (jnp.int32(0), first, jnp.zeros(tokens.shape, bool), out, cache)
    return jax.lax.while_loop(unfinished, extend, start)[3]


class Prompt(NamedTuple):
    """How a source is read before the first token."""

    prefix: bool  # a decoder-only model's prompt sees all of itself
    chunk: int | None  # tokens of it that are read at once; None: all
    bos_id: int


class Rules(NamedTuple):
    """What every way of decoding keeps to, as the arguments of `greedy`, `sample` and `beam_search`."""

    max_length: int
    constraints: Constraints
    eos_id: int
    pad_id: int


def check_generation(
    vocab_size: int,
    batch: tuple[int, ...],
    rules: Rules,
    *,
    bos_id: int = BOS,
    forced: Integer[Array, "..."] | None = None,
) -> None:
    """ValueError for lengths that cannot be, ids outside the vocabulary, and forced tokens that do not fit."""
    check_lengths(batch, rules.max_length, rules.constraints, forced)
    for name, token in (("bos_id", bos_id), ("eos_id", rules.eos_id), ("pad_id", rules.pad_id)):
        check_id(name, whole(name, token), vocab_size)
    check_ids(rules.constraints, forced, vocab_size)


def check_lengths(
    batch: tuple[int, ...], max_length: int, constraints: Constraints, forced: Integer[Array, "..."] | None
) -> None:
    """ValueError for lengths that cannot be, and for forced tokens that are too many or of other rows."""
    check_max_length(max_length)
    if constraints.min_length > max_length:
        raise ValueError(f"min_length must be at most max_length {max_length}, got {constraints.min_length}")
    if forced is None:
        return
    if not forced.shape or forced.shape[:-1] not in (batch, ()) or forced.shape[-1] > max_length:
        raise ValueError(
            f"forced must have the shape {(*batch, 'P')} or ('P',), P at most max_length {max_length}, "
            f"got {forced.shape}"
        )


def check_max_length(max_length: int) -> None:
    """ValueError for fewer than no tokens."""
    if whole("max_length", max_length) < 0:
        raise ValueError(f"max_length must be at least 0, got {max_length}")


def token_ids(name: str, tokens: Integer[Array, "*B"]) -> Integer[Array, "*B"]:
    """The tokens as int32; TypeError for other than integers, which astype would cut as int() does."""
    check_integers(name, tokens)
    return tokens.astype(jnp.int32)


def whole(name: str, number: Any) -> int:
    """The number as an int; TypeError if it is none, for int() would cut 2.7 to 2 without a word."""
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {number!r}") from None


def next_tokens(first: Integer[Array, "*B"], target: Integer[Array, "*B T"]) -> Integer[Array, "*B T"]:
    """What is fed to predict a target, teacher-forced: the token before it, then the target without its last."""
    return jnp.concatenate([first[..., None].astype(target.dtype), target[..., :-1]], axis=-1)


def until_end(tokens: Integer[Array, "*B T"], eos_id: int) -> Bool[Array, "*B T"]:
    """True up to and including the first end token of each row."""
    ends = (tokens == eos_id).astype(jnp.int32)
    return jnp.cumsum(ends, axis=-1) - ends == 0


def prefill(
    grow: Callable[[Integer[Array, "*B T"], Any, Integer[Array, "*B"]], Any],
    tokens: Integer[Array, "*B T"],
    cache: Any,
    *,
    lengths: Integer[Array, "*B"],
    chunk: int | None = None,
) -> Any:
    """The cache after the first `lengths` tokens of each row, read at once or `chunk` at a time to save memory.

    `grow(tokens, cache, count)` is the cache after the first `count` of the tokens of each row.
    """
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise ValueError(f"prefill_chunk must be an integer of at least 1, got {chunk!r}")
    total = tokens.shape[-1]
    for start in range(0, total, chunk or max(total, 1)):
        part = tokens[..., start : start + (chunk or total)]
        cache = grow(part, cache, jnp.clip(lengths - start, 0, part.shape[-1]))
    return cache


def prompt_lengths(mask: Bool[Array, "*B T"] | None, prompt: Integer[Array, "*B T"]) -> Integer[Array, "*B"]:
    """Real tokens in each row of a prompt; they come first, and there is at least one.

    ValueError where the mask is known and says otherwise.
    """
    if mask is None:
        mask = jnp.ones(prompt.shape, bool)
    if mask.dtype != jnp.bool_ or mask.shape != prompt.shape:
        raise ValueError(
            f"the prompt's mask must be bool and of its shape {prompt.shape}, got {mask.dtype} {mask.shape}"
        )
    lengths = mask.sum(axis=-1, dtype=jnp.int32)
    if (known := known_values(mask)) is not None:
        padding_came = np.logical_or.accumulate(~known, axis=-1)
        if (known & padding_came).any() or not known.any(axis=-1).all():
            raise ValueError("each row of a prompt needs its real tokens first, at least one, then its padding")
    return lengths
