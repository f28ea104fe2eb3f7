"""The loss over a vocabulary from the vectors before its projection, without ever holding all logits.

The logits of some positions are made, and their gradient while they are there, before those of the next: memory for
the positions at hand instead of for all of them (Wijmans et al. 2024 do so in one kernel).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from core.layers import check_tokens, wide_dtype, zero_padding
from core.losses import Batch, Metrics, check_batch, likeliest, sequence_metrics, token_cross_entropy

_HELD = 2**21  # logits that are held at once: docs/performance.md has the measurement


def projected_metrics(
    x: Float[Array, "*B T D"],
    project: Callable[[Float[Array, "*B C D"]], Float[Array, "*B C V"]],
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Metrics:
    """`core.losses.sequence_metrics(project(x), batch)`, `chunk` positions of each row at a time.

    Unless given, chunk is what proved fast: all positions at once where their logits are small. In chunks the
    gradient is made in the forward pass, also that by the arrays in `project`; forward mode needs all at once.
    """
    check_batch(batch, x.shape[:-1])
    head = lambda x: project(x)  # a method of a module is not hashable
    *_, positions, vocab = jax.eval_shape(head, x).shape
    if chunk is None:
        chunk = max(1, _HELD // max(1, x[..., 0, 0].size * vocab))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, got {chunk}; leave it out for a size that is fast")
    if chunk >= positions:
        return sequence_metrics(project(x), batch, label_smoothing=label_smoothing)
    check_tokens(jnp.where(batch.target_mask, batch.labels, 0), vocab, "labels")
    number, axis = -(-positions // chunk), x.ndim - 2
    parts = [_chunked(array, axis, number) for array in (x, batch.labels, batch.target_mask)]
    pure, learned = jax.closure_convert(head, parts[0][0])
    loss, hits = _sums((pure, label_smoothing), learned, *parts)
    tokens = batch.target_mask.sum().astype(loss.dtype)
    some = jnp.where(tokens == 0, 1.0, tokens)
    return Metrics(loss / some, hits / some.astype(hits.dtype), tokens)


def _chunked(x: Shaped[Array, "..."], axis: int, number: int) -> Shaped[Array, "..."]:
    """`number` chunks of equal length along an axis, on an axis of their own that comes first; the rest is 0."""
    length = -(-x.shape[axis] // number)
    padded = jnp.pad(x, [(0, number * length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(padded.reshape(*x.shape[:axis], number, length, *x.shape[axis + 1 :]), axis, 0)


Sums = tuple[Float[Array, ""], Float[Array, ""]]  # of the losses and of the hits of the tokens in the mask
Static = tuple[Callable[..., Array], float]  # the projection, and how labels are smoothed


def _chunk_sums(static: Static, learned: list[Array], x: Array, labels: Array, mask: Array) -> Sums:
    project, smoothing = static
    logits, labels = project(zero_padding(x, mask), *learned), jnp.where(mask, labels, 0)
    losses = token_cross_entropy(logits, labels, label_smoothing=smoothing)
    hits = mask & (likeliest(logits) == labels)
    return jnp.where(mask, losses, 0.0).sum(), hits.sum().astype(jnp.float32)


def _all_sums(
    static: Static,
    learned: list[Array],
    x: Float[Array, "N *B C D"],
    labels: Integer[Array, "N *B C"],
    mask: Bool[Array, "N *B C"],
) -> Sums:
    return jax.tree.map(jnp.sum, jax.lax.map(lambda part: _chunk_sums(static, learned, *part), (x, labels, mask)))


def _forward(static: Static, learned: list[Array], x: Array, labels: Array, mask: Array) -> tuple[Sums, tuple]:
    def add(by_learned, part):
        own = functools.partial(_chunk_sums, static)
        sums, (more, by_x) = jax.value_and_grad(own, argnums=(0, 1), has_aux=True)(learned, *part)
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), by_learned, more), (sums, by_x)

    nothing = [jnp.zeros(array.shape, wide_dtype(array)) for array in learned]
    by_learned, (sums, by_x) = jax.lax.scan(add, nothing, (x, labels, mask))
    by_learned = [total.astype(array.dtype) for total, array in zip(by_learned, learned, strict=True)]
    return jax.tree.map(jnp.sum, sums), (by_learned, by_x)


def _backward(_: Static, saved: tuple, cotangents: Sums) -> tuple[list[Array], Array, None, None]:
    by_learned, by_x = jax.tree.map(lambda gradient: gradient * cotangents[0].astype(gradient.dtype), saved)
    return by_learned, by_x, None, None


_sums = jax.custom_vjp(_all_sums, nondiff_argnums=(0,))
_sums.defvjp(_forward, _backward)
