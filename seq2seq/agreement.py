"""Whether the two frontends agree: as programs, and in bits."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from core.config import TransformerConfig
from core.identity import dataflow_difference, program_text
from core.losses import Batch
from seq2seq.frontends import FRONTENDS, frontend


def programs(package: Any, config: TransformerConfig) -> dict[str, Callable[[dict, Batch], Any]]:
    """Forward, loss gradient and decode step of one frontend, as functions of weights and a batch."""

    def model(weights):
        return package.evaluation(package.from_weights(config, weights))

    def forward(weights, batch):
        masks = {"source_mask": batch.source_mask, "target_mask": batch.target_mask}
        return model(weights)(batch.source, batch.inputs, **masks)

    def gradient(weights, batch):
        return jax.grad(lambda weights: package.loss_fn(model(weights), batch)[0])(weights)

    def decode_step(weights, batch):
        ready = model(weights)
        tokens, cache = ready.start(batch.source, source_mask=batch.source_mask, max_length=batch.labels.shape[-1])
        return ready.decode_step(tokens[..., None], cache)

    return {"forward": forward, "loss gradient": gradient, "decode step": decode_step}


def text_identity(config: TransformerConfig, weights: Mapping[str, Array], batch: Batch) -> dict[str, dict[str, str]]:
    """sha256 of the StableHLO text of each of the programs, by program and frontend."""
    hashes: dict[str, dict[str, str]] = {}
    for name in FRONTENDS:
        for program, fn in programs(frontend(name), config).items():
            hashes.setdefault(program, {})[name] = text_hash(fn, dict(weights), batch)
    return hashes


def text_hash(fn: Callable[..., Any], *args: Any) -> str:
    """sha256 of the StableHLO text."""
    return hashlib.sha256(program_text(fn, *args).encode()).hexdigest()


def step_difference(
    config: TransformerConfig,
    tx: optax.GradientTransformation,
    weights: Mapping[str, Array],
    batch: Batch,
    *,
    label_smoothing: float,
) -> str | None:
    """Where the dataflow of the two train steps parts, dropout on; None if nowhere."""
    traced = []
    for name in FRONTENDS:
        package = frontend(name)
        state = package.Trainer(package.from_weights(config, weights), tx).optimizer_state()
        step = package.functional_step(config, tx, label_smoothing=label_smoothing)
        traced.append(jax.make_jaxpr(step)(dict(weights), state, batch, jax.random.key(0), jnp.uint32(0)))
    return dataflow_difference(*traced)


def bit_difference(first: Mapping[str, Array], second: Mapping[str, Array]) -> str | None:
    """The first name at which two dictionaries of arrays differ in a bit, and by how much; None if nowhere."""
    if first.keys() != second.keys():
        return f"names differ: {sorted(first.keys() ^ second.keys())}"
    for name, array in first.items():
        a, b = np.asarray(array), np.asarray(second[name])
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{name}: {a.dtype}{list(a.shape)} here, {b.dtype}{list(b.shape)} there"
        if a.tobytes() != b.tobytes():
            apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
            where = np.unravel_index(np.argmax(apart), apart.shape)
            place = [int(i) for i in where]
            return f"{name} at {place}: {a[where]} here, {b[where]} there, {np.mean(a != b):.1%} of it differs"
    return None
