"""Token-weighted, label-smoothed cross entropy, and accuracy. Tokens of weight 0 count for nothing."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from core.layers import check_integers, check_real, check_tokens, known_values, wide_dtype


class Batch(NamedTuple):
    """Teacher forcing: `inputs` begins with BOS, `labels` is the same shifted left and ends with EOS.

    A classifier's source is vectors, and its T is 1: one label an example.
    """

    source: Integer[Array, "*B S"] | Float[Array, "*B S P"]
    source_mask: Bool[Array, "*B S"]
    inputs: Integer[Array, "*B T"]
    labels: Integer[Array, "*B T"]
    target_mask: Bool[Array, "*B T"]  # True where there is a label to predict


class Metrics(NamedTuple):
    """Means over the tokens of a batch, and how many those were."""

    loss: Float[Array, ""]  # nats a token, smoothed like the training loss
    accuracy: Float[Array, ""]
    tokens: Float[Array, ""]


def weighted_mean(values: Float[Array, "*B"], weights: Float[Array, "*B"]) -> Float[Array, ""]:
    """Sum of weight times value over the sum of the weights; 0 if there is no weight.

    ValueError for weights of another shape, and where they are known for any below 0 or without end.
    """
    check_weights(weights, values.shape)
    total = weights.sum()
    counted = jnp.where(weights == 0, 0.0, values)  # 0 * NaN would be NaN
    return (counted * weights).sum() / jnp.where(total == 0, 1.0, total)


def token_cross_entropy(
    logits: Float[Array, "*B V"], labels: Integer[Array, "*B"], *, label_smoothing: float = 0.0
) -> Float[Array, "*B"]:
    """-sum_v target_v log softmax(logits)_v in nats, target = (1 - s) one_hot(label) + s / V.

    A label outside [0, V) gives NaN.
    """
    check_smoothing(label_smoothing)
    check_labels(labels, logits.shape[:-1])
    vocab, labels = logits.shape[-1], labels.astype(jnp.int32)
    logits = logits.astype(wide_dtype(logits))
    known = (labels >= 0) & (labels < vocab)
    index = jnp.where(known, labels, 0)[..., None]
    chosen = jnp.where(known, jnp.take_along_axis(logits, index, axis=-1)[..., 0], jnp.nan)
    expected = (1 - label_smoothing) * chosen
    if label_smoothing:
        expected = expected + label_smoothing * logits.mean(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - expected


def cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Integer[Array, "*B"],
    *,
    weights: Float[Array, "*B"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """The mean of `token_cross_entropy` over the tokens with weight; 0 if there are none.

    A label out of range raises where it is known and has weight. Logits without weight may be NaN.
    """
    check_labels(labels, logits.shape[:-1])
    if weights is not None:
        check_weights(weights, logits.shape[:-1])
        unused = weights == 0
        logits, labels = jnp.where(unused[..., None], 0.0, logits), jnp.where(unused, 0, labels)
    check_tokens(labels, logits.shape[-1], "labels")
    losses = token_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return weighted_mean(losses, jnp.ones_like(losses) if weights is None else weights.astype(losses.dtype))


def accuracy(
    logits: Float[Array, "*B V"], labels: Integer[Array, "*B"], *, weights: Float[Array, "*B"] | None = None
) -> Float[Array, ""]:
    """The fraction of tokens whose label has the highest logit, ties to the lowest id."""
    check_labels(labels, logits.shape[:-1])
    hits = (likeliest(logits) == labels.astype(jnp.int32)).astype(jnp.float32)
    return weighted_mean(hits, jnp.ones_like(hits) if weights is None else weights.astype(hits.dtype))


def likeliest(logits: Float[Array, "*B V"]) -> Integer[Array, "*B"]:
    """The id of the highest logit, the lowest of several; V where there is a NaN.

    Not by argmax, which XLA computes number by number on CPUs.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    highest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(highest, ids, logits.shape[-1]).min(axis=-1)


def check_smoothing(label_smoothing: float) -> None:
    """ValueError unless it is a share below 1."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")


def check_labels(labels: Array, shape: tuple[int, ...]) -> None:
    """TypeError unless they are integers, ValueError unless there is one for each row of logits."""
    check_integers("labels", labels)
    if labels.shape != shape:
        raise ValueError(
            f"labels must have the shape of the logits without the vocabulary, {shape}, got {labels.shape}"
        )


def check_weights(weights: Array, shape: tuple[int, ...]) -> None:
    """ValueError unless there is one for each value, at least 0 and finite where they are known."""
    if weights.shape != shape:
        raise ValueError(f"weights must be one for each value, of shape {shape}, got {weights.shape}")
    if (known := known_values(weights)) is None or not known.size:
        return
    numbers = known.astype(np.float64)  # of bfloat16 NumPy warns at NaN
    low, high = numbers.min(), numbers.max()
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"weights must be at least 0 and finite, got values from {low} to {high}")


def check_batch(batch: Batch, shape: tuple[int, ...]) -> None:
    """TypeError or ValueError unless its labels and target mask are for vectors or logits `[*B, T]` of that shape."""
    check_labels(batch.labels, shape)
    check_real("target_mask", batch.target_mask, shape)


def sequence_metrics(logits: Float[Array, "*B T V"], batch: Batch, *, label_smoothing: float = 0.0) -> Metrics:
    """Loss and accuracy of predicting a batch's labels; the loss is what training minimises."""
    check_batch(batch, logits.shape[:-1])
    weights = batch.target_mask.astype(wide_dtype(logits))
    loss = cross_entropy(logits, batch.labels, weights=weights, label_smoothing=label_smoothing)
    return Metrics(loss, accuracy(logits, batch.labels, weights=weights), weights.sum())
