"""The framework's own layers in our tree, in Equinox: eqx.nn.Linear and eqx.nn.LayerNorm take the place of ours."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer, evaluation

EPSILON = 1e-3
WIDTH, HIDDEN = CONFIG.d_model, CONFIG.d_ff


class PerVector(eqx.Module):
    """Layers of Equinox take one vector: this one maps over the axes before."""

    layer: Callable[..., Any]

    def __call__(self, x):
        function = self.layer
        for _ in x.shape[:-1]:
            function = jax.vmap(function)
        return function(x)


def layers(block):
    return block.feed_forward.up_proj, block.feed_forward_norm


def replaced(model, *, epsilon: float = EPSILON, wrap: Callable[..., Any] = PerVector, transpose: bool = True):
    """The same numbers in layers of Equinox, whose Linear is (out, in)."""
    ours, norm = layers(model.decoder.blocks[0])
    linear = eqx.nn.Linear(WIDTH, HIDDEN, key=jax.random.key(1))
    kernel = ours.kernel.T if transpose else ours.kernel
    linear = eqx.tree_at(lambda x: (x.weight, x.bias), linear, (kernel, ours.bias))
    theirs = eqx.tree_at(lambda x: (x.weight, x.bias), eqx.nn.LayerNorm(WIDTH, epsilon), (norm.scale, norm.bias))
    return eqx.tree_at(lambda m: layers(m.decoder.blocks[0]), model, (wrap(linear), wrap(theirs)))


def recipe(batches: Batches, *, replaced: Callable[..., Any] = replaced):
    """The model's output is the same but for rounding."""
    ours = DecoderOnlyTransformer(CONFIG.replace(norm_epsilon=EPSILON), key=jax.random.key(0))
    model = evaluation(replaced(ours))
    tokens = next(batches).inputs
    logits, expected = model(tokens), ours(tokens)

    off = float(np.abs(logits - expected).max())
    assert off < 1e-5, f"off by {off:.1e} from our layers"
    assert any(isinstance(leaf, eqx.nn.Linear) for leaf in jax.tree.leaves(model, is_leaf=_is_theirs))
    return expected[0, 0]


def _is_theirs(node) -> bool:
    return isinstance(node, eqx.nn.Linear)


@mistake()
def epsilon_is_that_of_the_framework(batches: Batches):
    """eqx.nn.LayerNorm with its default epsilon, 1e-5, and not that of the configuration."""
    recipe(batches, replaced=lambda model: replaced(model, epsilon=eqx.nn.LayerNorm(1).eps))


@mistake("equinox #662")
def the_layers_are_not_mapped(batches: Batches):
    """eqx.nn.LayerNorm and eqx.nn.Linear as they are, on [B, T, D]."""
    recipe(batches, replaced=lambda model: replaced(model, wrap=lambda layer: layer))


@mistake()
def the_kernel_is_not_transposed(batches: Batches):
    """Our (in, out) for its (out, in); eqx.tree_at does not compare shapes."""
    recipe(batches, replaced=lambda model: replaced(model, transpose=False))


@mistake()
def the_layer_is_assigned(batches: Batches):
    """Surgery by assignment, as in PyTorch."""

    def assigned(model):
        model.decoder.blocks[0].feed_forward.up_proj = eqx.nn.Linear(WIDTH, HIDDEN, key=jax.random.key(1))
        return model

    recipe(batches, replaced=assigned)


if __name__ == "__main__":
    demonstrate(__file__)
