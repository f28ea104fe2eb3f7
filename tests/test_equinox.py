"""What an Equinox expert relies on."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import equinox_impl
from equinox_impl import LayerNorm, Linear, Transformer, evaluation
from tests.frontends import CONFIG, LEARNED_DISTANCES, MODULES, random_batch, same_bits

BATCH = random_batch(CONFIG, 0)


def model() -> Transformer:
    return Transformer(CONFIG, key=jax.random.key(0))


@eqx.filter_jit
def logits(model, key=None):
    return model(BATCH.source, BATCH.inputs, source_mask=BATCH.source_mask, target_mask=BATCH.target_mask, key=key)


def test_modules_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        model().encoder = None


def test_inference_mode_switches_dropout_off_and_training_needs_a_key():
    made = model()
    quiet = logits(eqx.nn.inference_mode(made))
    assert same_bits(quiet, logits(eqx.nn.inference_mode(made), jax.random.key(1)))
    assert not same_bits(quiet, logits(made, jax.random.key(1)))
    with pytest.raises(ValueError, match=r"dropout at rate 0\.5 in training mode needs a key"):
        logits(made)


def test_no_array_is_stored_twice():
    eqx.tree_check(model())
    tied = CONFIG.replace(source_vocab_size=13, tie_embeddings="all")
    eqx.tree_check(Transformer(tied, key=jax.random.key(0)))


def test_every_array_is_a_parameter():
    arrays = eqx.filter(model(), eqx.is_array)
    assert same_bits(arrays, eqx.filter(model(), eqx.is_inexact_array))


every_distance = pytest.mark.parametrize("config", LEARNED_DISTANCES.values(), ids=LEARNED_DISTANCES)
ONE_OF_THEM = {
    "shaw": lambda m: m.encoder.blocks[0].attention.relative.value_embedding,
    "t5": lambda m: m.decoder.relative.embedding,
    "transformer_xl": lambda m: m.decoder.blocks[0].attention.relative.content_bias,
}


@every_distance
def test_relative_positions_are_leaves_like_any_other(config, tmp_path):
    made, where = Transformer(config, key=jax.random.key(0)), ONE_OF_THEM[config.positions]
    eqx.tree_check(made)
    assert same_bits(eqx.filter(made, eqx.is_array), eqx.filter(made, eqx.is_inexact_array))
    names = [name for name in equinox_impl.to_weights(made) if ".relative." in name]
    assert len(names) == 2 * {"shaw": 2, "t5": 1, "transformer_xl": 3}[config.positions]
    expected = logits(evaluation(made))
    changed = eqx.tree_at(
        where, made, replace_fn=lambda table: table + jnp.arange(float(table.size)).reshape(table.shape)
    )
    assert not same_bits(logits(evaluation(changed)), expected)
    params, static = eqx.partition(evaluation(made), eqx.is_inexact_array)
    assert same_bits(logits(eqx.combine(params, static)), expected)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", made)
    skeleton = eqx.filter_eval_shape(lambda: Transformer(config, key=jax.random.key(9)))
    assert same_bits(eqx.tree_deserialise_leaves(tmp_path / "model.eqx", skeleton), made)
    assert same_bits(logits(evaluation(equinox_impl.from_weights(config, equinox_impl.to_weights(made)))), expected)


def test_relative_positions_alone_can_be_trained():
    config = LEARNED_DISTANCES["transformer_xl"]
    made, where = evaluation(Transformer(config, key=jax.random.key(0))), ONE_OF_THEM[config.positions]
    trained, frozen = eqx.partition(made, eqx.tree_at(where, jax.tree.map(lambda _: False, made), True))

    @eqx.filter_jit
    def gradient(trained):
        run = lambda trained: eqx.combine(trained, frozen)(BATCH.source, BATCH.inputs)
        return eqx.filter_grad(lambda trained: jnp.square(run(trained)).sum())(trained)

    moved = eqx.combine(eqx.apply_updates(trained, gradient(trained)), frozen)
    assert not same_bits(where(moved), where(made))
    assert same_bits(eqx.tree_at(where, moved, 0), eqx.tree_at(where, made, 0))


def test_filter_jit_traces_once_and_keeps_the_numbers():
    made = evaluation(model())
    jitted = eqx.filter_jit(eqx.debug.assert_max_traces(logits, max_traces=1))
    assert same_bits(jitted(made), jitted(made))
    np.testing.assert_allclose(jitted(made), logits(made), rtol=1e-5, atol=1e-6)


def test_partition_and_combine_lose_nothing():
    made = evaluation(model())
    params, static = eqx.partition(made, eqx.is_inexact_array)
    assert same_bits(logits(eqx.combine(params, static)), logits(made))


def test_tree_at_changes_one_leaf_of_a_copy():
    made = evaluation(model())
    doubled = eqx.tree_at(lambda m: m.target_embedding.embedding, made, replace_fn=lambda table: 2 * table)
    assert same_bits(doubled.target_embedding.embedding, 2 * made.target_embedding.embedding)
    assert not same_bits(logits(doubled), logits(made))


def test_a_framework_layer_can_take_the_place_of_ours():
    made = evaluation(model())
    ours = made.encoder.blocks[0].feed_forward.up_proj
    theirs = eqx.nn.Linear(CONFIG.d_model, CONFIG.d_ff, key=jax.random.key(1))
    theirs = eqx.tree_at(lambda layer: (layer.weight, layer.bias), theirs, (ours.kernel.T, ours.bias))

    class PerVector(eqx.Module):
        """eqx.nn.Linear takes one vector: map it over the axes before."""

        layer: eqx.nn.Linear

        def __call__(self, x):
            return jax.vmap(jax.vmap(self.layer))(x)

    mixed = eqx.tree_at(lambda m: m.encoder.blocks[0].feed_forward.up_proj, made, PerVector(theirs))
    np.testing.assert_allclose(logits(mixed), logits(made), rtol=1e-5, atol=1e-6)


def test_a_frozen_subtree_does_not_move():
    with jax.numpy_dtype_promotion("standard"):
        made, tx = evaluation(model()), optax.adamw(1e-2)
        wanted = eqx.tree_at(
            lambda m: m.decoder, jax.tree.map(lambda _: False, made), jax.tree.map(eqx.is_inexact_array, made.decoder)
        )
        trained, frozen = eqx.partition(made, wanted)
        loss = lambda trained: equinox_impl.loss_fn(eqx.combine(trained, frozen), BATCH)[0]
        grads = eqx.filter_jit(eqx.filter_grad(loss))(trained)
        updates, _ = tx.update(grads, tx.init(trained), trained)
        moved = eqx.combine(eqx.apply_updates(trained, updates), frozen)
    assert same_bits(moved.encoder, made.encoder)
    assert not same_bits(moved.decoder, made.decoder)


def test_a_train_step_learns_and_leaves_the_batch_alone():
    with jax.numpy_dtype_promotion("standard"):
        made, tx = model(), optax.adamw(1e-2)
        opt_state = tx.init(eqx.filter(made, eqx.is_inexact_array))
        losses = []
        for step in range(20):
            key = jax.random.fold_in(jax.random.key(0), step)
            made, opt_state, metrics = equinox_impl.train_step(made, opt_state, BATCH, key, tx=tx)
            losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    assert not any(array.is_deleted() for array in jax.tree.leaves(BATCH))


def test_per_example_calls_under_vmap_take_a_key_each():
    made = model()
    keys = jax.random.split(jax.random.key(3), 2)
    one = eqx.filter_jit(lambda source, target, key: made(source, target, key=key))
    outputs = jax.vmap(one)(BATCH.source, BATCH.inputs, keys)
    for i in range(2):
        np.testing.assert_allclose(outputs[i], one(BATCH.source[i], BATCH.inputs[i], keys[i]), rtol=1e-5, atol=1e-5)


def test_an_ensemble_is_made_and_called_by_filter_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = evaluation(eqx.filter_vmap(lambda key: Transformer(CONFIG, key=key))(keys))
    outputs = eqx.filter_vmap(logits, in_axes=(eqx.if_array(0),))(ensemble)
    assert outputs.shape == (3, 2, 4, 13)
    np.testing.assert_allclose(outputs[1], logits(evaluation(Transformer(CONFIG, key=keys[1]))), rtol=1e-4, atol=1e-5)


def test_an_ensemble_has_its_own_relative_positions():
    config, keys = LEARNED_DISTANCES["t5"], jax.random.split(jax.random.key(0), 2)
    ensemble = evaluation(eqx.filter_vmap(lambda key: Transformer(config, key=key))(keys))
    assert ensemble.encoder.relative.embedding.shape == (2, 4, 2)
    outputs = eqx.filter_jit(eqx.filter_vmap(logits, in_axes=(eqx.if_array(0),)))(ensemble)
    one = logits(evaluation(Transformer(config, key=keys[1])))
    np.testing.assert_allclose(outputs[1], one, rtol=1e-4, atol=1e-5)


def test_serialised_leaves_come_back(tmp_path):
    made = model()
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", made)
    skeleton = eqx.filter_eval_shape(lambda: Transformer(CONFIG, key=jax.random.key(9)))
    assert same_bits(eqx.tree_deserialise_leaves(tmp_path / "model.eqx", skeleton), made)


def test_layers_stand_in_a_row_whatever_they_are():
    row = eqx.nn.Sequential(
        [
            Linear(4, 8, key=jax.random.key(0)),
            LayerNorm(8),
            equinox_impl.Dropout(0.5),
            equinox_impl.FeedForward(CONFIG, key=jax.random.key(1)),
        ]
    )
    x = jax.random.normal(jax.random.key(2), (3, 4))
    assert row(x, key=jax.random.key(3)).shape == (3, 8)


def test_abstract_models_cost_no_memory():
    abstract = eqx.filter_eval_shape(lambda: Transformer(CONFIG, key=jax.random.key(0)))
    assert isinstance(abstract.target_embedding.embedding, jax.ShapeDtypeStruct)
    assert abstract.target_embedding.embedding.dtype == jnp.float32


def test_the_loss_is_differentiated_as_it_is():
    made, key = model(), jax.random.key(3)
    gradients = eqx.filter_value_and_grad(equinox_impl.loss_fn, has_aux=True)
    (loss, metrics), grads = eqx.filter_jit(gradients)(made, BATCH, key)
    assert loss == metrics.loss
    assert jax.tree.leaves(grads)
    (smoothed, _), _ = gradients(made, BATCH, key=key, label_smoothing=0.5)
    np.testing.assert_allclose(smoothed, equinox_impl.loss_fn(made, BATCH, key, label_smoothing=0.5)[0], rtol=1e-6)
    assert smoothed != loss


def test_a_model_shows_its_configuration_once():
    made = model()
    assert repr(made).count("TransformerConfig(") == 1
    assert repr(made).count("MultiHeadAttention(") == repr(made).count("sinks=") == 3  # all else is there
    assert eqx.tree_pformat(made).count("TransformerConfig(") == 1
    assert jax.tree.structure(made) == jax.tree.structure(model())


def test_an_ensemble_is_called_by_vmap_and_says_so(untyped):
    members = eqx.filter_vmap(lambda key: Transformer(CONFIG, key=key))(jax.random.split(jax.random.key(0), 3))
    message = r"^embedding must be \[V, D\], got \(3, 11, 8\) in source_embedding\.embedding; .*eqx\.filter_vmap"
    with pytest.raises(ValueError, match=message):
        evaluation(members)(BATCH.source, BATCH.inputs)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad, lambda f: jax.grad(jax.checkpoint(f))])
def test_a_parameter_of_another_shape_is_named_by_its_place(transform, untyped):
    made = evaluation(model())
    made = eqx.tree_at(lambda m: m.decoder.blocks[0].cross_attention.q_proj.kernel, made, jnp.ones((7, 8)))
    run = lambda scale: scale * made(BATCH.source, BATCH.inputs).sum()
    message = r"as wide as kernel \(7, 8\) in decoder\.blocks\.0\.cross_attention\.q_proj, got \(2, 4, 8\)"
    with pytest.raises(ValueError, match=message):
        transform(run)(1.0)


def test_a_model_computes_in_the_dtype_of_its_configuration_however_it_is_cast():
    made = evaluation(model())
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, made)
    with jax.numpy_dtype_promotion("standard"):
        assert cast.encode(BATCH.source).dtype == jnp.float32
        narrow = equinox_impl.from_weights(CONFIG.replace(dtype=jnp.bfloat16), equinox_impl.to_weights(made))
        assert evaluation(narrow).encode(BATCH.source).dtype == jnp.bfloat16


def test_profiles_name_each_module():
    made = evaluation(model())
    text = jax.jit(lambda source: made(source, BATCH.inputs)).lower(BATCH.source).as_text(debug_info=True)
    for place in MODULES:
        assert f"/{place}/" in text, place
