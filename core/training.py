"""What a training step does, whatever the framework: gradients summed over micro-batches, weighted by their tokens."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from core.losses import Batch, Metrics

Grads = TypeVar("Grads", bound=PyTree)


def accumulated(
    gradients: Callable[[Batch, PRNGKeyArray | None], tuple[Grads, Metrics]], batches: Batch, key: PRNGKeyArray | None
) -> tuple[Grads, Metrics]:
    """Gradients and metrics of all micro-batches, the leading axis of `batches`, as if they were one batch.

    `gradients(batch, key)` are those of the mean over a batch's tokens, so each counts by its share of all tokens: a
    mean of the means would be another one. Micro-batch i drops by fold_in(key, i). Needs the memory of one at a time.
    """
    counts = batches.target_mask.sum(axis=tuple(range(1, batches.target_mask.ndim)))
    total = counts.sum()
    shares = counts / jnp.maximum(total, 1)

    def add(sums, micro):
        batch, share, i = micro
        found = gradients(batch, None if key is None else jax.random.fold_in(key, i))
        return jax.tree.map(lambda s, x: s + x * share.astype(x.dtype), sums, found), None

    first = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], batches), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    (grads, metrics), _ = jax.lax.scan(add, zeros, (batches, shares, jnp.arange(len(counts))))
    return grads, metrics._replace(tokens=total.astype(metrics.tokens.dtype))
