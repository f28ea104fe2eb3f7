"""LoRA, in NNX: every Linear is wrapped in nnx.LoRA, and only the low-rank matrices are trained."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from nnx_impl import DecoderOnlyTransformer, Linear, loss_fn, to_weights


def adapted(model, **options):
    """The model with rank 2 beside every Linear; its output is the same until lora_b has moved."""
    rngs = nnx.Rngs(1)

    def wrap(path, node):
        if not isinstance(node, Linear):
            return node
        return nnx.LoRA(node.kernel.shape[0], 2, node.kernel.shape[1], base_module=node, rngs=rngs, **options)

    return nnx.recursive_map(wrap, model)


@nnx.jit(static_argnames="wrt")
def train_step(model, optimizer, batch, wrt):
    graphdef, params, rest = nnx.split(model, wrt, ...)
    objective = lambda params: loss_fn(nnx.merge(graphdef, params, rest), batch)
    grads, metrics = jax.grad(objective, has_aux=True)(params)
    optimizer.update(model, grads)
    return metrics.loss


def recipe(batches: Batches, *, adapted: Callable[..., Any] = adapted, wrt: Any = nnx.LoRAParam):
    """The wrapped model gives the bits of the old one; then adapters learn, all else stays."""
    plain = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    model = adapted(plain)
    optimizer, tokens = nnx.Optimizer(model, optax.adam(0.01), wrt=wrt), next(batches).inputs
    assert np.array_equal(model(tokens), plain(tokens)), "the output is another before any training"

    before = to_weights(model)
    losses = [train_step(model, optimizer, batch, wrt) for batch in islice(batches, 2)]
    changed = moved(before, to_weights(model))
    assert changed, "nothing was trained"
    assert changed == {name for name in before if "lora_" in name}, "more than the adapters has moved"
    return jnp.stack(losses)


@mistake()
def all_params_are_trained(batches: Batches):
    """wrt=nnx.Param: an nnx.LoRAParam is an nnx.Param, and so is all the rest."""
    recipe(batches, wrt=nnx.Param)


@mistake()
def lora_b_does_not_begin_at_zero(batches: Batches):
    """Both matrices are drawn at random."""
    recipe(batches, adapted=lambda model: adapted(model, b_initializer=nnx.initializers.normal()))


@mistake()
def the_wrapped_model_is_not_assigned(batches: Batches):
    """nnx.recursive_map returns a new tree; the old model is trained."""

    def forgotten(model):
        adapted(model)
        return model

    recipe(batches, adapted=forgotten)


@mistake()
def old_weights_are_loaded_into_the_wrapped_model(batches: Batches):
    """The state of the plain model put into a wrapped one: wrapping has put base_module into every path."""

    def loaded(plain):
        wrapped = adapted(DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(7)))
        nnx.update(wrapped, nnx.state(plain))
        return wrapped

    recipe(batches, adapted=loaded)


if __name__ == "__main__":
    demonstrate(__file__)
