"""What there is to look at: a model's attention by layer and head, and what encodings of positions look like."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from core.config import Positions, TransformerConfig
from core.masks import Grid
from core.positions import sinusoidal_table
from core.relative import T5, ALiBi, Relative, Shaw, TransformerXL
from core.rotary import rotary, rotary_settings
from seq2seq.batches import batch
from seq2seq.examples import Pair
from seq2seq.plots import plot_attention
from seq2seq.runs import Run
from seq2seq.tasks import Task

Maps = dict[str, Float[np.ndarray, "N T S"]]


def attention_maps(
    frontend: Any, model: Any, task: Task, source: tuple[int, ...], target: tuple[int, ...]
) -> tuple[Maps, list[str], list[str]]:
    """Every attention's weights by name while the target is given, and the symbols of target and source."""
    made = batch([Pair(source, target)], max(len(target) + 1, len(source)), 1)
    masks = {"source_mask": made.source_mask, "target_mask": made.target_mask}
    _, weights = frontend.evaluation(model).run(made.source, made.inputs, **masks, return_weights=True)
    letters, symbols = task.source.pieces(source), [*task.target.pieces(target), "end"]
    maps = {}
    for name, value in weights.items():
        queries = len(letters) if name.startswith("encoder") else len(symbols)
        keys = len(symbols) if name.startswith("decoder") and not name.endswith("cross_attention") else len(letters)
        maps[name] = np.asarray(value)[0, :, :queries, :keys]
    return maps, symbols, letters


def draw_cross_attention(
    path: Path,
    frontend: Any,
    model: Any,
    task: Task,
    source: tuple[int, ...],
    target: tuple[int, ...],
    *,
    title: str,
) -> None:
    """Where the decoder looked in the source, by layer and head, for each symbol of the target."""
    maps, symbols, letters = attention_maps(frontend, model, task, source, target)
    shown = {name: weights for name, weights in maps.items() if name.endswith("cross_attention")}
    plot_attention(path, shown, symbols, letters, title=f"{title}: {task.target.decode(target)}")


def absolute_encodings(
    config: TransformerConfig, weights: Mapping[str, Array], *, length: int = 64
) -> dict[str, Float[np.ndarray, "L D"]]:
    """What is added to the vectors at each position, by name: learned tables, or the sinusoidal one."""
    learned = {
        name.removesuffix(".embedding"): np.asarray(value, "float32")[:length]
        for name, value in weights.items()
        if name.endswith("position_embedding.embedding")
    }
    if config.positions == "sinusoidal":
        return {"sinusoidal": np.asarray(sinusoidal_table(length, config.d_model))}
    return learned


def relative_encodings(config: TransformerConfig, weights: Mapping[str, Array], *, length: int = 64) -> Maps:
    """What the distance alone does to the logits, by name: those of queries and keys that are all ones.

    With Shaw, Transformer-XL and rotary positions the distance acts through queries and keys; here through ones.
    """
    grid = Grid((config.num_heads, length, length))
    ones = jnp.ones((length, config.num_heads, config.head_dim)) / config.head_dim**0.5

    @jax.jit
    def turned() -> Array:
        heads = rotary(ones, jnp.arange(length), **rotary_settings(config))
        return jnp.einsum("tnh,snh->nts", heads, heads)

    @jax.jit
    def added(encoding: Relative) -> Array:
        return jnp.broadcast_to(encoding.logits(ones, ones, grid, scale=1.0), grid.shape)

    if config.positions == "rotary":
        return {"rotary": np.asarray(turned())}
    return {name: np.asarray(added(encoding)) for name, encoding in _relative(config, weights).items()}


def run_encodings(run: Run, length: int) -> tuple[dict[str, np.ndarray], Maps]:
    """The absolute and the relative encodings of a run's best weights."""
    weights = run.best_weights()
    return (
        absolute_encodings(run.config, weights, length=length),
        relative_encodings(run.config, weights, length=length),
    )


def gallery(length: int) -> tuple[dict[str, np.ndarray], Maps]:
    """Every kind, with random numbers where something is to be learned."""
    rng = np.random.default_rng(0)
    absolute, relative = {}, {}
    for kind in get_args(Positions):
        config = TransformerConfig(d_model=64, num_heads=4, positions=kind, relative_distance=16, relative_buckets=16)
        shapes = {
            "learned": {"position_embedding.embedding": (length, 64)},
            "t5": {"encoder.relative.embedding": (16, 4)},
            "shaw": {"attention.relative.key_embedding": (33, 16)},
            "transformer_xl": {
                "attention.relative.content_bias": (4, 16),
                "attention.relative.kernel": (64, 64),
                "attention.relative.position_bias": (4, 16),
            },
        }.get(kind, {})
        weights = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
        absolute.update(zip([kind], absolute_encodings(config, weights, length=length).values(), strict=False))
        relative.update(zip([kind], relative_encodings(config, weights, length=length).values(), strict=False))
    return absolute, relative


def _relative(config: TransformerConfig, weights: Mapping[str, Array]) -> dict[str, Relative]:
    if config.positions == "alibi":
        return {"alibi": ALiBi()}
    modules = sorted({name.rpartition(".")[0] for name in weights if ".relative." in name})
    found: dict[str, Relative] = {}
    for module in modules:
        learned = {
            name.rpartition(".")[2]: jnp.asarray(value, jnp.float32)
            for name, value in weights.items()
            if name.startswith(f"{module}.")
        }
        if config.positions == "t5":
            bidirectional = module.startswith("encoder")
            found[module] = T5(**learned, bidirectional=bidirectional, max_distance=config.relative_distance)
        else:
            found[module] = (Shaw if config.positions == "shaw" else TransformerXL)(**learned)
    return found
