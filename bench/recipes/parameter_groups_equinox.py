"""Parameter groups, in Equinox: matrices decay, biases and norms do not, and the embedding learns more slowly."""

from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer, loss_fn, to_weights


def decayed(params):
    """True for matrices, False for biases and norms."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def groups(params):
    """The group of each parameter, by its place in the tree."""
    rest = jax.tree.map(lambda _: "rest", params)
    return eqx.tree_at(lambda m: m.embedding.embedding, rest, "table")


def optimizer_with(mask: Any, labels: Any) -> optax.GradientTransformation:
    rates: dict[Hashable, optax.GradientTransformation] = {"table": optax.sgd(0.01), "rest": optax.sgd(0.1)}
    return optax.chain(optax.add_decayed_weights(0.5, mask=mask), optax.partition(rates, labels))


@eqx.filter_jit
def train_step(model, opt_state, batch, tx):
    grads = eqx.filter_grad(lambda model: loss_fn(model, batch)[0])(model)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, grads, updates


def recipe(batches: Batches, *, mask: Callable[[Any], Any] = lambda _: decayed, labels: Callable = groups):
    """An update is -rate * (gradient + decay), with the rate of its group, and decay of matrices alone."""
    model = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    tx = optimizer_with(mask(model), labels)
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    *_, grads, updates = train_step(model, opt_state, next(batches), tx)

    weights, gradient, update = (jax.tree.map(np.asarray, to_weights(tree)) for tree in (model, grads, updates))
    shrunk = {name for name in weights if not np.allclose(update[name], _rate(name) * -gradient[name], atol=1e-7)}
    wrongly = {name for name in shrunk if name.endswith(("bias", "scale"))}
    assert not wrongly, f"biases and norms decay, as {min(wrongly)}"
    assert shrunk == {name for name in weights if name.endswith(("kernel", "embedding"))}
    for name in shrunk:
        expected = -_rate(name) * (gradient[name] + 0.5 * weights[name])
        assert np.allclose(update[name], expected, atol=1e-7), f"{name} has not the rate of its group"
    return jnp.asarray(update["embedding.embedding"][0])


def _rate(name: str) -> float:
    return 0.01 if name.startswith("embedding.") else 0.1


@mistake("equinox #771, optax #1007")
def the_mask_is_a_tree_of_the_whole_model(batches: Batches):
    """The mask is made ahead, of the model and not of its arrays alone."""
    recipe(batches, mask=lambda model: jax.tree.map(lambda leaf: eqx.is_array(leaf) and leaf.ndim > 1, model))


@mistake("optax #1007")
def the_mask_is_a_tree_of_the_arrays(batches: Batches):
    """The mask is made ahead, of the arrays: a module of bools, which can be called like a function."""
    recipe(batches, mask=lambda model: decayed(eqx.filter(model, eqx.is_inexact_array)))


@mistake()
def only_biases_are_left_out(batches: Batches):
    """The mask goes by names and forgets the scales of norms."""
    named = lambda path, _: not jax.tree_util.keystr(path).endswith("bias")
    recipe(batches, mask=lambda _: lambda params: jax.tree_util.tree_map_with_path(named, params))


@mistake()
def the_groups_are_by_another_name(batches: Batches):
    """A label for which no optimizer is given."""
    named = lambda path, _: jax.tree_util.keystr(path[:1])
    recipe(batches, labels=lambda params: jax.tree_util.tree_map_with_path(named, params))


if __name__ == "__main__":
    demonstrate(__file__)
