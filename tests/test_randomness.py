"""Dropout masks differ between sites, layers, heads, examples and steps, and agree between the frontends."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import core.layers
import equinox_impl
import nnx_impl
from core.config import TransformerConfig
from tests.frontends import FRONTENDS, logits, random_batch, random_weights

CONFIG = TransformerConfig(
    source_vocab_size=11,
    target_vocab_size=13,
    d_model=16,
    num_heads=2,
    d_ff=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.5,
    attention_dropout_rate=0.5,
)


@pytest.mark.parametrize("name", FRONTENDS)
def test_every_site_draws_from_a_key_of_its_own(name, monkeypatch):
    keys = []
    for module in (nnx_impl.layers, equinox_impl.layers):
        monkeypatch.setattr(module, "dropout_key", recording(module.dropout_key, keys))
    logits(FRONTENDS[name], CONFIG, random_weights(CONFIG, 0), random_batch(CONFIG, 0), key=jax.random.key(0))
    drawn = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    sites = 1 + 2 * 3 + 1 + 2 * 5  # embeddings; attention, two sublayers; two attentions, three sublayers
    assert len(keys) == sites
    assert len(drawn) == sites


def recording(original, keys):
    def record(key, **options):
        keys.append(key)
        return original(key, **options)

    return record


@pytest.mark.parametrize("name", FRONTENDS)
def test_a_step_drops_differently_than_the_one_before(name):
    package, batch = FRONTENDS[name], random_batch(CONFIG, 0)
    with jax.numpy_dtype_promotion("standard"):
        trainer = package.Trainer(package.from_weights(CONFIG, random_weights(CONFIG, 0)), optax.sgd(0.0), seed=1)
        first, second = trainer.train(batch), trainer.train(batch)
    assert float(first.loss) != float(second.loss)


def test_examples_and_heads_drop_differently():
    weights = jnp.ones((4, 3, 16, 16))
    kept = np.asarray(core.layers.dropout(weights, 0.5, key=jax.random.key(0))) > 0
    flat = kept.reshape(12, -1)
    assert len({row.tobytes() for row in flat}) == 12


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        model = equinox_impl.Transformer(CONFIG, key=jax.random.key(0))
        batch = random_batch(CONFIG, 0)
        eqx.filter_jit(model)(batch.source, batch.inputs, key=jax.random.key(1))
