"""Adapters of a training in each frontend: dropout, tied embeddings and Adam, kept as `isoformer train` keeps it."""

from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax

import equinox_impl
import nnx_impl
from conformance.adapters import Run
from core.config import TransformerConfig
from core.losses import Batch
from seq2seq import checkpoints
from seq2seq.examples import Pair
from seq2seq.stream import endless_batches

CONFIG = TransformerConfig(
    source_vocab_size=8, target_vocab_size=8, d_model=4, num_heads=1, d_ff=4, num_encoder_layers=1,
    num_decoder_layers=1, max_length=4, dropout_rate=0.5, tie_embeddings="all",
)  # fmt: skip
PAIRS = [Pair((3 + i, 7 - i), (7 - i, 3 + i)) for i in range(5)]


class Training(NamedTuple):
    """Before step `step`; both the trainer and the data move on in place."""

    trainer: Any
    data: grain.DatasetIterator[Batch]
    seed: int
    step: int


def run(package: Any) -> Run:
    """Of a frontend."""

    def made(model: Any, seed: int) -> Training:
        trainer = package.Trainer(model, optax.adam(0.1), seed=seed)
        return Training(trainer, endless_batches(PAIRS, [4], tokens=8, seed=seed), seed, 0)

    def start(seed: int) -> Training:
        return made(package.init_transformer(CONFIG, seed=seed), seed)

    def train(state: Training, steps: int) -> tuple[np.ndarray, Training]:
        losses = [state.trainer.train(next(state.data)).loss for _ in range(steps)]
        return np.array(losses), state._replace(step=state.step + steps)

    def save(folder: Path, state: Training) -> None:
        arrays = {"weights": package.to_weights(state.trainer.model), "optimizer": state.trainer.optimizer_state()}
        checkpoints.save(folder, state.step, arrays, {"seed": state.seed, "data": state.data.get_state()})

    def load(folder: Path) -> Training:
        (step,) = checkpoints.steps(folder)
        found = checkpoints.load(folder, step)
        state = made(package.from_weights(CONFIG, found.arrays["weights"]), found.about["seed"])
        state.trainer.resume(found.arrays["optimizer"], step=step)
        state.data.set_state(found.about["data"])
        return state._replace(step=step)

    lenient = lambda: jax.numpy_dtype_promotion("standard")  # optax adds integers to floats
    name = f"isoformer.{package.__name__}.Trainer"
    return Run(name, train, context=lenient, start=start, save=save, load=load)


nnx_run, equinox_run = map(run, (nnx_impl, equinox_impl))
adapters = (nnx_run, equinox_run)
