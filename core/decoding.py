"""Generation from any `step(tokens [*B, 1], cache) -> (logits [*B, 1, V], cache)`, as one compiled loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from core.layers import known_values

Step = Callable[[Integer[Array, "*B 1"], Any], tuple[Float[Array, "*B 1 V"], Any]]

PAD, BOS, EOS = 0, 1, 2
"""The ids of padding, beginning and end that are assumed unless others are given."""


def greedy(
    step: Step, tokens: Integer[Array, "*B"], cache: Any, *, max_length: int, eos_id: int = EOS, pad_id: int = PAD
) -> Integer[Array, "*B L"]:
    """The likeliest token each time, ties to the lowest id, L = max_length tokens a row.

    `tokens` is the last token of each row, not yet fed. A row ends with `eos_id`, padding follows; the loop
    ends when all rows have ended. Logits of NaN (a poisoned cache) cannot choose a token: such a row gets -1.
    """
    if max_length < 0:
        raise ValueError(f"max_length must be at least 0, got {max_length}")

    def unfinished(state) -> Array:
        index, _, ended, _, _ = state
        return (index < max_length) & ~ended.all()

    def extend(state):
        index, last, ended, out, cache = state
        logits, cache = step(last[..., None], cache)
        chosen = jnp.argmax(logits[..., 0, :], axis=-1).astype(jnp.int32)
        chosen = jnp.where(jnp.isnan(logits[..., 0, :]).any(axis=-1), -1, chosen)
        chosen = jnp.where(ended, pad_id, chosen)
        out = jax.lax.dynamic_update_index_in_dim(out, chosen, index, axis=out.ndim - 1)
        return index + 1, chosen, ended | (chosen == eos_id), out, cache

    out = jnp.full((*tokens.shape, max_length), pad_id, jnp.int32)
    if max_length == 0:
        return out
    start = (jnp.int32(0), tokens.astype(jnp.int32), jnp.zeros(tokens.shape, bool), out, cache)
    return jax.lax.while_loop(unfinished, extend, start)[3]


def check_generation(vocab_size: int, *, max_length: int, **ids: int) -> None:
    """ValueError unless max_length >= 0 and the ids of special tokens lie in the vocabulary."""
    if max_length < 0:
        raise ValueError(f"max_length must be at least 0, got {max_length}")
    for name, value in ids.items():
        if not 0 <= value < vocab_size:
            raise ValueError(f"{name} must lie in the target vocabulary [0, {vocab_size}), got {value}")


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
