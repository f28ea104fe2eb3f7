"""Attention maps and intermediates, in NNX: maps come out of `run`, all else is captured as the methods return it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer, FeedForward


@nnx.jit(graph_updates=False)
def maps(model, tokens):
    return model.run(tokens, return_weights=True)[1]


@nnx.jit
def hidden(model, tokens):
    """What the feed-forward network of the first block returns."""
    _, seen = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(tokens)
    return seen["decoder"]["blocks"][0]["feed_forward"]["__call__"][0]


def recipe(batches: Batches, *, hidden: Callable[..., Any] = hidden):
    """Each row of a map sums to one and sees nothing ahead; what was captured leads to the logits."""
    model = nnx.view(DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0)), deterministic=True)
    tokens = next(batches).inputs
    ((name, weights),), seen = maps(model, tokens).items(), hidden(model, tokens)

    assert (name, weights.shape) == ("decoder.blocks.0.attention", (3, 2, 5, 5))  # [B, N, T, S]
    assert np.allclose(weights.sum(axis=-1), 1, atol=1e-6)
    assert np.array_equal(weights, np.tril(weights))
    decoder, block = model.decoder, model.decoder.blocks[0]
    assert decoder.norm is not None  # one that comes last is there in the pre order
    x = decoder.position_embedding(model.embedding(tokens))
    x = x + block.attention(block.attention_norm(x), causal=True)
    assert seen is not None, "nothing was captured"
    assert np.allclose(model.logits(decoder.norm(x + seen)), model(tokens), atol=1e-5)
    return weights[0, 0], seen[0, 0]


class Remembers(nnx.Module):
    """A layer that keeps what it returned last."""

    def __init__(self, layer: FeedForward):
        self.layer = layer
        self.seen = nnx.data(None)

    def __call__(self, x):
        self.seen = nnx.Intermediate(self.layer(x))
        return self.seen[...]


class Sows(nnx.Module):
    """A layer that sows what it returns."""

    def __init__(self, layer: FeedForward):
        self.layer = layer

    def __call__(self, x):
        y = self.layer(x)
        self.sow(nnx.Intermediate, "seen", y)
        return y


@mistake()
def a_layer_keeps_it_as_an_attribute(batches: Batches):
    """The layer assigns to an attribute of its own, inside of jax.jit."""

    def kept(model, tokens):
        layer = model.decoder.blocks[0].feed_forward = Remembers(model.decoder.blocks[0].feed_forward)
        jax.jit(lambda model, tokens: model(tokens))(model, tokens)
        model.decoder.blocks[0].feed_forward = layer.layer
        return layer.seen

    recipe(batches, hidden=kept)


@mistake()
def what_is_sown_is_not_captured(batches: Batches):
    """self.sow in a layer, and no nnx.capture around the call."""

    def sown(model, tokens):
        layer = model.decoder.blocks[0].feed_forward = Sows(model.decoder.blocks[0].feed_forward)
        nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
        model.decoder.blocks[0].feed_forward = layer.layer
        return vars(layer)["seen"][0]

    recipe(batches, hidden=sown)


if __name__ == "__main__":
    demonstrate(__file__)
