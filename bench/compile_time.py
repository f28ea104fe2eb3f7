"""What the program of a train step costs before it runs, by depth, in a loop and in a scan: `python -m bench compile`.

In CPU seconds of all threads, which do not depend on what else the machine does.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from core.config import TransformerConfig
from core.losses import Batch
from seq2seq.frontends import frontend

DEPTHS = (3, 24)
"""Layers of the encoder, and as many of the decoder."""
ROUNDS = 1
CONFIG = TransformerConfig(source_vocab_size=512, target_vocab_size=512, d_model=64, num_heads=4, d_ff=128)


class Compilation(NamedTuple):
    """CPU seconds of tracing, lowering and compiling one train step, and of one step after that."""

    frontend: str
    scan: bool
    layers: int
    compile_s: float  # the median
    spread: tuple[float, float]
    step_s: float


def compilations(depths: Sequence[int] = DEPTHS, *, rounds: int = ROUNDS) -> list[Compilation]:
    """Of each frontend, depth and form, in turn in each round; nothing is cached from one to the next."""
    samples: dict[tuple[str, bool, int], list[tuple[float, float]]] = {}
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for _ in range(rounds):
            for name in ("nnx", "equinox"):
                for layers in depths:
                    for scan in (False, True):
                        samples.setdefault((name, scan, layers), []).append(_first_and_later(name, scan, layers))
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    return [
        Compilation(
            *case,
            statistics.median(first - later for first, later in times),
            (min(first - later for first, later in times), max(first - later for first, later in times)),
            statistics.median(later for _, later in times),
        )
        for case, times in samples.items()
    ]


def tables(found: Sequence[Compilation]) -> list[Table]:
    """By depth, and what the deepest costs beside the least deep."""
    depths = sorted({one.layers for one in found})
    made = Table(
        "", *(f"{n} + {n} layers" for n in depths), f"{depths[-1]} / {depths[0]}", title="compile time, train step"
    )
    for name in ("nnx", "equinox"):
        for scan in (False, True):
            row = {one.layers: one for one in found if (one.frontend, one.scan) == (name, scan)}
            cells = [f"{row[n].compile_s:.1f} s ({row[n].spread[0]:.1f}-{row[n].spread[1]:.1f})" for n in depths]
            ratio = row[depths[-1]].compile_s / row[depths[0]].compile_s
            made.add_row(f"{name}, {'scan' if scan else 'loop'}", *cells, f"{ratio:.2f} x")
    return [made]


def _first_and_later(name: str, scan: bool, layers: int) -> tuple[float, float]:
    jax.clear_caches()
    package = frontend(name)
    config = CONFIG.replace(num_encoder_layers=layers, num_decoder_layers=layers, scan_layers=scan)
    trainer = package.Trainer(package.init_transformer(config, seed=0), optax.adamw(1e-3))
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 512, (2, 16)), jnp.int32)
    real = jnp.ones((2, 16), bool)
    batch = Batch(tokens, real, tokens, tokens, real)
    first, *later = (_cpu_seconds(trainer.train, batch) for _ in range(6))
    return first, statistics.median(later)


def _cpu_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.process_time()
    jax.block_until_ready(function(*arguments))
    return time.process_time() - start
