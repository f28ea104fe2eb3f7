"""Where the two frontends are one program, and where they give the same bits: `python -m bench agreement`.

The programs are those of `isoformer compare` and a few besides, under a few configurations; tests/test_agreement.py
draws configurations without end. NNX is asked twice, in graph mode and in tree mode.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any, Literal, NamedTuple

import jax
import optax
from flax import nnx
from rich.table import Table

from bench.ergonomics import fingerprint
from bench.recipes import CONFIG, Batches
from core.config import TransformerConfig
from core.losses import Batch
from seq2seq.agreement import programs, step_difference, text_hash
from seq2seq.frontends import frontend, randomness

BASE = CONFIG.replace(norm_order="post", dropout_rate=0.1)
CONFIGS = {
    "the paper's": BASE,
    "rotary, grouped heads, SwiGLU, RMS norm": BASE.replace(
        norm_order="pre", norm="rms_norm", positions="rotary", num_kv_heads=1, activation="swiglu", qk_norm=True
    ),
    "T5 buckets, sinks, window": BASE.replace(
        norm_order="sandwich", positions="t5", relative_distance=5, relative_buckets=4, attention_sinks=True,
        attention_window=(3, 0),
    ),
    "scanned layers, two of each": BASE.replace(num_encoder_layers=2, num_decoder_layers=2, scan_layers=True),
}  # fmt: skip
COLUMNS = {"NNX, graph mode": ("nnx", True), "NNX, tree mode": ("nnx", False), "Equinox": ("equinox", True)}
"""The frontend of each column, and NNX's mode."""
STEPS = 20
How = Literal["program text", "dataflow", "bits"]


class Comparison(NamedTuple):
    """One thing that is compared, by the sha256 of each column or, of dataflow, by where it parts."""

    config: str
    what: str
    how: How
    sha256: dict[str, str]
    difference: str | None
    equal: bool


def comparisons(configs: dict[str, TransformerConfig] = CONFIGS, *, steps: int = STEPS) -> list[Comparison]:
    """Every comparison under every configuration."""
    return [found for name, config in configs.items() for found in _compared(name, config, steps)]


def tables(found: list[Comparison]) -> list[Table]:
    """What is compared by configuration: the sha256 where all columns share it."""
    names = list(dict.fromkeys(one.config for one in found))
    table = Table("", "compared as", *names, title="NNX in graph mode, NNX in tree mode, Equinox")
    for what, how in dict.fromkeys((one.what, one.how) for one in found):
        row = {one.config: one for one in found if one.what == what}
        table.add_row(what, how, *("equal" if row[name].equal else "DIFFERENT" for name in names))
    return [table]


def _compared(name: str, config: TransformerConfig, steps: int) -> list[Comparison]:
    batch, made = next(Batches()), []
    hashes: dict[tuple[str, How], dict[str, str]] = {}
    for column, (framework, graph) in COLUMNS.items():
        package = frontend(framework)
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            weights = package.to_weights(package.init_transformer(config, seed=0))
            for what, program in (programs(package, config) | _more_programs(package, config)).items():
                hashes.setdefault((what, "program text"), {})[column] = text_hash(program, weights, batch)
            results = {"initial weights of one seed": weights} | _trained(package, config, steps)
            for what, result in results.items():
                hashes.setdefault((what, "bits"), {})[column] = fingerprint(result)
    weights = frontend("nnx").to_weights(frontend("nnx").init_transformer(config, seed=0))
    parts = step_difference(config, _optimizer(), weights, batch, label_smoothing=0.1)
    for (what, how), by_column in hashes.items():
        made.append(Comparison(name, what, how, by_column, None, len(set(by_column.values())) == 1))
    made.append(Comparison(name, "train step, dropout on", "dataflow", {}, parts, parts is None))
    order: list[How] = ["program text", "dataflow", "bits"]
    return sorted(made, key=lambda one: order.index(one.how))


def _more_programs(package: Any, config: TransformerConfig) -> dict[str, Callable[[dict, Batch], Any]]:
    """With dropout on, and whole decodings."""
    key = jax.random.key(1)

    def forward(weights, batch):
        model = package.from_weights(config, weights)
        masks = {"source_mask": batch.source_mask, "target_mask": batch.target_mask}
        return model(batch.source, batch.inputs, **masks, **{randomness(package): key})

    def gradient(weights, batch):
        loss = lambda weights: package.loss_fn(package.from_weights(config, weights), batch, key, label_smoothing=0.1)
        return jax.grad(loss, has_aux=True)(weights)

    def decoded(decode, **options):
        def run(weights, batch):
            model = package.evaluation(package.from_weights(config, weights))
            return decode(model, batch.source, source_mask=batch.source_mask, max_length=6, **options)

        return run

    return {
        "forward, dropout on": forward,
        "loss gradient, dropout on": gradient,
        "greedy decoding": decoded(package.generate),
        "beam search": decoded(package.beam_search, beam_size=2),
    }


def _trained(package: Any, config: TransformerConfig, steps: int) -> dict[str, Any]:
    """What training leaves behind, and what the trained model says."""
    batches = Batches()
    trainer = package.Trainer(package.init_transformer(config, seed=0), _optimizer(), seed=7, label_smoothing=0.1)
    losses = [trainer.train(batch).loss for batch in islice(batches, steps)]
    model, batch = package.evaluation(trainer.model), next(batches)
    forward = jax.jit(programs(package, config)["forward"])
    return {
        f"losses of {steps} train steps": losses,
        "weights after them": package.to_weights(trainer.model),
        "optimizer state after them": trainer.optimizer_state(),
        "logits of the trained model": forward(package.to_weights(model), batch),
        "its tokens, greedy": package.generate(model, batch.source, source_mask=batch.source_mask, max_length=6),
    }


def _optimizer() -> optax.GradientTransformation:
    """With all that sums over the whole tree."""
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=1e-2))
