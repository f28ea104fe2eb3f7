"""Decode with a cache inside a scan, in Equinox: the cache is a value that the loop carries."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer, generate


@eqx.filter_jit
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
    model = eqx.nn.inference_mode(DecoderOnlyTransformer(CONFIG, key=jax.random.key(0)))
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

    @eqx.filter_jit
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
def the_number_of_steps_is_traced(batches: Batches):
    """The number of steps comes as an array, as from a batch: how long a scan is must be known to the compiler."""
    recipe(batches, decode=lambda model, prompt, steps, room: decode(model, prompt, jnp.int32(steps), room))


if __name__ == "__main__":
    demonstrate(__file__)
