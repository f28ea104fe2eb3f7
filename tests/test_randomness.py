"""Dropout masks differ between sites, layers, heads, examples and steps, and agree between the frontends."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import core.layers
import equinox_impl
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


DEEP = CONFIG.replace(stochastic_depth_rate=0.5, embedding_dropout_rate=0.25)


@pytest.mark.parametrize("name", FRONTENDS)
@pytest.mark.parametrize("config", [CONFIG, DEEP], ids=["elements", "examples too"])
def test_every_mask_is_drawn_from_a_key_of_its_own(name, config, monkeypatch):
    keys, draw = [], jax.random.bernoulli
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, *a: keys.append(key) or draw(key, *a))

    @jax.jit  # which leaves out all but the keys
    def used(weights, batch):
        logits(FRONTENDS[name], config, weights, batch, key=jax.random.key(0))
        return [jax.random.key_data(key) for key in keys]

    drawn = {tuple(key.tolist()) for key in used(random_weights(config, 0), random_batch(config, 0))}
    branches = 2 * 2 + 2 * 3  # a block's sublayers; each draws for elements, and for whole examples
    sites = 1 + 1 + 2 * 1 + 2 * 2 + branches * (1 + (config is DEEP))  # two embeddings, the attentions' weights
    assert len(keys) == sites
    assert len(drawn) == sites


@pytest.mark.parametrize("name", FRONTENDS)
def test_the_rates_reach_the_sites_that_they_are_for(name):
    package = FRONTENDS[name]
    config = DEEP.replace(num_encoder_layers=4, dropout_rate=0.1, attention_dropout_rate=0.2)
    model = package.from_weights(config, random_weights(config, 0))
    for stack, rates in ((model.encoder, [0.125, 0.25, 0.375, 0.5]), (model.decoder, [0.25, 0.5])):
        assert (stack.dropout.rate, stack.dropout.depth_rate) == (0.25, 0.0)
        assert [block.dropout.depth_rate for block in stack.blocks] == rates
        assert {block.dropout.rate for block in stack.blocks} == {0.1}
        assert {(block.attention.dropout.rate, block.attention.dropout.depth_rate) for block in stack.blocks} == {
            (0.2, 0)
        }


@pytest.mark.parametrize("name", FRONTENDS)
@pytest.mark.parametrize("config", [CONFIG, DEEP.replace(dropout_rate=0.0, embedding_dropout_rate=0.0,
                                                         attention_dropout_rate=0.0)],
                         ids=["elements", "examples alone"])  # fmt: skip
def test_a_step_drops_differently_than_the_one_before(name, config):
    config = config.replace(num_encoder_layers=0, num_decoder_layers=1)
    package, batch = FRONTENDS[name], random_batch(config, 0, batch=(8,))
    with jax.numpy_dtype_promotion("standard"):
        trainer = package.Trainer(package.from_weights(config, random_weights(config, 0)), optax.sgd(0.0), seed=1)
        first, second = trainer.train(batch), trainer.train(batch)
    assert float(first.loss) != float(second.loss)


@pytest.mark.parametrize("name", FRONTENDS)
def test_what_is_left_of_a_dropped_example_is_its_residual(name):
    """With all branches of all layers dropped a pre-norm model is its embeddings, position and last norm."""
    config = DEEP.replace(dropout_rate=0.0, embedding_dropout_rate=0.0, attention_dropout_rate=0.0, norm_order="pre")
    config = config.replace(stochastic_depth_rate=0.999, num_encoder_layers=1, num_decoder_layers=1)
    package, weights = FRONTENDS[name], random_weights(config, 0)
    batch = random_batch(config, 0, batch=(8,))
    bare = config.replace(num_encoder_layers=0, num_decoder_layers=0)
    kept = {key: value for key, value in weights.items() if "blocks" not in key}
    run = functools.partial(jax.jit, static_argnums=(0, 1))(logits)
    dropped = run(package, config, weights, batch, key=jax.random.key(0))
    np.testing.assert_allclose(dropped, run(package, bare, kept, batch), atol=1e-5)


def test_examples_and_heads_drop_differently():
    weights = jnp.ones((4, 3, 16, 16))
    kept = np.asarray(core.layers.dropout(weights, 0.5, key=jax.random.key(0))) > 0
    flat = kept.reshape(12, -1)
    assert len({row.tobytes() for row in flat}) == 12


def test_no_key_is_used_twice():
    config = DEEP.replace(num_encoder_layers=1, num_decoder_layers=1)
    with jax.debug_key_reuse(True):
        model = equinox_impl.Transformer(config, key=jax.random.key(0))
        batch = random_batch(config, 0)
        eqx.filter_jit(model)(batch.source, batch.inputs, key=jax.random.key(1))
