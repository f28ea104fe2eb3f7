"""What an NNX expert relies on, in graph mode and in tree mode."""

import contextlib
import io
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nnx_impl
from nnx_impl import Transformer, evaluation
from tests.conftest import ROOT
from tests.frontends import CONFIG, LEARNED_DISTANCES, MODULES, random_batch, same_bits

BATCH = random_batch(CONFIG, 0)


@pytest.fixture(params=[True, False], ids=["graph mode", "tree mode"])
def _mode(request):
    with nnx.set_graph_mode(request.param), nnx.set_graph_updates(request.param):
        yield


pytestmark = pytest.mark.usefixtures("_mode")


def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@nnx.jit
def logits(model, rngs=None):
    return model(BATCH.source, BATCH.inputs, source_mask=BATCH.source_mask, target_mask=BATCH.target_mask, rngs=rngs)


def test_a_model_holds_parameters_and_nothing_else():
    kinds = {type(variable) for _, variable in nnx.to_flat_state(nnx.state(model()))}
    assert kinds == {nnx.Param}


@pytest.mark.parametrize("config", LEARNED_DISTANCES.values(), ids=LEARNED_DISTANCES)
def test_relative_positions_are_parameters_found_by_type_and_by_path(config):
    made = Transformer(config, rngs=nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(made))
    assert {type(variable) for _, variable in state} == {nnx.Param}
    found = {path for path, _ in nnx.to_flat_state(nnx.state(made, nnx.PathContains("relative")))}
    assert found == {path for path, _ in state if "relative" in path}
    per_stack = {"shaw": 2, "t5": 1, "transformer_xl": 3}[config.positions]
    assert len(found) == 2 * per_stack  # in the encoder and in the decoder, but not in the attention between them
    assert sum("sinks" in path for path, _ in state) == 3
    assert sum({"q_norm", "k_norm"} & set(path) != set() for path, _ in state) == 3 * 2 * 2


@pytest.mark.parametrize("config", LEARNED_DISTANCES.values(), ids=LEARNED_DISTANCES)
def test_views_splits_and_weights_keep_relative_positions(config):
    made = Transformer(config, rngs=nnx.Rngs(0))
    expected = logits(evaluation(made))
    weights = nnx_impl.to_weights(made)
    assert same_bits(logits(evaluation(nnx_impl.from_weights(config, weights))), expected)
    assert same_bits(logits(nnx.merge(*nnx.split(evaluation(made)))), expected)
    table = next(p for path, p in nnx.to_flat_state(nnx.state(made)) if "relative" in path and "encoder" in path)
    table[...] = table[...] + 1 if config.positions == "transformer_xl" else -9 * table[...]
    view = evaluation(made)
    assert not same_bits(logits(view), expected)  # what is changed in the model is seen by its view


def test_relative_positions_alone_can_be_trained():
    made = evaluation(Transformer(LEARNED_DISTANCES["transformer_xl"], rngs=nnx.Rngs(0)))
    before = jax.tree.map(jnp.copy, nnx_impl.to_weights(made))
    graphdef, trained, rest = nnx.split(made, nnx.All(nnx.Param, nnx.PathContains("relative")), ...)

    @jax.jit
    def gradient(trained):
        run = lambda trained: nnx.merge(graphdef, trained, rest)(BATCH.source, BATCH.inputs)
        return jax.grad(lambda trained: jnp.square(run(trained)).sum())(trained)

    nnx.update(made, jax.tree.map(jnp.add, trained, gradient(trained)))
    after = nnx_impl.to_weights(made)
    moved = {name for name, array in after.items() if not same_bits(array, before[name])}
    assert moved == {name for name in after if ".relative." in name}


def test_a_view_shares_parameters_and_switches_dropout_only_for_itself():
    made = model()
    view = nnx.view(made, deterministic=True)
    assert same_bits(logits(view), logits(view))
    view.target_embedding.embedding[...] = 2 * view.target_embedding.embedding[...]
    assert same_bits(made.target_embedding.embedding[...], view.target_embedding.embedding[...])
    with pytest.raises(ValueError, match=r"dropout at rate 0\.5 in training mode needs a key"):
        logits(made)


def test_train_and_eval_switch_the_whole_model():
    made = model()
    made.eval()
    quiet = logits(made)
    made.train()
    assert not same_bits(quiet, logits(made, nnx.Rngs(dropout=0)))


