"""An Equinox model inside an NNX module: nnx.data says that it holds arrays, and Equinox's filters say which."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer, loss_fn


class Holder(nnx.Module):
    """An Equinox model, and a count of its calls."""

    def __init__(self, model, hold: Callable[[Any], Any] = nnx.data):
        self.calls = nnx.Variable(jnp.int32(0))
        self.model = hold(model)


@nnx.jit
def gradients(holder, batch):
    holder.calls[...] += 1
    return eqx.filter_value_and_grad(lambda model: loss_fn(model, batch)[0])(holder.model)


def recipe(batches: Batches, *, hold: Callable[[Any], Any] = nnx.data, gradients: Callable[..., Any] = gradients):
    """Loss and gradients are those under Equinox's own transforms, in bits; NNX counts the calls."""
    model = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    holder, batch = Holder(model, hold), next(batches)
    loss, grads = gradients(holder, batch)
    own = eqx.filter_jit(eqx.filter_value_and_grad(lambda model, batch: loss_fn(model, batch)[0]))
    expected, theirs = own(model, batch)

    assert loss == expected
    found = jax.tree.leaves(eqx.filter(grads, eqx.is_array))
    wanted = jax.tree.leaves(theirs)
    assert len(found) == len(wanted), f"gradients of {len(found)} arrays, not of {len(wanted)}"
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert holder.calls[...] == 1, "the call was not counted"
    return loss


@mistake()
def the_model_is_assigned_as_it_is(batches: Batches):
    """self.model = model, without nnx.data."""
    recipe(batches, hold=lambda model: model)


@mistake()
def nnx_differentiates_the_holder(batches: Batches):
    """nnx.value_and_grad of the module: it differentiates nnx.Params, and arrays of Equinox are none."""
    whole = nnx.value_and_grad(lambda holder, batch: loss_fn(holder.model, batch)[0])

    @nnx.jit
    def by_nnx(holder, batch):
        holder.calls[...] += 1
        return whole(holder, batch)

    recipe(batches, gradients=by_nnx)


@mistake()
def the_model_itself_is_given_to_nnx_jit(batches: Batches):
    """nnx.jit of the bare model: to it a model of Equinox is a tree, whose bools it traces."""
    bare = nnx.jit(lambda model, batch: eqx.filter_value_and_grad(lambda m: loss_fn(m, batch)[0])(model))
    recipe(batches, gradients=lambda holder, batch: bare(holder.model, batch))


if __name__ == "__main__":
    demonstrate(__file__)
