"""Checkpoint and resume exactly, in Equinox: the leaves of model, optimizer state and key go into one file."""

import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer, train_step

tx = optax.sgd(0.1, momentum=0.9)


def begin(**changes):
    """All that a run changes: the model, the optimizer's state, how many steps there were."""
    model = DecoderOnlyTransformer(CONFIG.replace(dropout_rate=0.5, **changes), key=jax.random.key(0))
    return model, tx.init(eqx.filter(model, eqx.is_inexact_array)), 0


def advance(run, batch):
    """One more step; step n drops by fold_in(key, n)."""
    model, opt_state, step = run
    model, opt_state, metrics = train_step(model, opt_state, batch, jax.random.fold_in(jax.random.key(1), step), tx=tx)
    return (model, opt_state, step + 1), metrics.loss


def save(path: Path, run):
    eqx.tree_serialise_leaves(path, run)


def restore(path: Path):
    return eqx.tree_deserialise_leaves(path, eqx.filter_eval_shape(begin))


def recipe(batches: Batches, *, save: Callable[..., Any] = save, restore: Callable[[Path], Any] = restore):
    """Two steps, saved, restored, two steps more: the same bits as four steps, dropout included."""
    data, run, uninterrupted = list(islice(batches, 4)), begin(), []
    for batch in data:
        run, loss = advance(run, batch)
        uninterrupted.append(loss)

    run, losses = begin(), []
    for batch in data[:2]:
        run, loss = advance(run, batch)
        losses.append(loss)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "step_2.eqx"), run)
        run = restore(Path(folder, "step_2.eqx"))
    for batch in data[2:]:
        run, loss = advance(run, batch)
        losses.append(loss)

    assert np.array_equal(losses, uninterrupted), f"resumed to {losses[3]:.4f}, not {uninterrupted[3]:.4f}"
    return jnp.stack(losses)


@mistake()
def the_step_is_not_kept(batches: Batches):
    """Model and optimizer are restored, steps are counted from zero: old masks come again."""
    recipe(batches, restore=lambda path: (*restore(path)[:2], 0))


@mistake()
def the_optimizer_is_not_kept(batches: Batches):
    """The model is restored, the momentum begins at zero."""
    recipe(batches, restore=lambda path: (restore(path)[0], *begin()[1:2], 2))


@mistake()
def it_is_restored_into_another_model(batches: Batches):
    """The configuration has changed since: one layer more."""
    deeper = lambda: begin(num_decoder_layers=2)
    recipe(batches, restore=lambda path: eqx.tree_deserialise_leaves(path, eqx.filter_eval_shape(deeper)))


@mistake()
def a_typed_key_is_kept_as_it_is(batches: Batches):
    """A key from jax.random.key among the leaves, not its jax.random.key_data."""
    recipe(batches, save=lambda path, run: eqx.tree_serialise_leaves(path, (*run, jax.random.key(1))))


if __name__ == "__main__":
    demonstrate(__file__)