def test_a_call_takes_rngs_a_stream_or_a_key():
    made = model()
    key = jax.random.fold_in(jax.random.key(5), 0)
    expected = logits(made, key)
    assert same_bits(logits(made, nnx.Rngs(dropout=5)), expected)
    assert same_bits(logits(made, nnx.Rngs(5)), expected)
    assert same_bits(logits(made, nnx.Rngs(dropout=5).dropout), expected)


def test_evaluation_changes_no_state_and_training_only_the_stream():
    made, rngs = model(), nnx.Rngs(dropout=5)
    before = jax.tree.map(jnp.copy, nnx_impl.to_weights(made))
    logits(evaluation(made), rngs)
    assert int(rngs.dropout.count[...]) == 0
    logits(made, rngs)
    assert same_bits(before, nnx_impl.to_weights(made))
    assert int(rngs.dropout.count[...]) == 1


def test_split_merge_and_plain_jit_give_the_same_numbers():
    made = evaluation(model())
    graphdef, state = nnx.split(made)
    expected = logits(made)
    assert same_bits(jax.jit(lambda state: logits(nnx.merge(graphdef, state)))(state), expected)
    assert same_bits(jax.jit(logits)(made), expected)


def test_a_train_step_is_traced_once_and_updates_in_place():
    with jax.numpy_dtype_promotion("standard"):
        chex.clear_trace_counter()
        made, rngs = model(), nnx.Rngs(dropout=0)
        optimizer = nnx.Optimizer(made, optax.adamw(1e-2), wrt=nnx.Param)
        step = nnx.jit(chex.assert_max_traces(nnx_impl.update, n=1))
        first = step(made, optimizer, BATCH, rngs)
        for _ in range(20):
            last = step(made, optimizer, BATCH, rngs)
    assert float(last.loss) < float(first.loss)
    assert int(optimizer.step[...]) == 21
    assert int(rngs.dropout.count[...]) == 21


