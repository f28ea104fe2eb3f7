"""Whole models under JAX's own checks: no NaN or infinity comes out, no tracer leaks, no random key is used twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.constraints import Constraints
from core.sampling import Sampling
from tests.frontends import FRONTENDS, LEARNED_DISTANCES, random_batch, random_weights

CONFIG = LEARNED_DISTANCES["t5"].replace(
    attention_sinks=False,
    attention_dropout_rate=0.25,
    attention_soft_cap=5.0,
    attention_window=(3, 1),
    num_kv_heads=1,
    activation="swiglu",
)
CHECKS = {
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "leaks": jax.checking_leaks,
    "keys": lambda: jax.debug_key_reuse(True),
}
every_check = pytest.mark.parametrize("check", CHECKS)
every_frontend = pytest.mark.parametrize("name", FRONTENDS)


@functools.partial(jax.jit, static_argnums=0)
def trained(package, weights, batch, key):
    """The loss in training mode and its gradient."""

    def loss(weights):
        return package.loss_fn(package.from_weights(CONFIG, weights), batch, key, label_smoothing=0.1)[0]

    return jax.value_and_grad(loss)(weights)


def decoded(package, weights, batch, key):
    """Drawn tokens, and their scores."""
    model, randomness = package.from_weights(CONFIG, weights), "rngs" if package.__name__ == "nnx_impl" else "key"
    rules = {"max_length": 4, "source_mask": batch.source_mask, "constraints": Constraints(no_repeat_ngram=2)}
    said = package.generate(model, batch.source, **rules, sampling=Sampling(0.7, 5, 0.9, 0.01), **{randomness: key})
    return said, package.score(model, batch.source, batch.labels, source_mask=batch.source_mask)


def padded_batch():
    """Of three rows one has no source and one no target."""
    batch = random_batch(CONFIG, 0, batch=(3,))
    source, target = (jnp.arange(3)[:, None] != row for row in (1, 2))
    return batch._replace(source_mask=batch.source_mask & source, target_mask=(batch.target_mask | True) & target)


@every_check
@every_frontend
@pytest.mark.parametrize("program", [trained, decoded], ids=["training", "decoding"])
def test_models_are_clean_under_jaxs_own_checks(program, name, check):
    """With all kinds of dropout, dead rows and rows of padding alone."""
    given = random_weights(CONFIG, 0), padded_batch(), jax.random.key(1)
    with CHECKS[check]():
        if check == "leaks":  # are found by tracing, which must not have been done before
            jax.jit(lambda *given: program(FRONTENDS[name], *given)).lower(*given)
            return
        results = program(FRONTENDS[name], *given)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(results))


@every_frontend
def test_a_batch_of_padding_alone_has_loss_and_gradient_zero(name):
    batch = padded_batch()
    nothing = batch._replace(source_mask=batch.source_mask & False, target_mask=batch.target_mask & False)
    loss, gradient = trained(FRONTENDS[name], random_weights(CONFIG, 0), nothing, jax.random.key(1))
    assert loss == 0
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradient))
