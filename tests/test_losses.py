"""Laws of the loss: tokens of weight 0 count for nothing, and no label is clamped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from core.losses import Batch, accuracy, cross_entropy, sequence_metrics, token_cross_entropy, weighted_mean
from core.vocabulary import projected_metrics
from tests.strategies import seeds

V = 7
leading = st.sampled_from([(2, 3), (), (2, 1, 3), (0, 3)])
smoothings = st.sampled_from([0.0, 0.3])
by_token = jax.jit(token_cross_entropy, static_argnames="label_smoothing")
jitted = jax.jit(cross_entropy, static_argnames="label_smoothing")


def problem(batch, seed, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((*batch, V)).astype("float32")
    return logits, rng.integers(0, V, batch).astype("int32"), (rng.random(batch) < 0.6).astype("float32")


def exact_losses(logits, labels, smoothing):
    """The cross entropy of the smoothed target, token by token."""
    losses = np.zeros(labels.shape)
    for cell in np.ndindex(labels.shape):
        row = logits[cell].astype("float64")
        target = (1 - smoothing) * (np.arange(V) == labels[cell]) + smoothing / V
        losses[cell] = -(target * (row - np.log(np.exp(row).sum()))).sum()
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@given(batch=leading, seed=seeds)
def test_cross_entropy_is_that_of_the_smoothed_target(batch, seed, smoothing):
    logits, labels, weights = problem(batch, seed)
    wanted = exact_losses(logits, labels, smoothing)
    got = by_token(logits, labels, label_smoothing=smoothing)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    mean = jitted(logits, labels, weights=2 * weights, label_smoothing=smoothing)
    np.testing.assert_allclose(mean, (weights * wanted).sum() / max(weights.sum(), 1), rtol=1e-5, atol=1e-5)
    plain = jitted(logits, labels, label_smoothing=smoothing)
    np.testing.assert_allclose(plain, wanted.mean() if wanted.size else 0, rtol=1e-5, atol=1e-5)


@given(leading, seeds, smoothings)
def test_what_stands_at_tokens_without_weight_does_not_matter(batch, seed, smoothing):
    """NaN logits, labels out of range: same loss, same gradient, 0 at those tokens."""
    logits, labels, weights = problem(batch, seed)
    rng, pad = np.random.default_rng(seed), weights == 0
    foul = np.where(pad, rng.choice([-1, -100, V, 2**31 - 1], batch), labels).astype("int32")
    value = lambda x, y: jitted(x, y, weights=weights, label_smoothing=smoothing)
    loss, gradient = value(logits, labels), jax.grad(value)(logits, labels)
    np.testing.assert_array_equal(value(logits, foul), loss)
    np.testing.assert_array_equal(jax.grad(value)(logits, foul), gradient)
    assert (np.asarray(gradient)[pad] == 0).all()
    broken = np.where(pad[..., None], np.float32(np.nan), logits)
    np.testing.assert_array_equal(value(broken, foul), loss)


def test_nan_logits_without_weight_have_no_gradient():
    logits, labels, weights = problem((2, 3), 0)
    weights[0, 0], logits[0, 0] = 0, np.nan
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.asarray(labels), weights=jnp.asarray(weights)))(logits)
    assert (np.asarray(gradient)[0, 0] == 0).all()


@given(leading, seeds)
def test_a_batch_without_weight_has_loss_and_gradient_zero(batch, seed):
    logits, labels, _ = problem(batch, seed)
    loss, gradient = jax.value_and_grad(lambda x: jitted(x, labels, weights=np.zeros(batch, "float32")))(logits)
    assert loss == 0
    assert (np.asarray(gradient) == 0).all()
    assert weighted_mean(jnp.asarray(logits), jnp.zeros_like(logits)) == 0


@given(seeds, smoothings)
def test_chunks_weighted_by_their_tokens_make_the_whole(seed, smoothing):
    logits, labels, weights = problem((6, 3), seed)
    parts = [
        (float(jitted(logits[i], labels[i], weights=weights[i], label_smoothing=smoothing)), weights[i].sum())
        for i in (slice(0, 2), slice(2, 6))
    ]
    whole = jitted(logits, labels, weights=weights, label_smoothing=smoothing)
    total = max(weights.sum(), 1)
    np.testing.assert_allclose(whole, sum(loss * tokens for loss, tokens in parts) / total, rtol=1e-5, atol=1e-6)


@given(leading, seeds, st.sampled_from([1e4, 1e30]))
def test_huge_logits_give_finite_losses(batch, seed, scale):
    logits, labels, _ = problem(batch, seed, scale)
    losses = np.asarray(by_token(logits, labels))
    chosen = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, logits.max(-1) - chosen, rtol=1e-5, atol=1.0)


def test_a_token_that_cannot_come_costs_the_others_nothing():
    logits = jnp.asarray([[0.5, -jnp.inf, 1.5]])
    wanted = token_cross_entropy(logits[:, ::2], jnp.asarray([1]))
    np.testing.assert_allclose(token_cross_entropy(logits, jnp.asarray([2])), wanted, rtol=1e-6)
    assert token_cross_entropy(logits, jnp.asarray([1])) == jnp.inf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_sixteen_bit_logits_are_computed_in_float32(dtype):
    logits, labels, _ = problem((2, 3), 0)
    low = jnp.asarray(logits, dtype)
    got = token_cross_entropy(low, jnp.asarray(labels), label_smoothing=0.1)
    wanted = token_cross_entropy(low.astype(jnp.float32), jnp.asarray(labels), label_smoothing=0.1)
    np.testing.assert_array_equal(got, wanted, strict=True)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_labels_may_be_any_integers(dtype, untyped):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 4, 300)).astype("float32"), rng.integers(0, 128, (2, 4))
    wanted = cross_entropy(jnp.asarray(logits), jnp.asarray(labels, jnp.int32))
    np.testing.assert_array_equal(cross_entropy(jnp.asarray(logits), jnp.asarray(labels, dtype)), wanted)


def test_gradients_are_those_of_finite_differences(x64):
    logits, labels, weights = problem((2, 3), 0)
    loss = lambda x: cross_entropy(x, jnp.asarray(labels), weights=jnp.asarray(weights, "float64"), label_smoothing=0.2)
    check_grads(jax.jit(loss), (jnp.asarray(logits, "float64"),), order=2, modes=["rev"])


OUT_OF_RANGE = [-1, -100, V, 2**31 - 1]


@pytest.mark.parametrize("bad", OUT_OF_RANGE)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_label_out_of_range_raises(bad, weighted):
    logits, labels, _ = problem((2, 3), 0)
    labels[1, 2] = bad
    weights = jnp.full((2, 3), 0.5) if weighted else None
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {V}\), got values from .*"):
        cross_entropy(jnp.asarray(logits), jnp.asarray(labels), weights=weights)


@pytest.mark.parametrize("bad", OUT_OF_RANGE)
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_label_out_of_range_gives_nan_under_jit(bad, smoothing):
    logits, labels, _ = problem((2, 3), 0)
    labels[1, 2] = bad
    losses = np.array(jax.jit(lambda *x: token_cross_entropy(*x, label_smoothing=smoothing))(logits, labels))
    assert np.isnan(losses[1, 2])
    losses[1, 2] = 0
    assert np.isfinite(losses).all()
    for weights in (None, np.ones((2, 3), "float32")):
        assert np.isnan(jitted(logits, labels, weights=weights, label_smoothing=smoothing))


@given(leading, seeds)
def test_accuracy_is_the_weighted_share_of_hits(batch, seed):
    logits, labels, weights = problem(batch, seed)
    hits = logits.argmax(-1) == labels
    got = accuracy(jnp.asarray(logits), jnp.asarray(labels), weights=jnp.asarray(weights))
    np.testing.assert_allclose(got, (hits * weights).sum() / max(weights.sum(), 1), rtol=1e-6)
    plain = accuracy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(plain, hits.mean() if hits.size else 0, rtol=1e-6)


@pytest.mark.parametrize(("label", "hit"), [(1, 1.0), (2, 0.0), (-1, 0.0), (4, 0.0)])
def test_ties_go_to_the_lowest_id(label, hit):
    assert accuracy(jnp.asarray([[0.0, 5.0, 5.0, 1.0]]), jnp.asarray([label])) == hit


@given(seeds, smoothings)
def test_sequence_metrics_count_the_tokens_of_the_mask(seed, smoothing):
    logits, labels, weights = problem((4, 3), seed)
    tokens, mask = jnp.zeros((4, 3), jnp.int32), jnp.asarray(weights > 0)
    batch = Batch(tokens, mask, tokens, jnp.asarray(labels), mask)
    metrics = sequence_metrics(jnp.asarray(logits), batch, label_smoothing=smoothing)
    wanted = jitted(logits, labels, weights=weights, label_smoothing=smoothing)
    np.testing.assert_allclose(metrics.loss, wanted, rtol=1e-6)
    assert metrics.accuracy == accuracy(jnp.asarray(logits), jnp.asarray(labels), weights=jnp.asarray(weights))
    assert metrics.tokens == weights.sum()
    if not smoothing:
        np.testing.assert_array_equal(sequence_metrics(jnp.asarray(logits), batch).loss, metrics.loss)


@pytest.mark.parametrize("smoothing", [1.0, -0.1, float("nan")])
def test_a_smoothing_outside_its_range_is_refused(smoothing, untyped):
    with pytest.raises(ValueError, match=f"label_smoothing must be at least 0 and below 1, got {smoothing}"):
        cross_entropy(jnp.zeros((2, V)), jnp.zeros(2, jnp.int32), label_smoothing=smoothing)


@pytest.mark.parametrize("function", [token_cross_entropy, cross_entropy, accuracy])
@pytest.mark.parametrize("shape", [(1,), (2, 1), ()])
def test_labels_of_another_shape_are_refused(function, shape, untyped):
    """They would be broadcast without a word."""
    with pytest.raises(ValueError, match=r"labels must have the shape of the logits .* \(2,\), got \("):
        function(jnp.zeros((2, V)), jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("shape", [(1,), (2, 1)])
def test_labels_of_another_shape_than_their_weights_are_refused_by_name(shape, untyped):
    with pytest.raises(ValueError, match=r"labels must have the shape of the logits .* \(2,\), got \("):
        cross_entropy(jnp.zeros((2, V)), jnp.zeros(shape, jnp.int32), weights=jnp.ones(2))


WEIGHTED = {
    "cross_entropy": lambda weights: cross_entropy(jnp.zeros((2, V)), jnp.zeros(2, jnp.int32), weights=weights),
    "accuracy": lambda weights: accuracy(jnp.zeros((2, V)), jnp.zeros(2, jnp.int32), weights=weights),
    "weighted_mean": lambda weights: weighted_mean(jnp.zeros(2, weights.dtype), weights),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("shape", [(1,), (2, 1), ()])
def test_weights_of_another_shape_are_refused_traced_or_not(name, shape, untyped):
    for function in (WEIGHTED[name], jax.jit(WEIGHTED[name])):
        with pytest.raises(ValueError, match=r"weights must be one for each value, of shape \(2,\), got \("):
            function(jnp.ones(shape))


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_below_zero_or_without_end_are_refused_where_they_are_known(name, dtype, bad, untyped):
    weights = jnp.asarray([1.0, bad], dtype)
    with pytest.raises(ValueError, match="weights must be at least 0 and finite, got values from "):
        WEIGHTED[name](weights)
    jax.jit(WEIGHTED[name])(weights)


@pytest.mark.parametrize("function", [cross_entropy, accuracy])
def test_weights_may_have_another_type_than_the_logits(function):
    logits, labels, weights = map(jnp.asarray, problem((2, 3), 0))
    low = function(logits, labels, weights=weights.astype(jnp.bfloat16))
    np.testing.assert_array_equal(low, function(logits, labels, weights=weights), strict=True)


def test_a_vocabulary_of_one_costs_nothing():
    given = jnp.ones((2, 1)), jnp.asarray([0, 5])
    assert cross_entropy(*given, weights=jnp.asarray([1.0, 0.0])) == 0


@pytest.mark.parametrize("loss", [token_cross_entropy, cross_entropy, accuracy])
def test_float_labels_are_refused(loss, untyped):
    with pytest.raises(TypeError, match="labels must be integers, got float32"):
        loss(jnp.zeros((2, V)), jnp.zeros(2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_mask": jnp.full((2, 3), 2)}, TypeError, "target_mask must be bool, .*got int32"),
        ({"target_mask": jnp.full((2, 3), 0.5)}, TypeError, "target_mask must be bool, .*got float32"),
        ({"target_mask": jnp.ones((2, 1), bool)}, ValueError, r"target_mask must have .*\(2, 3\), got \(2, 1\)"),
        ({"labels": jnp.zeros((2, 1), jnp.int32)}, ValueError, r"labels must have .*\(2, 3\), got \(2, 1\)"),
        ({"labels": jnp.zeros((2, 3))}, TypeError, "labels must be integers, got float32"),
    ],
)
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_a_batch_that_does_not_fit_is_refused_in_chunks_or_whole(changes, error, message, chunk, untyped):
    """An integer mask of 2s would weigh in one and select in the other."""
    tokens, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    batch = Batch(tokens, mask, tokens, tokens, mask)._replace(**changes)
    measure = sequence_metrics
    if chunk is not None:
        measure = lambda x, batch: projected_metrics(x, lambda x: x, batch, chunk=chunk)
    with pytest.raises(error, match=message):
        measure(jnp.zeros((2, 3, V)), batch)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_labels_of_any_integer_type_are_compared_where_numbers_are_wide(dtype, x64):
    logits = jnp.asarray([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], jnp.float64)
    assert float(accuracy(logits, jnp.asarray([1, 2], dtype))) == 0.5
