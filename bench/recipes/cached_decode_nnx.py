"""Decode with a cache inside a scan, in NNX: the cache is a value that the loop carries, not state of the module."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer, generate


@nnx.jit(graph_updates=False, static_argnames=("steps", "room"))
def decode(model, prompt, steps, room):
    """Greedy tokens [B, steps], and the logits of each."""
    tokens, cache = model.start(prompt, max_length=room)

    def extend(carry, _):
        tokens, cache = carry
        logits, cache = model.decode_step(tokens[:, None], cache)
        tokens = jnp.argmax(logits[:, 0], axis=-1).astype(tokens.dtype)
        return (tokens, cache), (tokens, logits[:, 0])

    _, (tokens, logits) = jax.lax.scan(extend, (tokens, cache), length=steps)
    return tokens.T, logits.swapaxes(0, 1)


def recipe(batches: Batches, *, decode: Callable[..., Any] = decode, room: int = 4):
    """The logits of every step are those of the model that reads all tokens at once."""
    model = nnx.view(DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0)), deterministic=True)
    prompt = next(batches).inputs
    tokens, logits = decode(model, prompt, 4, room)

    whole = model(jnp.concatenate([prompt, tokens[:, :-1]], axis=1))[:, prompt.shape[1] - 1 :]
    assert np.allclose(logits, whole, atol=1e-5), (
        f"off by {np.abs(logits - whole).max()} from the model without a cache"
    )
    assert np.array_equal(tokens, generate(model, prompt, max_length=4))
    return tokens, logits[0, -1]


@mistake()
def the_grown_cache_is_not_carried(batches: Batches):
    """Each step begins with the cache of the first."""

    @nnx.jit(graph_updates=False, static_argnames=("steps", "room"))
    def forgetful(model, prompt, steps, room):
        tokens, cache = model.start(prompt, max_length=room)

        def extend(tokens, _):
            logits, _ = model.decode_step(tokens[:, None], cache)
            tokens = jnp.argmax(logits[:, 0], axis=-1).astype(tokens.dtype)
            return tokens, (tokens, logits[:, 0])

        _, (tokens, logits) = jax.lax.scan(extend, tokens, length=steps)
        return tokens.T, logits.swapaxes(0, 1)

    recipe(batches, decode=forgetful)


@mistake()
def the_cache_is_too_small(batches: Batches):
    """Room for fewer tokens than are decoded."""
    recipe(batches, room=2)


@mistake()
def the_cache_is_stored_in_the_module(batches: Batches):
    """The cache is a Variable of a module outside, written inside jax.lax.scan."""

    @nnx.jit(static_argnames=("steps", "room"))
    def stored(model, prompt, steps, room):
        tokens, cache = model.start(prompt, max_length=room)
        held = nnx.Cache(cache)

        def extend(tokens, _):
            logits, grown = model.decode_step(tokens[:, None], held.get_value())
            held.set_value(grown)
            tokens = jnp.argmax(logits[:, 0], axis=-1).astype(tokens.dtype)
            return tokens, (tokens, logits[:, 0])

        _, (tokens, logits) = jax.lax.scan(extend, tokens, length=steps)
        return tokens.T, logits.swapaxes(0, 1)

    recipe(batches, decode=stored)


if __name__ == "__main__":
    demonstrate(__file__)
