"""Both frontends, for tests that say the same of each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import equinox_impl
import nnx_impl
from core.config import TransformerConfig
from core.losses import Batch

FRONTENDS = {"nnx": nnx_impl, "equinox": equinox_impl}
CONFIG = TransformerConfig(
    source_vocab_size=11,
    target_vocab_size=13,
    source_features=3,
    d_model=8,
    num_heads=2,
    d_ff=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.5,
)
"""The smallest model with all of its parts."""
LEARNED_DISTANCES = {
    name: CONFIG.replace(
        positions=name, relative_distance=5, relative_buckets=4, attention_sinks=True, qk_norm=True,
        norm_order="sandwich", stochastic_depth_rate=0.25,
    )
    for name in ("shaw", "t5", "transformer_xl")
}  # fmt: skip
"""The same with relative positions that are learned, and with all other parameters that a choice adds."""

MODULES = (
    "source_embedding/embedding", "target_embedding/embedding", "encoder/blocks.0/attention/k_proj",
    "decoder/blocks.0/cross_attention/q_proj", "decoder/blocks.0/attention/o_proj",
    "decoder/blocks.0/feed_forward/down_proj", "logits",
)  # fmt: skip
"""Places in the program of an encoder-decoder, as profiles and HLO name them."""


def random_weights(config: TransformerConfig, seed: int, *, model_class: str = "Transformer") -> dict[str, Array]:
    """Distinct random numbers for every parameter, biases and scales too, so that no term is missing by chance."""
    build = getattr(equinox_impl, model_class)
    shapes = jax.eval_shape(lambda: equinox_impl.to_weights(build(config, key=jax.random.key(0))))
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype) for name, s in shapes.items()}


def random_batch(
    config: TransformerConfig, seed: int, *, batch: tuple[int, ...] = (2,), lengths: tuple[int, int] = (5, 4)
) -> Batch:
    """Ragged masks, S != T; a row may be empty."""
    rng = np.random.default_rng(seed)

    def tokens(size: int, length: int) -> Array:
        return jnp.asarray(rng.integers(0, size, (*batch, length)), jnp.int32)

    def ragged(length: int) -> Array:
        return jnp.asarray(np.arange(length) < rng.integers(0, length + 1, (*batch, 1)))

    source, target = config.vocab_size("source"), config.vocab_size("target")
    S, T = lengths
    return Batch(tokens(source, S), ragged(S), tokens(target, T), tokens(target, T), ragged(T))


def random_examples(
    config: TransformerConfig, seed: int, *, batch: tuple[int, ...] = (2,), length: int = 5, anywhere: bool = False
) -> Batch:
    """For a classifier: ragged rows of vectors, or padding anywhere in them; a row or a label may be missing."""
    rng = np.random.default_rng(seed)
    source = jnp.asarray(rng.standard_normal((*batch, length, config.source_width)), jnp.float32)
    ragged = np.arange(length) < rng.integers(0, length + 1, (*batch, 1))
    mask = jnp.asarray(rng.random((*batch, length)) < 0.6 if anywhere else ragged)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size("target"), (2, *batch, 1)), jnp.int32)
    return Batch(source, mask, *tokens, jnp.asarray(rng.random((*batch, 1)) < 0.8))


def optimizer() -> optax.GradientTransformation:
    """With all that sums over the whole tree."""
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=1e-2))


def logits(
    package: Any, config: TransformerConfig, weights: dict[str, Array], batch: Batch, key=None,
    *, model_class: str = "Transformer",
) -> Array:  # fmt: skip
    """Of the encoder-decoder, or of the classifier; with a key in training mode."""
    model = package.from_weights(config, weights, model_class=getattr(package, model_class))
    inputs, masks = (batch.source,), {"source_mask": batch.source_mask}
    if model_class == "Transformer":
        inputs, masks = (*inputs, batch.inputs), masks | {"target_mask": batch.target_mask}
    if key is None:
        return package.evaluation(model)(*inputs, **masks)
    return model(*inputs, **masks, **{"rngs" if package is nnx_impl else "key": key})


def same_bits(a: Any, b: Any) -> bool:
    """Of all leaves."""
    first, second = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(first) == len(second)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(first, second, strict=True))
