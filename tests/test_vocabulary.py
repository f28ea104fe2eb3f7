"""Laws of the loss in chunks: it is the loss of all logits, for any projection, without holding them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import core.vocabulary
from core.losses import Batch, sequence_metrics
from core.vocabulary import projected_metrics
from tests.frontends import CONFIG, FRONTENDS, random_batch, random_weights, same_bits
from tests.strategies import seeds

D, V = 4, 9
# shape, chunk and smoothing: chunks that divide the length and that do not
cases = st.sampled_from([((2,), 7, 2, 0.3), ((), 5, 4, 0.0), ((2, 1), 6, 3, 0.3), ((0,), 3, 1, 0.0), ((3,), 2, 1, 0.0)])


def problem(shape, seed, dtype="float32"):
    """Vectors, a table and a bias, and a batch; of labels only the mask's are real."""
    (batch, length), rng = shape, np.random.default_rng(seed)
    x, table, bias = (rng.standard_normal(size).astype(dtype) for size in ((*batch, length, D), (V, D), (V,)))
    mask = rng.random((*batch, length)) < 0.6
    labels = np.where(mask, rng.integers(0, V, mask.shape), rng.choice([-1, V, 2**31 - 1], mask.shape))
    return (x, table, bias), Batch(labels, mask, labels, labels.astype("int32"), mask)


def project(x, table, bias):
    return x @ table.T + bias.reshape((1,) * (x.ndim - 1) + (V,))


@functools.partial(jax.jit, static_argnames=("chunk", "smoothing"))
def with_gradients(arrays, batch, *, chunk, smoothing):
    """Of all logits at once where there is no chunk."""

    def loss(x, table, bias):
        head = lambda x: project(x, table, bias)
        if chunk is None:
            metrics = sequence_metrics(head(x), batch, label_smoothing=smoothing)
        else:
            metrics = projected_metrics(x, head, batch, label_smoothing=smoothing, chunk=chunk)
        return 3 * metrics.loss, metrics

    (_, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return metrics, gradients


@given(cases, seeds)
def test_in_chunks_metrics_and_gradients_are_those_of_all_logits(case, seed):
    *shape, chunk, smoothing = case
    with jax.enable_x64(True):
        arrays, batch = problem(shape, seed, "float64")
        got = with_gradients(arrays, batch, chunk=chunk, smoothing=smoothing)
        wanted = with_gradients(arrays, batch, chunk=None, smoothing=smoothing)
        for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * max(1.0, np.abs(b).max(initial=0)))


@given(st.sampled_from(["bfloat16", "float16"]), seeds)
def test_in_16_bits_the_gradient_by_the_table_is_summed_in_32(dtype, seed):
    """So it differs from that of all at once by the rounding of each chunk's share and of the whole."""
    arrays, batch = problem(((2,), 7), seed)
    low = [jnp.asarray(array, dtype) for array in arrays]
    got, (by_x, *by_learned) = with_gradients(low, batch, chunk=2, smoothing=0.3)
    wanted, (_, *wanted_by_learned) = with_gradients(low, batch, chunk=None, smoothing=0.3)
    assert got.loss.dtype == wanted.loss.dtype
    assert by_x.dtype == low[0].dtype
    unit = float(jnp.finfo(dtype).eps)
    for a, b in zip(by_learned, wanted_by_learned, strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, float(np.abs(np.asarray(b, "float32")).max()))
        np.testing.assert_allclose(np.asarray(a, "float32"), np.asarray(b, "float32"), rtol=0, atol=8 * unit * scale)


def test_without_a_gradient_the_metrics_are_the_same():
    arrays, batch = problem(((2,), 7), 0)
    x, batch = jax.tree.map(jnp.asarray, (arrays[0], batch))
    got = projected_metrics(x, lambda x: project(x, *arrays[1:]), batch, label_smoothing=0.3, chunk=2)
    wanted = with_gradients(arrays, batch, chunk=2, smoothing=0.3)[0]
    np.testing.assert_allclose(np.stack(got), np.stack(wanted), rtol=1e-6)


@given(seeds)
def test_vectors_without_a_label_may_be_anything(seed):
    """And have no gradient; without any label at all the loss is 0."""
    (arrays, batch), chunk = problem(((2,), 7), seed), 2
    foul = np.where(batch.target_mask[..., None], arrays[0], np.nan).astype("float32")
    got = with_gradients((foul, *arrays[1:]), batch, chunk=chunk, smoothing=0.3)
    wanted = with_gradients(arrays, batch, chunk=chunk, smoothing=0.3)
    for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(got[1][0])[~batch.target_mask] == 0).all()
    none = batch._replace(target_mask=np.zeros_like(batch.target_mask))
    assert all(
        (np.asarray(x) == 0).all() for x in jax.tree.leaves(with_gradients(arrays, none, chunk=chunk, smoothing=0))
    )


