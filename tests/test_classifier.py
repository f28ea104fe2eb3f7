"""Laws of the classifier of vectors, of both frontends: padding enters nothing, and a row of padding says nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.frontends import CONFIG, FRONTENDS, logits, optimizer, random_examples, random_weights, same_bits
from tests.strategies import configs, seeds

frontends = st.sampled_from(list(FRONTENDS.values()))
every_frontend = pytest.mark.parametrize("package", FRONTENDS.values(), ids=FRONTENDS)
batches = st.sampled_from([(2,), (), (2, 2)])
# an example compiles whole models: one that fails is not shrunk
few = settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
junk = st.sampled_from([[np.nan], [np.inf, -np.inf], [3e38, -3e38]])


def weights_of(config, seed=0):
    return random_weights(config, seed, model_class="Classifier")


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def outcome(package, config, weights, examples, drop=False):
    """Logits, the loss, and its gradient by the weights and by the source."""

    def loss(weights, source):
        model = package.from_weights(config, weights, model_class=package.Classifier)
        batch = examples._replace(source=source)
        return package.loss_fn(model if drop else package.evaluation(model), batch, jax.random.key(3) if drop else None)

    found = logits(package, config, weights, examples, jax.random.key(3) if drop else None, model_class="Classifier")
    return found, jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, examples.source)


@pytest.mark.parametrize("drop", [False, True], ids=["evaluation", "training"])
@given(
    package=frontends, config=configs(num_encoder_layers=1), batch=batches, seed=seeds, anywhere=st.booleans(),
    junk=junk,
)  # fmt: skip
@few
def test_what_stands_at_padding_changes_no_bit(drop, package, config, batch, seed, anywhere, junk):
    """Neither of the logits, nor of the loss, nor of a gradient."""
    weights, examples = weights_of(config, seed), random_examples(config, seed, batch=batch, anywhere=anywhere)
    examples = examples._replace(target_mask=jnp.ones_like(examples.target_mask))
    foul = jnp.where(examples.source_mask[..., None], examples.source, np.resize(junk, examples.source.shape))
    clean = outcome(package, config, weights, examples, drop)
    dirty = outcome(package, config, weights, examples._replace(source=foul.astype(jnp.float32)), drop)
    assert same_bits(clean, dirty), config
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty)), config
    (_, (_, (_, by_source))), real = dirty, np.asarray(examples.source_mask)
    assert (np.asarray(by_source)[~real] == 0).all(), config


@given(package=frontends, config=configs(num_encoder_layers=1), batch=batches, seed=seeds)
@few
def test_a_row_of_padding_has_logits_and_gradients_of_zero(package, config, batch, seed):
    examples = random_examples(config, seed, batch=batch)
    examples = examples._replace(
        source=jnp.full_like(examples.source, jnp.nan),
        source_mask=jnp.zeros_like(examples.source_mask),
        target_mask=jnp.ones_like(examples.target_mask),
    )
    found, ((loss, _), gradients) = outcome(package, config, weights_of(config, seed), examples)
    assert not np.any(found), config
    np.testing.assert_allclose(loss, np.log(config.target_vocab_size), rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients)), config


@given(
    package=frontends,
    config=configs(num_encoder_layers=1, positions="none", attention_window=None, dtype="float32"),
    seed=seeds,
)
@few
def test_without_positions_the_order_of_the_vectors_does_not_matter(package, config, seed):
    weights, examples = weights_of(config, seed), random_examples(config, seed, batch=(3,), anywhere=True)
    order = np.random.default_rng(seed).permutation(5)
    moved = examples._replace(source=examples.source[:, order], source_mask=examples.source_mask[:, order])
    run = jax.jit(functools.partial(logits, package, config, model_class="Classifier"))
    first, second = (run(weights, data) for data in (examples, moved))
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-4 * np.abs(first).max() + 1e-9)


@given(package=frontends, config=configs(num_encoder_layers=2), batch=batches, seed=seeds)
@few
def test_weights_of_each_attention_are_given_by_name_and_none_goes_to_padding(package, config, batch, seed):
    model = package.from_weights(config, weights_of(config, seed), model_class=package.Classifier)
    examples = random_examples(config, seed, batch=batch)
    run = lambda **how: package.evaluation(model).run(examples.source, source_mask=examples.source_mask, **how)
    (plain, nothing), (found, attention) = jax.jit(lambda: (run(), run(return_weights=True)))()
    assert nothing == {}
    np.testing.assert_allclose(plain, found, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
    assert list(attention) == [f"encoder.blocks.{i}.attention" for i in range(2)]
    for array in attention.values():
        assert array.shape == (*batch, config.num_heads, 5, 5)
        hidden = np.broadcast_to(~np.asarray(examples.source_mask)[..., None, None, :], array.shape)
        assert not np.any(np.asarray(array)[hidden])
        assert np.any(array) == np.any(examples.source_mask)


@every_frontend
@pytest.mark.parametrize("field", ["source_features", "target_vocab_size"])
def test_a_configuration_without_widths_or_classes_is_refused(package, field):
    with pytest.raises(ValueError, match=f"this model needs {field}, got None; give it in the configuration"):
        package.init_transformer(CONFIG.replace(**{field: None}), seed=0, model_class=package.Classifier)


REAL = jnp.ones((2, 5), bool)
BAD_CALLS = {
    "pixels": (jnp.zeros((2, 5, 3), jnp.uint8), REAL, TypeError, "source vectors must be floating, got uint8"),
    "other vectors": (jnp.zeros((2, 5, 4)), REAL, ValueError, r"source_features = 3, got \(2, 5, 4\); reshape"),
    "another mask": (jnp.zeros((2, 5, 3)), REAL[:, :1], ValueError, r"here \(2, 5\), got \(2, 1\)"),
    "a mask of features": (jnp.zeros((2, 5, 3)), jnp.ones((2, 5, 3), bool), ValueError, r"\(2, 5\), got \(2, 5, 3\)"),
    "a mask of numbers": (jnp.zeros((2, 5, 3)), REAL.astype(int), TypeError, "a padding mask must be bool.*got int32"),
}


@every_frontend
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_of_a_call_are_named_with_the_rule(package, case, layers, untyped):
    source, mask, error, message = BAD_CALLS[case]
    config = CONFIG.replace(num_encoder_layers=layers)
    model = package.from_weights(config, weights_of(config), model_class=package.Classifier)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: package.evaluation(model)(source, source_mask=mask))


@every_frontend
def test_training_needs_a_key_and_evaluation_none(package):
    model = package.from_weights(CONFIG, weights_of(CONFIG), model_class=package.Classifier)
    examples = random_examples(CONFIG, 0)
    with pytest.raises(ValueError, match=r"dropout at rate 0\.5 in training mode needs a key"):
        package.loss_fn(model, examples)
    assert np.isfinite(package.loss_fn(package.evaluation(model), examples)[0])


@every_frontend
def test_a_classifier_learns_which_vector_is_in_a_row(package):
    """Class c is the row whose vectors lie around the c-th of four directions; the rows are ragged."""
    config = CONFIG.replace(source_features=4, target_vocab_size=4, dropout_rate=0.1)
    model = package.init_transformer(config, seed=0, model_class=package.Classifier)
    rng = np.random.default_rng(0)

    def examples(number):
        labels = rng.integers(0, 4, (number, 1))
        source = np.eye(4)[labels] + 0.3 * rng.standard_normal((number, 6, 4))
        mask = np.arange(6) < rng.integers(1, 7, (number, 1))
        data = random_examples(config, 0, batch=(number,), length=6)
        made = {"source": jnp.asarray(source, jnp.float32), "source_mask": jnp.asarray(mask)}
        return data._replace(
            **made, labels=jnp.asarray(labels, jnp.int32), target_mask=jnp.asarray(rng.random((number, 1)) < 0.9)
        )

    with jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
        trainer = package.Trainer(model, optimizer())
        first = trainer.train(examples(32))
        assert 0 < float(first.tokens) <= 32
        for _ in range(150):
            trainer.train(examples(32))
        assert float(trainer.evaluate(examples(200)).accuracy) > 0.9
