"""What is held flat is the model still, and a step's host work does not grow with the number of its arrays."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import nnx_impl
from core.identity import program_text
from tests.frontends import CONFIG, FRONTENDS, random_batch, random_weights, same_bits

every_frontend = pytest.mark.parametrize("package", FRONTENDS.values(), ids=FRONTENDS)
BATCH = random_batch(CONFIG, 0)


def forward(model, source, inputs):
    return model(source, inputs)


def python_calls(function, *args):
    """How many calls of Python functions it makes."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return count


@every_frontend
def test_a_compiled_call_gives_the_bits_of_the_call_jitted(package):
    model = package.evaluation(package.from_weights(CONFIG, random_weights(CONFIG, 0)))
    run = package.compiled(forward, model)
    assert same_bits(run(BATCH.source, BATCH.inputs), jax.jit(partial(forward, model))(BATCH.source, BATCH.inputs))


@every_frontend
def test_a_compiled_call_is_traced_once_and_leaves_its_model_alone(package):
    model, traced = package.evaluation(package.from_weights(CONFIG, random_weights(CONFIG, 0))), []
    run = package.compiled(lambda model, *args: traced.append(1) or forward(model, *args), model)
    for _ in range(3):
        run(BATCH.source, BATCH.inputs)
    assert len(traced) == 1
    assert same_bits(package.to_weights(model), random_weights(CONFIG, 0))


@every_frontend
def test_a_compiled_decode_step_gives_away_its_cache_alone(package):
    model = package.evaluation(package.from_weights(CONFIG, random_weights(CONFIG, 0)))
    tokens, cache = model.start(BATCH.source, max_length=4)
    wanted = model.decode_step(tokens[..., None], cache)[0]
    step = package.compiled(lambda model, tokens, cache: model.decode_step(tokens, cache), model, donate=(1,))
    logits, grown = step(tokens[..., None], cache)
    assert jnp.allclose(logits, wanted, rtol=1e-5, atol=1e-6)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.attention))
    assert not tokens.is_deleted()
    step(tokens[..., None], grown)


@every_frontend
def test_the_host_work_of_compiled_calls_does_not_grow_with_the_number_of_arrays(package):
    found = []
    for layers in (1, 3):
        config = CONFIG.replace(num_encoder_layers=layers, num_decoder_layers=layers)
        model = package.evaluation(package.from_weights(config, random_weights(config, 0)))
        run = package.compiled(forward, model)
        run(BATCH.source, BATCH.inputs)
        found.append(python_calls(run, BATCH.source, BATCH.inputs))
    assert found[0] == found[1] <= 3


@every_frontend
def test_the_host_work_of_a_step_does_not_grow_with_the_number_of_arrays(package):
    found = []
    with jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
        for layers in (0, 2):
            config = CONFIG.replace(num_encoder_layers=0, num_decoder_layers=layers)
            trainer = package.Trainer(package.from_weights(config, random_weights(config, 0)), optax.adamw(1e-3))
            for _ in range(2):
                trainer.train(BATCH)
            found.append(python_calls(trainer.train, BATCH))
    assert found[0] == found[1]


@every_frontend
def test_a_trainer_gives_the_model_as_it_is_now_at_any_time(package):
    ends = []
    for look in (False, True):
        trainer = package.Trainer(package.from_weights(CONFIG, random_weights(CONFIG, 0)), optax.sgd(0.5), seed=3)
        for _ in range(3):
            before = jax.tree.map(jnp.copy, package.to_weights(trainer.model)) if look else None
            trainer.train(BATCH)
            assert not look or not same_bits(before, package.to_weights(trainer.model))
        ends.append(package.to_weights(trainer.model))
    assert same_bits(*ends)


def test_an_nnx_trainer_sees_what_is_changed_in_its_model():
    weights = random_weights(CONFIG, 0)
    changed = nnx_impl.Trainer(nnx_impl.from_weights(CONFIG, weights), optax.sgd(0.5), seed=3)
    changed.train(BATCH)
    table, now = changed.model.target_embedding.embedding, nnx_impl.to_weights(changed.model)
    doubled = nnx_impl.from_weights(CONFIG, now | {"target_embedding.embedding": 2 * table[...]})
    table[...] = 2 * table[...]
    wanted = nnx_impl.Trainer(doubled, optax.sgd(0.5), seed=3)
    wanted.resume({}, step=1)
    assert same_bits(changed.train(BATCH), wanted.train(BATCH))
    assert int(changed.rngs.dropout.count[...]) == 2
    assert isinstance(changed.optimizer, nnx.Optimizer)


def test_arrays_outside_of_variables_are_refused():
    from nnx_impl.dispatch import Held

    with pytest.raises(ValueError, match="must keep its arrays in Variables"):
        Held(nnx_impl.from_weights(CONFIG, random_weights(CONFIG, 0)), jnp.ones(3))


def test_compiled_calls_of_both_frontends_are_the_same_program():
    texts = []
    for package in FRONTENDS.values():
        model = package.evaluation(package.from_weights(CONFIG, random_weights(CONFIG, 0)))
        run = package.compiled(forward, model)
        texts.append(program_text(run.func, *run.args, BATCH.source, BATCH.inputs))
    assert texts[0] == texts[1]
