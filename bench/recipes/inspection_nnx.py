"""Count, print and inspect, in NNX: sizes of the state, a table by module, a model of shapes alone."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer


def count(model):
    return sum(param.size for param in jax.tree.leaves(nnx.state(model, nnx.Param)))


def tabulate(model, *inputs):
    return nnx.tabulate(model, *inputs, depth=4, console_kwargs={"width": 200})


def recipe(batches: Batches, *, count: Callable[[Any], int] = count, tabulate: Callable[..., str] = tabulate):
    """672 parameters, by hand as by program; the table names each module; a model of 10^9 costs no memory."""
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    found = count([model, optimizer])
    by_hand = 11 * 8 + 4 * 8 * 8 + (2 * 8 * 16 + 16 + 8) + 3 * 2 * 8
    assert found == by_hand == 672, f"counted {found}, not 672"

    table = tabulate(model, next(batches).inputs)
    assert "feed_forward" in table, "the table does not name the feed-forward network"
    assert "672" in table
    assert "# Param: 672" in repr(model)
    large = CONFIG.replace(target_vocab_size=50_000, d_model=4096, d_ff=16384, num_decoder_layers=4)
    billions = count(nnx.eval_shape(lambda: DecoderOnlyTransformer(large, rngs=nnx.Rngs(0))))
    assert billions > 10**9, f"counted {billions}"
    return np.array([found, billions])


@mistake()
def all_state_is_counted(batches: Batches):
    """nnx.state without nnx.Param: the optimizer's moments count too."""
    recipe(batches, count=lambda nodes: sum(x.size for x in jax.tree.leaves(nnx.state(nodes))))


@mistake()
def parameters_are_asked_of_the_model(batches: Batches):
    """model.parameters(), as in PyTorch."""
    recipe(batches, count=lambda nodes: sum(param.size for param in nodes[0].parameters()))


if __name__ == "__main__":
    demonstrate(__file__)
