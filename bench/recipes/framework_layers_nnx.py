"""The framework's own layers in our tree, in NNX: nnx.Linear and nnx.LayerNorm take the place of ours."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer, evaluation

EPSILON = 1e-3
WIDTH, HIDDEN = CONFIG.d_model, CONFIG.d_ff


def replaced(model, *, epsilon: float = EPSILON):
    """The same numbers in layers of Flax."""
    block = model.decoder.blocks[0]
    up, norm = nnx.Linear(WIDTH, HIDDEN, rngs=nnx.Rngs(1)), nnx.LayerNorm(WIDTH, epsilon=epsilon, rngs=nnx.Rngs(1))
    nnx.update(up, nnx.state(block.feed_forward.up_proj))
    nnx.update(norm, nnx.state(block.feed_forward_norm))
    block.feed_forward.up_proj, block.feed_forward_norm = up, norm
    return model


def recipe(batches: Batches, *, replaced: Callable[..., Any] = replaced):
    """The model's output is the same but for rounding, and their parameters are among its own."""
    config = CONFIG.replace(norm_epsilon=EPSILON)
    ours, model = (DecoderOnlyTransformer(config, rngs=nnx.Rngs(0)) for _ in range(2))
    model = evaluation(replaced(model))
    assert isinstance(model.decoder.blocks[0].feed_forward.up_proj, nnx.Linear), "ours are still there"
    tokens = next(batches).inputs
    logits, expected = model(tokens), ours(tokens)

    off = float(np.abs(logits - expected).max())
    assert off < 1e-5, f"off by {off:.1e} from our layers"
    names = {path[-3:-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert ("feed_forward", "up_proj") in names
    return expected[0, 0]


@mistake()
def epsilon_is_that_of_the_framework(batches: Batches):
    """nnx.LayerNorm with its default epsilon, 1e-6, and not that of the configuration."""
    recipe(batches, replaced=lambda model: replaced(model, epsilon=nnx.LayerNorm(1, rngs=nnx.Rngs(0)).epsilon))


@mistake()
def layers_are_held_in_a_plain_list(batches: Batches):
    """A module of one's own that holds layers in a list, not in an nnx.List."""

    class Row(nnx.Module):
        def __init__(self, *layers):
            self.layers = list(layers)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def rowed(model):
        model = replaced(model)
        network = model.decoder.blocks[0].feed_forward
        network.up_proj = Row(network.up_proj)
        return model

    recipe(batches, replaced=rowed)


@mistake()
def the_kernel_is_transposed(batches: Batches):
    """(out, in) for its (in, out), as for PyTorch; a Param does not compare shapes."""

    def transposed(model):
        model = replaced(model)
        kernel = model.decoder.blocks[0].feed_forward.up_proj.kernel
        kernel.set_value(kernel[...].T)
        return model

    recipe(batches, replaced=transposed)


if __name__ == "__main__":
    demonstrate(__file__)
