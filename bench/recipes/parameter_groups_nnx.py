"""Parameter groups, in NNX: matrices decay, biases and norms do not, and the embedding learns more slowly."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer, loss_fn


def decayed(params):
    """True for matrices, False for biases and norms."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def groups(params):
    """The group of each parameter, by its path."""
    return nnx.map_state(lambda path, _: "table" if "embedding" in path else "rest", params)


def optimizer_with(mask: Any, labels: Any) -> optax.GradientTransformation:
    rates: dict[Hashable, optax.GradientTransformation] = {"table": optax.sgd(0.01), "rest": optax.sgd(0.1)}
    return optax.chain(optax.add_decayed_weights(0.5, mask=mask), optax.partition(rates, labels))


@nnx.jit
def train_step(model, optimizer, batch):
    grads = nnx.grad(lambda model: loss_fn(model, batch)[0])(model)
    return grads, optimizer.update(model, grads)


def recipe(batches: Batches, *, mask: Callable[[Any], Any] = lambda _: decayed, labels: Callable = groups):
    """An update is -rate * (gradient + decay), with the rate of its group, and decay of matrices alone."""
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optimizer_with(mask(model), labels), wrt=nnx.Param)
    before = nnx.to_flat_state(nnx.state(model, nnx.Param))
    weights = {path: np.asarray(param[...]) for path, param in before}
    grads, updates = train_step(model, optimizer, next(batches))

    gradient = {path: np.asarray(grad[...]) for path, grad in nnx.to_flat_state(grads)}
    update = {path: np.asarray(array) for path, array in nnx.to_flat_state(updates)}
    shrunk = {path for path in weights if not np.allclose(update[path], _rate(path) * -gradient[path], atol=1e-7)}
    wrongly = {".".join(map(str, path)) for path in shrunk if path[-1] in ("bias", "scale")}
    assert not wrongly, f"biases and norms decay, as {min(wrongly)}"
    assert shrunk == {path for path in weights if path[-1] in ("kernel", "embedding")}
    for path in shrunk:
        expected = -_rate(path) * (gradient[path] + 0.5 * weights[path])
        assert np.allclose(update[path], expected, atol=1e-7), f"{path} has not the rate of its group"
    return jnp.asarray(update["embedding", "embedding"][0])


def _rate(path: tuple) -> float:
    return 0.01 if path[0] == "embedding" else 0.1


@mistake("optax #1007")
def the_mask_is_a_tree_of_params(batches: Batches):
    """The mask is made ahead, of nnx.state(model): the optimizer maps it over bare arrays later."""
    recipe(batches, mask=lambda model: decayed(nnx.state(model, nnx.Param)))


@mistake()
def only_biases_are_left_out(batches: Batches):
    """The mask goes by names and forgets the scales of norms."""
    recipe(batches, mask=lambda _: lambda params: nnx.map_state(lambda path, _: path[-1] != "bias", params))


@mistake()
def the_groups_are_by_another_name(batches: Batches):
    """A label for which no optimizer is given."""
    recipe(batches, labels=lambda params: nnx.map_state(lambda path, _: path[0], params))


if __name__ == "__main__":
    demonstrate(__file__)
