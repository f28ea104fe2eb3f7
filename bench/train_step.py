"""A whole training step of both frontends beside PyTorch's, in turn on the same batch: `python -m bench train`.

The same first weights (losses are compared first, without dropout), AdamW, clipping, smoothing and dropout. What
the arithmetic alone would take is the step's products at the rate at which XLA multiplies large matrices here.
"""

import importlib.util
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from bench.turns import in_turn
from core.config import TransformerConfig
from core.losses import Batch
from seq2seq.frontends import frontend
from seq2seq.measure import timed
from seq2seq.optimizer import make_optimizer
from seq2seq.options import TrainingOptions

_BASE = TransformerConfig(source_vocab_size=8000, target_vocab_size=8000, tie_embeddings="all", max_length=64)
SIZES = {
    "small": _BASE.replace(d_model=256, num_heads=4, d_ff=1024, num_encoder_layers=3, num_decoder_layers=3),
    "base": _BASE,
}
ROUNDS = {"small": 9, "base": 3}
ROWS, LENGTH = 16, 64
_OPTIONS = TrainingOptions(steps=1000, warmup=10)


class StepTime(NamedTuple):
    """Seconds of one step: the least, which other work on the machine hardly touches, and the median."""

    size: str
    side: str
    least: float
    median: float
    arithmetic: float  # what its matrix products alone would take


def step_times(sizes: Sequence[str] = tuple(SIZES), *, rounds: int | None = None) -> list[StepTime]:
    """Of 16 x 64 tokens on each side; ours first."""
    return [time for size in sizes for time in _times(size, rounds or ROUNDS[size])]


def tables(found: Sequence[StepTime]) -> list[Table]:
    """One row for each side."""
    table = Table("size", "side", "median", "least", "ours / theirs", "arithmetic / it", title="training step")
    for size in dict.fromkeys(time.size for time in found):
        rows = [time for time in found if time.size == size]
        for row in rows:
            times = (f"{1000 * seconds:.0f} ms" for seconds in (row.median, row.least))
            ratio, share = rows[0].least / row.least, row.arithmetic / row.least
            table.add_row(size, row.side, *times, f"{ratio:.2f}", f"{100 * share:.0f} %")
    return [table]


def _times(size: str, rounds: int) -> list[StepTime]:
    config, rng = SIZES[size], np.random.default_rng(0)
    weights = frontend("equinox").to_weights(frontend("equinox").init_transformer(config, seed=0))
    trainers = _trainers(config, weights)
    batch = _batch(config, rng)
    losses = {name: float(trainer.evaluate(batch).loss) for name, trainer in trainers.items()}
    np.testing.assert_allclose(list(losses.values()), losses["nnx"], rtol=1e-4, err_msg=str(losses))
    if torch := trainers.get("torch, compiled"):
        torch.model.compile()
    for trainer in trainers.values():
        jax.block_until_ready(trainer.train(batch))  # compiles
    samples = in_turn({name: partial(trainer.train, batch) for name, trainer in trainers.items()}, rounds=rounds)
    least = _products(config) / _rate()
    return [StepTime(size, name, min(times), statistics.median(times), least) for name, times in samples.items()]


def _trainers(config: TransformerConfig, weights: dict[str, jax.Array]) -> dict[str, Any]:
    found = {}
    for name in ("nnx", "equinox"):
        package = frontend(name)
        model = package.from_weights(config, jax.tree.map(jnp.copy, weights))
        found[name] = package.Trainer(model, make_optimizer(_OPTIONS), label_smoothing=_OPTIONS.label_smoothing)
    if importlib.util.find_spec("torch"):
        from bench import torch_trainer, torch_transformer

        for name in ("torch, eager", "torch, compiled"):
            model = torch_transformer.Transformer(config)
            torch_transformer.load_weights(model, {name: np.asarray(array) for name, array in weights.items()})
            found[name] = torch_trainer.Trainer(model, _OPTIONS)
    return found


def _batch(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    tokens = [jnp.asarray(rng.integers(3, config.vocab_size("target"), (ROWS, LENGTH)), jnp.int32) for _ in range(3)]
    real = jnp.ones((ROWS, LENGTH), bool)
    return Batch(tokens[0], real, tokens[1], tokens[2], real)


def _products(config: TransformerConfig) -> float:
    """Operations of the matrix products of one step, forward and backward, of which there are twice as many."""
    tokens, width = ROWS * LENGTH, config.d_model
    projections, attention, feed_forward = 4 * width**2, 2 * LENGTH * width, 2 * width * config.d_ff
    encoder = config.num_encoder_layers * (projections + attention + feed_forward)
    decoder = config.num_decoder_layers * (2 * (projections + attention) + feed_forward)
    return 3 * 2 * tokens * (encoder + decoder + width * config.vocab_size("target"))


def _rate() -> float:
    """Operations a second of a large product of matrices: the best of several."""
    x, y = (jax.random.normal(jax.random.key(seed), (1024, 1024)) for seed in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * 1024**3 / min(timed(product, x, y)[0] for _ in range(20))
