"""Checkpoint and resume exactly, in NNX: model, optimizer and random streams in one state, kept by Orbax."""

import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer, train_step


def begin():
    """All that a run changes: the model, its optimizer, the stream of dropout."""
    model = DecoderOnlyTransformer(CONFIG.replace(dropout_rate=0.5), rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param), nnx.Rngs(dropout=1)


def save(path: Path, model, optimizer, rngs):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.to_pure_dict(nnx.state([model, optimizer, rngs])))


def restore(path: Path):
    run = begin()
    state = nnx.state(list(run))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(state, checkpointer.restore(path, nnx.to_pure_dict(state)))
    nnx.update(list(run), state)
    return run


def recipe(batches: Batches, *, save: Callable[..., Any] = save, restore: Callable[[Path], Any] = restore):
    """Two steps, saved, restored, two steps more: the same bits as four steps, dropout included."""
    data, run = list(islice(batches, 4)), begin()
    uninterrupted = [train_step(run[0], run[1], batch, run[2]).loss for batch in data]

    run = begin()
    losses = [train_step(run[0], run[1], batch, run[2]).loss for batch in data[:2]]
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "step_2"), *run)
        run = restore(Path(folder, "step_2"))
    losses += [train_step(run[0], run[1], batch, run[2]).loss for batch in data[2:]]

    assert np.array_equal(losses, uninterrupted), f"resumed to {losses[3]:.4f}, not {uninterrupted[3]:.4f}"
    return jnp.stack(losses)


def restoring(*kept: int):
    """`restore` of those parts of the run alone; the others begin anew."""

    def partly(path: Path):
        saved, new = restore(path), begin()
        return [saved[i] if i in kept else new[i] for i in range(3)]

    return partly


@mistake("maxtext #4343")
def the_random_streams_are_not_kept(batches: Batches):
    """Model and optimizer are restored, the streams begin anew: old masks come again."""
    recipe(batches, restore=restoring(0, 1))


@mistake()
def the_optimizer_is_not_kept(batches: Batches):
    """The model is restored, the momentum begins at zero."""
    recipe(batches, restore=restoring(0, 2))


@mistake()
def it_is_restored_into_another_model(batches: Batches):
    """The configuration has changed since: one layer more."""

    def deeper(path: Path):
        config = CONFIG.replace(dropout_rate=0.5, num_decoder_layers=2)
        model = DecoderOnlyTransformer(config, rngs=nnx.Rngs(0))
        run = [model, nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param), nnx.Rngs(dropout=1)]
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path, nnx.to_pure_dict(nnx.state(run)))
        state = nnx.state(run)
        nnx.replace_by_pure_dict(state, restored)
        nnx.update(run, state)
        return run

    recipe(batches, restore=deeper)


if __name__ == "__main__":
    demonstrate(__file__)