def test_memory_is_that_of_a_chunk():
    """Of 4096 positions and 1000 tokens all logits take 16 MB."""
    rng = np.random.default_rng(0)
    x, table = (rng.standard_normal(size).astype("float32") for size in ((1, 4096, D), (1000, D)))
    labels = rng.integers(0, 1000, (1, 4096)).astype("int32")
    batch = jax.tree.map(jnp.asarray, Batch(labels, labels >= 0, labels, labels, labels >= 0))

    def bytes_of(chunk):
        loss = lambda x, table: projected_metrics(x, lambda x: x @ table.T, batch, chunk=chunk).loss
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, table).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(4096) > 2**24
    assert bytes_of(64) < 2**21


def projected_at_once(rows, length, vocab, **how):
    """Of how many positions of a row logits are made, the first time and from then on."""
    labels, lengths = jnp.zeros((rows, length), jnp.int32), []

    def head(x):
        lengths.append(x.shape[-2])
        return x.repeat(vocab, axis=-1)

    batch = Batch(labels, labels == 0, labels, labels, labels == 0)
    jax.eval_shape(lambda x: projected_metrics(x, head, batch, **how), jnp.zeros((rows, length, 1)))
    assert lengths[0] == length  # for the shape alone
    return set(lengths[1:])


def test_large_logits_are_made_in_chunks_unless_told_otherwise(monkeypatch):
    """Two million are held at once, one more is not; then as many positions as fill that, but of each row one."""
    assert projected_at_once(2, 1024, 1024) == {1024}
    assert projected_at_once(2, 1025, 1024) == {513}
    assert projected_at_once(2, 4096, 2048) == {512}
    assert projected_at_once(2, 1025, 1024, chunk=2000) == {1025}
    monkeypatch.setattr(core.vocabulary, "_HELD", 1)
    assert projected_at_once(2, 6, 3) == {1}


def test_a_chunk_of_all_positions_is_all_logits_at_once(untyped):
    """Then forward mode works; a batch without rows has none to be held."""
    arrays, batch = problem(((2,), 7), 0)
    head, how = lambda x: project(x, *arrays[1:]), {"label_smoothing": 0.3}
    loss = lambda x: projected_metrics(x, head, batch, chunk=7, **how).loss
    got = jax.jvp(loss, arrays[:1], arrays[:1])
    wanted = jax.jvp(lambda x: sequence_metrics(head(x), batch, **how).loss, arrays[:1], arrays[:1])
    assert same_bits(got, wanted)
    one = batch._replace(labels=jnp.zeros((2, 7), jnp.int32))
    assert projected_metrics(arrays[0], lambda x: x[..., :1], one, chunk=2).loss == 0  # of the only token there is
    (x, *_), nothing = problem(((0,), 3), 0)
    assert projected_metrics(x, head, nothing).tokens == 0


@pytest.mark.parametrize("kind", ["Transformer", "EncoderOnlyTransformer", "DecoderOnlyTransformer"])
@pytest.mark.parametrize("tie", ["none", "target"])
def test_models_give_the_vectors_that_their_logits_read(kind, tie):
    config = CONFIG.replace(tie_embeddings=tie)
    weights, batch = random_weights(config, 0, model_class=kind), random_batch(config, 0)
    sides = {"E": [batch.source], "D": [batch.inputs], "T": [batch.source, batch.inputs]}[kind[0]]
    for package in FRONTENDS.values():

        @jax.jit
        def both(weights, package=package):
            model = package.evaluation(package.from_weights(config, weights, model_class=getattr(package, kind)))
            return model.logits(model.run(*sides, project=False)[0]), model(*sides)

        assert same_bits(*both(weights))


def test_what_is_wrong_is_said_in_chunks_too(untyped):
    arrays, batch = problem(((2,), 7), 0)
    of = functools.partial(projected_metrics, arrays[0], lambda x: project(x, *arrays[1:]))
    with pytest.raises(ValueError, match=r"chunk must be at least 1 position, got 0"):
        of(batch, chunk=0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\)"):
        of(batch._replace(labels=jnp.full((2, 7), V), target_mask=np.ones((2, 7), bool)), chunk=2)
    with pytest.raises(ValueError, match="labels must have the shape"):
        of(batch._replace(labels=batch.labels[:, :3]), chunk=2)
    with pytest.raises(ValueError, match="target_mask must have one entry for each position"):
        of(batch._replace(target_mask=batch.target_mask[:, :3]), chunk=2)
    with pytest.raises(ValueError, match="label_smoothing must be"):
        of(batch, label_smoothing=1.0, chunk=2)