def test_only_the_parameters_asked_for_are_trained():
    with jax.numpy_dtype_promotion("standard"):
        made = evaluation(model())
        before = jax.tree.map(jnp.copy, nnx_impl.to_weights(made))
        wrt = nnx.All(nnx.Param, nnx.PathContains("decoder"))
        optimizer = nnx.Optimizer(made, optax.adamw(1e-2), wrt=wrt)
        graphdef, trained, rest = nnx.split(made, wrt, ...)
        loss = lambda trained: nnx_impl.loss_fn(nnx.merge(graphdef, trained, rest), BATCH)[0]
        grads = jax.jit(jax.grad(loss))(trained)
        optimizer.update(made, grads)
    moved = {name for name, array in nnx_impl.to_weights(made).items() if not same_bits(array, before[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)


def test_a_framework_layer_can_take_the_place_of_ours():
    made = evaluation(model())
    ours = made.encoder.blocks[0].feed_forward.up_proj
    theirs = nnx.Linear(CONFIG.d_model, CONFIG.d_ff, rngs=nnx.Rngs(1))
    theirs.kernel[...] = ours.kernel[...]
    expected = logits(made)
    made.encoder.blocks[0].feed_forward.up_proj = theirs
    np.testing.assert_allclose(logits(made), expected, rtol=1e-5, atol=1e-6)


def test_parameters_carry_the_names_of_their_axes():
    specs = {
        ".".join(map(str, path)): p.get_value()
        for path, p in nnx.to_flat_state(nnx.get_partition_spec(nnx.state(model())))
    }
    assert specs["encoder.blocks.0.attention.q_proj.kernel"] == jax.sharding.PartitionSpec("embed", "heads")
    assert specs["decoder.blocks.0.feed_forward.down_proj.kernel"] == jax.sharding.PartitionSpec("mlp", "embed")
    assert specs["decoder.blocks.0.attention_norm.scale"] == jax.sharding.PartitionSpec("embed")
    assert specs["target_embedding.embedding"] == jax.sharding.PartitionSpec("vocab", "embed")


def test_parameters_of_a_classifier_carry_the_names_of_their_axes():
    state = nnx.state(nnx_impl.Classifier(CONFIG, rngs=nnx.Rngs(0)))
    specs = {path[-2:]: tuple(p.get_value()) for path, p in nnx.to_flat_state(nnx.get_partition_spec(state))}
    assert specs["source_proj", "kernel"] == ("in", "embed")
    assert specs["source_proj", "bias"] == ("embed",)
    assert specs["output_proj", "kernel"] == ("embed", "vocab")


def test_new_parameters_carry_the_names_of_their_axes():
    specs = {}
    for config in LEARNED_DISTANCES.values():
        state = nnx.state(Transformer(config, rngs=nnx.Rngs(0)))
        for path, p in nnx.to_flat_state(nnx.get_partition_spec(state)):
            specs[".".join(map(str, path))] = tuple(p.get_value())
    wanted = {
        "encoder.relative.embedding": ("position", "heads"),
        "encoder.blocks.0.attention.relative.key_embedding": ("position", "head"),
        "encoder.blocks.0.attention.relative.value_embedding": ("position", "head"),
        "decoder.blocks.0.attention.relative.content_bias": ("heads", "head"),
        "decoder.blocks.0.attention.relative.position_bias": ("heads", "head"),
        "decoder.blocks.0.attention.relative.kernel": ("embed", "heads"),
        "decoder.blocks.0.cross_attention.sinks": ("heads",),
        "decoder.blocks.0.cross_attention.q_norm.scale": ("head",),
        "decoder.blocks.0.attention.k_norm.bias": ("head",),
        "decoder.blocks.0.cross_attention_out_norm.scale": ("embed",),
        "decoder.norm.scale": ("embed",),
    }
    assert {name: specs[name] for name in wanted} == wanted


def test_a_model_is_born_sharded_over_eight_devices():
    code = """
import jax
from flax import nnx
from nnx_impl import Transformer, TransformerConfig
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
config = TransformerConfig(source_vocab_size=8, target_vocab_size=8, d_model=16, num_heads=4, d_ff=32,
                           num_encoder_layers=1, num_decoder_layers=1)
@nnx.jit
def born():
    model = Transformer(config, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model
rules = (("embed", None), ("heads", "model"), ("mlp", "model"), ("vocab", "model"))
with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
    model = born()
kernel = model.encoder.blocks[0].attention.q_proj.kernel[...]
assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 4)}, kernel.sharding
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_loss_is_differentiated_as_it_is():
    made, key = model(), jax.random.key(3)
    gradients = nnx.value_and_grad(nnx_impl.loss_fn, has_aux=True)
    (loss, metrics), grads = nnx.jit(gradients)(made, BATCH, key)
    assert loss == metrics.loss
    assert jax.tree.leaves(grads)
    (smoothed, _), _ = gradients(made, BATCH, rngs=key, label_smoothing=0.5)
    np.testing.assert_allclose(smoothed, nnx_impl.loss_fn(made, BATCH, key, label_smoothing=0.5)[0], rtol=1e-6)
    assert smoothed != loss


def test_a_model_shows_its_configuration_once():
    made = model()
    assert repr(made).count("TransformerConfig(") == 1
    assert repr(made).count("MultiHeadAttention(") == repr(made).count("sinks=") == 3  # all else is there
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        nnx.display(made)
    assert "cross_attention" in shown.getvalue()


def test_an_ensemble_is_called_by_vmap_and_says_so(untyped):
    members = nnx.vmap(lambda rngs: Transformer(CONFIG, rngs=rngs))(nnx.Rngs(0).split(3))
    message = r"^embedding must be \[V, D\], got \(3, 11, 8\) in source_embedding\.embedding; .*nnx\.vmap"
    with pytest.raises(ValueError, match=message):
        evaluation(members)(BATCH.source, BATCH.inputs)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad, lambda f: jax.grad(jax.checkpoint(f))])
def test_a_parameter_of_another_shape_is_named_by_its_place(transform, untyped):
    made = evaluation(model())
    made.decoder.blocks[0].cross_attention.q_proj.kernel = nnx.Param(jnp.ones((7, 8)))
    run = lambda scale: scale * made(BATCH.source, BATCH.inputs).sum()
    message = r"as wide as kernel \(7, 8\) in decoder\.blocks\.0\.cross_attention\.q_proj, got \(2, 4, 8\)"
    with pytest.raises(ValueError, match=message):
        transform(run)(1.0)


def test_a_model_computes_in_the_dtype_of_its_configuration_however_it_is_cast():
    made = evaluation(model())
    cast = nnx.merge(nnx.graphdef(made), jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(made)))
    with jax.numpy_dtype_promotion("standard"):
        assert cast.encode(BATCH.source).dtype == jnp.float32
        narrow = nnx_impl.from_weights(CONFIG.replace(dtype=jnp.bfloat16), nnx_impl.to_weights(made))
        assert evaluation(narrow).encode(BATCH.source).dtype == jnp.bfloat16


def test_profiles_name_each_module():
    text = jax.jit(lambda model: evaluation(model)(BATCH.source, BATCH.inputs)).lower(model()).as_text(debug_info=True)
    for place in MODULES:
        assert f"/{place}/" in text, place
