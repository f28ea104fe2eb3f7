"""What a generation may say: rules on the next token, by the tokens that a row has so far."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from core.layers import known_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """Rules that hold in any way of decoding. Only generated tokens count, a decoder-only model's prompt does not.

    Where the rules leave a row no token at all, it ends.
    """

    repetition_penalty: float = 1.0  # p: logits of tokens that came are divided by p, negative ones multiplied (CTRL)
    no_repeat_ngram: int = 0  # n: no n tokens come twice in the same order; 0: any may
    min_length: int = 0  # tokens before the end
    banned: tuple[int, ...] = ()  # ids that never come

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")
        for name in ("no_repeat_ngram", "min_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        if not isinstance(self.banned, tuple) or any(type(token) is not int or token < 0 for token in self.banned):
            raise ValueError(f"banned must be a tuple of token ids, integers of at least 0, got {self.banned!r}")


FREE = Constraints()
"""No rule at all."""


def check_id(name: str, token: int, vocab_size: int) -> None:
    """ValueError unless it is a token of the vocabulary."""
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name} must lie in the target vocabulary [0, {vocab_size}), got {token}")


def check_ids(rules: Constraints, forced: Integer[Array, "... P"] | None, vocab_size: int) -> None:
    """ValueError for banned or forced tokens outside the vocabulary, where known; TypeError for forced non-integers."""
    for token in rules.banned:
        check_id("banned", token, vocab_size)
    if forced is None:
        return
    if not jnp.issubdtype(forced.dtype, jnp.integer):
        raise TypeError(f"forced must be token ids, -1 for any token, got {forced.dtype}")
    known = known_values(forced)
    if known is not None and known.size and not (known.min() >= -1 and known.max() < vocab_size):
        raise ValueError(
            f"forced must hold ids of the target vocabulary [0, {vocab_size}), or -1 for any token, "
            f"got {known.min()} to {known.max()}"
        )


def penalised(
    logits: Float[Array, "*B V"], tokens: Integer[Array, "*B L"], index: Integer[Array, ""], rules: Constraints
) -> Float[Array, "*B V"]:
    """The logits of token number `index`, those of tokens that came before made smaller (Keskar et al. 2019)."""
    if rules.repetition_penalty == 1:
        return logits
    came = _any_of(tokens, jnp.arange(tokens.shape[-1], dtype=jnp.int32) < index, logits.shape[-1])
    lower = jnp.where(logits > 0, logits / rules.repetition_penalty, logits * rules.repetition_penalty)
    return jnp.where(came, lower, logits)


def forbid(
    scores: Float[Array, "*B V"],
    tokens: Integer[Array, "*B L"],
    index: Integer[Array, ""],
    rules: Constraints,
    *,
    eos_id: int,
    forced: Integer[Array, "... P"] | None = None,
) -> Float[Array, "*B V"]:
    """-inf for what may not be token number `index` of a row: all but the forced one, or else what the rules forbid."""
    vocab = scores.shape[-1]
    check_ids(rules, forced, vocab)
    ids = _broadcast(jnp.arange(vocab, dtype=jnp.int32), scores.shape)
    if rules.banned or rules.min_length or rules.no_repeat_ngram:
        allowed = ~jnp.isin(ids, jnp.asarray(rules.banned, jnp.int32))
        allowed &= (ids != eos_id) | (index >= rules.min_length)
        if rules.no_repeat_ngram:
            allowed &= ~_would_repeat(tokens, index, rules.no_repeat_ngram, vocab)
        allowed |= ~allowed.any(axis=-1, keepdims=True) & (ids == eos_id)
    else:
        allowed = None
    if forced is not None and forced.shape[-1]:
        now = jnp.take(forced.astype(jnp.int32), index, axis=-1, mode="fill", fill_value=-1)[..., None]
        now = _broadcast(now, scores.shape)
        allowed = jnp.where(now < 0, True if allowed is None else allowed, ids == now)
    return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)


def _would_repeat(tokens: Array, index: Array, n: int, vocab_size: int) -> Bool[Array, "*B V"]:
    """The tokens that would complete n tokens which are there already."""
    length = tokens.shape[-1]
    starts = max(length - n + 1, 0)  # of all windows of n tokens
    there = jnp.arange(starts, dtype=jnp.int32) + n - 1 < index  # they lie in what has come; none before token n
    same = _broadcast(there, (*tokens.shape[:-1], starts))
    for i in range(n - 1):
        same &= tokens[..., i : i + starts] == jnp.take(tokens, index - n + 1 + i, axis=-1)[..., None]
    return _any_of(tokens[..., length - starts :], same, vocab_size)


def _any_of(tokens: Array, counted: Array, vocab_size: int) -> Bool[Array, "*B V"]:
    """True at the ids of the tokens that count."""
    ids = jnp.where(_broadcast(counted, tokens.shape), tokens, vocab_size)

    def mark(row: Array) -> Array:
        return jnp.zeros(vocab_size, bool).at[row].set(True, mode="drop")

    for _ in tokens.shape[:-1]:
        mark = jax.vmap(mark)
    return mark(ids)


def _broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(x.reshape((1,) * (len(shape) - x.ndim) + x.shape), shape)
