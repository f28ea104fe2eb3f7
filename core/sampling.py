"""Drawing the next token: temperature, top-k, top-p and min-p, with a key for each row."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from core.values import STATIC, value

Number = Any  # a float or a scalar array; not said so, since JAX makes values of placeholders, too


@value
class Sampling:
    """How a token is drawn. The rules apply in the order of the fields, each to what the ones before have left.

    All but `top_k` may change without compiling anew.
    """

    temperature: Number = 1.0  # logits are divided by it; 0: the likeliest token
    top_k: int | None = dataclasses.field(default=None, metadata=STATIC)  # only the k likeliest tokens
    top_p: Number | None = None  # only the fewest likeliest with so much of the mass (nucleus)
    min_p: Number | None = None  # only tokens with so much of the likeliest one's probability


def check_sampling(sampling: Sampling) -> None:
    """ValueError for a temperature below 0, top_k below 1, top_p outside (0, 1] or min_p outside [0, 1].

    What is not known, inside of jit, passes.
    """
    numbers = (sampling.temperature, sampling.top_p, sampling.min_p)
    temperature, top_p, min_p = (None if x is None or isinstance(x, Tracer) else float(x) for x in numbers)
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {sampling.temperature}")
    if sampling.top_k is not None and (type(sampling.top_k) is not int or sampling.top_k < 1):
        raise ValueError(f"top_k must be an integer of at least 1, got {sampling.top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {sampling.top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be at least 0 and at most 1, got {sampling.min_p}")


def as_arrays(sampling: Sampling) -> Sampling:
    """Its numbers as arrays of one type, so that Python's, NumPy's and JAX's are the same program."""
    return jax.tree.map(lambda number: jnp.asarray(number, jnp.result_type(float)), sampling)


def draw(logits: Float[Array, "*B V"], keys: Key[Array, "*B"], sampling: Sampling) -> Int[Array, "*B"]:
    """One token for each row, by its own key: `keys` has the shape *B. Tokens of logit -inf are never drawn."""
    check_keys(keys, logits.shape[:-1])
    temperature = jnp.asarray(sampling.temperature, logits.dtype)
    warm = logits / jnp.where(temperature == 0, 1, temperature)
    warm = jnp.where(kept_tokens(warm, sampling), warm, -jnp.inf)
    drawn = by_row(jax.random.categorical)(keys, warm).astype(jnp.int32)
    return jnp.where(temperature == 0, likeliest(logits), drawn)


def likeliest(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The lowest of the ids of the highest logit; V where there is none for NaN."""
    # two plain reductions, for those of argmax are done number by number on a CPU
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    highest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == highest, ids, logits.shape[-1]).min(axis=-1)


def kept_tokens(logits: Float[Array, "*B V"], sampling: Sampling) -> Bool[Array, "*B V"]:
    """What top_k, top_p and min_p leave; the likeliest token is always among it. Of equals the lowest ids stay."""
    check_sampling(sampling)
    kept = logits > -jnp.inf
    if sampling.top_k is not None:
        kept &= _rank(logits) < sampling.top_k
    if sampling.top_p is not None:
        probability = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf))
        order = jnp.argsort(-probability)  # stable, so that equals stay in their order
        descending = jnp.take_along_axis(probability, order)
        before = jnp.cumsum(descending, axis=-1) - descending
        enough = jnp.asarray(sampling.top_p, logits.dtype)
        in_order = (before < enough) | (enough >= 1)
        kept &= jnp.take_along_axis(in_order, jnp.argsort(order))
    if sampling.min_p is not None:
        lowest = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.asarray(sampling.min_p, logits.dtype))
        kept &= logits >= lowest
    return kept


def row_keys(key: Key[Array, "..."], batch: tuple[int, ...]) -> Key[Array, "..."]:
    """A key for each row: those given, or of one key its fold with the number of the row.

    A row's tokens depend on its own key alone, so other rows may come and go.
    """
    _check_typed(key)
    if key.shape == batch:
        return key
    if key.shape:
        raise ValueError(f"sampling takes one key or one for each row, {batch}, got keys of shape {key.shape}")
    rows = jnp.arange(math.prod(batch)).reshape(batch)
    return by_row(lambda row: jax.random.fold_in(key, row))(rows)


def check_keys(keys: Key[Array, "..."], batch: tuple[int, ...]) -> None:
    """TypeError for keys that are plain numbers; ValueError unless there is one for each row."""
    _check_typed(keys)
    if keys.shape != batch:
        raise ValueError(f"each row needs a key, {batch}, got keys of shape {keys.shape}; row_keys makes them of one")


def _check_typed(keys: Array) -> None:
    # plain numbers do not say which of their axes is part of a key: [2] is one key, or two for two rows
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"keys must be typed, as jax.random.key makes them, got {keys.dtype} of shape {keys.shape}; "
            "jax.random.wrap_key_data types those of jax.random.PRNGKey"
        )


def by_row(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function of one row, on any leading axes; they are those of its first argument."""

    def mapped(first: Array, *others: Array) -> Array:
        call = function
        for _ in first.shape:
            call = jax.vmap(call)
        return call(first, *others)

    return mapped


def _rank(logits: Array) -> Integer[Array, "*B V"]:
    """0 for the likeliest token, 1 for the next; of equals the lowest id first."""
    return jnp.argsort(jnp.argsort(-logits))
