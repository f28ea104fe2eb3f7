"""Cross-entropy over tokens with weights."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from conformance import oracle
from conformance.adapters import Loss
from conformance.cases import gaussian, seeds
from conformance.law import Violation, law, require, within


class Case(NamedTuple):
    """A batch of rows of different lengths; weights are 0 at padding."""

    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    label_smoothing: float


def cases(smoothing: tuple[float, ...] = (0.0,), partial: bool = False):
    """Batches; with `partial` weights between 0 and 1."""

    def build(shape, seed, label_smoothing):
        rows, length, vocab = shape
        rng = np.random.default_rng(seed)
        lengths = rng.permutation(np.linspace(1, length, rows).astype(int))
        weights = (np.arange(length) < lengths[:, None]).astype(np.float32)
        if partial:
            weights *= rng.random(weights.shape, "float32")
        labels = rng.integers(0, vocab, (rows, length), "int32")
        return Case(gaussian(shape, seed, scale=2.0), labels, weights, label_smoothing)

    shapes = st.sampled_from([(2, 2, 3), (3, 5, 4), (1, 4, 7)])
    return lambda loss: st.builds(build, shapes, seeds, st.sampled_from(smoothing))


def value(loss, case: Case) -> np.ndarray:
    return loss(*case[:3], label_smoothing=case.label_smoothing)


def formula(loss, case: Case) -> None:
    within(value(loss, case), oracle.cross_entropy(*case), 2e-6 * (4 + np.abs(case.logits).max()))


@law(Loss, cases=cases())
def the_loss_is_the_mean_over_the_tokens_with_weight(loss, case):
    """Not over all positions, and not a mean of the means of the rows."""
    formula(loss, case)


@law(Loss, cases=cases(partial=True))
def tokens_count_by_their_weight(loss, case):
    formula(loss, case)


@law(Loss, "smoothing", cases=cases((0.1, 0.5)))
def smoothing_moves_its_share_to_all_labels_of_counted_tokens(loss, case):
    formula(loss, case)


@law(Loss, cases=cases((0.0,)))
def what_stands_at_padding_does_not_matter(loss, case):
    padding = case.weights == 0
    logits = np.where(padding[..., None], gaussian(case.logits.shape, 3, scale=50.0), case.logits)
    labels = np.where(padding, (case.labels + 1) % case.logits.shape[-1], case.labels)
    within(value(loss, case._replace(logits=logits, labels=labels)), value(loss, case), 1e-6)


@law(Loss, cases=cases(), max_examples=5)
def a_batch_without_tokens_has_loss_zero(loss, case):
    within(value(loss, case._replace(weights=np.zeros_like(case.weights))), 0.0, 0.0)


@law(Loss, cases=cases())
def the_order_of_the_rows_does_not_matter(loss, case):
    moved = case._replace(logits=case.logits[::-1], labels=case.labels[::-1], weights=case.weights[::-1])
    within(value(loss, moved), value(loss, case), 1e-5)


@law(Loss, cases=cases(), max_examples=10)
def huge_logits_give_a_finite_loss(loss, case):
    case = case._replace(logits=1e4 * case.logits)
    within(value(loss, case), oracle.cross_entropy(*case), 1e-5 * np.abs(case.logits).max())


@law(Loss, cases=cases(), max_examples=5)
def a_label_out_of_range_raises_or_gives_nan(loss, case):
    """-1 must not wrap around to the last label, nor V be clamped to it."""
    for wrong in (-1, case.logits.shape[-1]):
        labels = case.labels.copy()
        labels[0, 0] = wrong
        try:
            out = value(loss, case._replace(labels=labels))
        except Exception:
            continue
        require(not np.isfinite(out), f"label {wrong} must be refused or give NaN, got {out}")


@law(Loss, "jax", cases=cases(), max_examples=5)
def gradients_are_finite_and_zero_at_padding(loss, case):
    for weights in (case.weights, np.zeros_like(case.weights)):
        (gradient,) = loss.pull_back(np.float32(1), case.logits, labels=case.labels, weights=weights)
        if not np.isfinite(gradient).all() or (gradient[weights == 0] != 0).any():
            raise Violation("the gradient must be finite, and 0 where the weight is 0")
