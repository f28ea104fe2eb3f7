"""Attention maps and intermediates, in Equinox: maps come out of `run`; a layer is replaced by one that records."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer


@eqx.filter_jit
def maps(model, tokens):
    return model.run(tokens, return_weights=True)[1]


def feed_forward(model):
    return model.decoder.blocks[0].feed_forward


@eqx.filter_jit
def hidden(model, tokens):
    """What the feed-forward network of the first block returns."""
    seen, layer = [], feed_forward(model)

    def recorded(x):
        seen.append(layer(x))
        return seen[-1]

    eqx.tree_at(feed_forward, model, recorded)(tokens)
    return seen[0]


def recipe(batches: Batches, *, hidden: Callable[..., Any] = hidden):
    """Each row of a map sums to one and sees nothing ahead; what was captured leads to the logits."""
    model = eqx.nn.inference_mode(DecoderOnlyTransformer(CONFIG, key=jax.random.key(0)))
    tokens = next(batches).inputs
    ((name, weights),), seen = maps(model, tokens).items(), hidden(model, tokens)

    assert (name, weights.shape) == ("decoder.blocks.0.attention", (3, 2, 5, 5))  # [B, N, T, S]
    assert np.allclose(weights.sum(axis=-1), 1, atol=1e-6)
    assert np.array_equal(weights, np.tril(weights))
    decoder, block = model.decoder, model.decoder.blocks[0]
    x = decoder.position_embedding(model.embedding(tokens))
    x = x + block.attention(block.attention_norm(x), causal=True)
    assert seen is not None, "nothing was captured"
    assert np.allclose(model.logits(decoder.norm(x + seen)), model(tokens), atol=1e-5)
    return weights[0, 0], seen[0, 0]


@mistake("equinox #864")
def what_is_recorded_leaves_the_jit(batches: Batches):
    """The list of what was seen is read outside of the compiled function."""

    def leaking(model, tokens):
        seen, layer = [], feed_forward(model)

        def recorded(x):
            seen.append(layer(x))
            return seen[-1]

        eqx.filter_jit(eqx.tree_at(feed_forward, model, recorded))(tokens)
        return seen[0]

    recipe(batches, hidden=leaking)


@mistake("equinox #864")
def the_layer_is_overwritten(batches: Batches):
    """The layer keeps what it returned as an attribute, of a frozen module."""

    class Remembers(eqx.Module):
        layer: Callable[..., Any]
        seen: Any

        def __call__(self, x):
            self.seen = self.layer(x)
            return self.seen

    def kept(model, tokens):
        model = eqx.tree_at(feed_forward, model, Remembers(feed_forward(model), None))
        model(tokens)
        return feed_forward(model).seen

    recipe(batches, hidden=kept)


if __name__ == "__main__":
    demonstrate(__file__)
