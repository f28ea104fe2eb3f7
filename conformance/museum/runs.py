"""Bugs of training runs, in NumPy: an autoencoder with one tied matrix, dropout and momentum."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conformance.adapters import Run
from conformance.museum.exhibit import Exhibit

WIDTH, EXAMPLES = 3, 4


class State(NamedTuple):
    """Before step `step`. The decoder is the encoder itself where they are tied."""

    encoder: np.ndarray
    decoder: np.ndarray
    velocity: np.ndarray
    random: np.random.Generator
    step: int


class NumpyRun:
    """A right one; an exhibit replaces the method that is wrong."""

    def start(self, seed):
        weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH))
        return State(weights, weights, np.zeros_like(weights), np.random.default_rng(seed), 0)

    def __call__(self, state, steps):
        losses = []
        for _ in range(steps):
            loss, state = self.train(state)
            losses.append(loss)
        return np.array(losses), state

    def train(self, state):
        x = np.random.default_rng([1, state.step % EXAMPLES]).standard_normal(WIDTH)
        hidden = x @ state.encoder * (state.random.random(WIDTH) < 0.7)
        error = hidden @ state.decoder.T - x
        by_encoder, by_decoder = np.outer(x, error @ state.decoder * (hidden != 0)), np.outer(error, hidden)
        velocity = 0.9 * state.velocity + by_encoder + (by_decoder if state.decoder is state.encoder else 0)
        encoder = state.encoder - 0.01 * velocity
        decoder = encoder if state.decoder is state.encoder else state.decoder - 0.01 * by_decoder
        return np.square(error).sum(), State(encoder, decoder, velocity, state.random, state.step + 1)

    def save(self, folder, state):
        folder.mkdir()
        np.savez(folder / "arrays.npz", weights=state.encoder, velocity=state.velocity)
        about = {"random": state.random.bit_generator.state, "step": state.step}
        (folder / "about.json").write_text(json.dumps(about))

    def load(self, folder):
        arrays, about = np.load(folder / "arrays.npz"), json.loads((folder / "about.json").read_text())
        random = np.random.default_rng()
        random.bit_generator.state = about["random"]
        weights = arrays["weights"]
        return State(weights, weights, arrays["velocity"], random, about["step"])

    def adapter(self, name):
        return Run(name, self, start=self.start, save=self.save, load=self.load)


class KeysAnew(NumpyRun):
    def load(self, folder):
        return super().load(folder)._replace(random=np.random.default_rng(0))


class OptimizerAnew(NumpyRun):
    def load(self, folder):
        return super().load(folder)._replace(velocity=np.zeros((WIDTH, WIDTH)))


class StepTwice(NumpyRun):
    """The number saved is that of the step that was done, and it is done again."""

    def save(self, folder, state):
        super().save(folder, state._replace(step=state.step - 1))


class TakenForTemporary(NumpyRun):
    """A checkpoint counts where it was committed; what else lies there is cleared away."""

    def save(self, folder, state):
        super().save(folder, state)
        (folder / "commit").write_text(str(folder.absolute()))

    def load(self, folder):
        if Path((folder / "commit").read_text()) != folder.absolute():
            shutil.rmtree(folder)
            raise FileNotFoundError(f"no checkpoint in {folder}")
        return super().load(folder)


class TieLost(NumpyRun):
    def load(self, folder):
        state = super().load(folder)
        return state._replace(decoder=state.encoder.copy())


GOES_ON, COPIED = "a_run_that_stops_goes_on_to_the_same_losses", "a_copied_checkpoint_is_loaded_and_stays"
EXHIBITS = (
    Exhibit(38, "random keys begin anew", "orbax#620, maxtext#4343", KeysAnew().adapter("keys anew"), (GOES_ON,)),
    Exhibit(38, "the optimizer begins anew", "flax#4383", OptimizerAnew().adapter("optimizer anew"), (GOES_ON,)),
    Exhibit(39, "a step is done twice", "maxdiffusion#484", StepTwice().adapter("step twice"), (GOES_ON,)),
    Exhibit(
        40, "a copy is taken for temporary", "orbax#394", TakenForTemporary().adapter("taken for temporary"), (COPIED,)
    ),
    Exhibit(
        41, "the tie is lost", "transformers#42612, Automodel#2571", TieLost().adapter("tie lost"), (GOES_ON, COPIED)
    ),
)
right = NumpyRun().adapter("NumPy run")
