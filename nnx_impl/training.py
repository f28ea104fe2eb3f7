"""Training and evaluating a Flax NNX model, in the idiom of the framework."""

from collections.abc import Callable, Mapping

import jax
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from core.config import TransformerConfig
from core.losses import Batch, Metrics, sequence_metrics
from core.weights import dotted
from nnx_impl.decoding import evaluation
from nnx_impl.layers import Rngs, call_key
from nnx_impl.transformer import Transformer
from nnx_impl.weights import from_weights, to_weights


def loss_fn(
    model: Transformer, batch: Batch, rngs: Rngs | None = None, *, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch, and its metrics."""
    masks = {"source_mask": batch.source_mask, "target_mask": batch.target_mask}
    logits = model(batch.source, batch.inputs, **masks, rngs=rngs)
    metrics = sequence_metrics(logits, batch, label_smoothing=label_smoothing)
    return metrics.loss, metrics


def update(
    model: Transformer, optimizer: nnx.Optimizer, batch: Batch, rngs: Rngs | None, *, label_smoothing: float = 0.0
) -> Metrics:
    """One step of the optimizer, in place; `train_step` is the same, jitted."""
    key = call_key(rngs, model.encoder.dropout)

    def objective(model):
        return loss_fn(model, batch, key, label_smoothing=label_smoothing)

    grads, metrics = nnx.grad(objective, has_aux=True)(model)
    optimizer.update(model, grads)
    return metrics


train_step = nnx.jit(update, donate_argnames=("model", "optimizer"), static_argnames="label_smoothing")
"""`train_step(model, optimizer, batch, rngs, label_smoothing=0.0)`: both are updated in place, buffers reused."""


@nnx.jit
def eval_step(model: Transformer, batch: Batch) -> Metrics:
    """The metrics of a batch with dropout off, the loss not smoothed."""
    return loss_fn(evaluation(model), batch)[1]


class Trainer:
    """A model, its optimizer and its randomness, behind the methods that both frontends share."""

    def __init__(
        self, model: Transformer, tx: optax.GradientTransformation, *, seed: int = 0, label_smoothing: float = 0.0
    ):
        self.label_smoothing = label_smoothing
        self.model = model
        self.optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        self.rngs = nnx.Rngs(dropout=seed)

    def train(self, batch: Batch) -> Metrics:
        """One step; step n drops by fold_in(key(seed), n)."""
        return train_step(self.model, self.optimizer, batch, self.rngs, label_smoothing=self.label_smoothing)

    def evaluate(self, batch: Batch) -> Metrics:
        """The metrics of a batch with dropout off."""
        return eval_step(self.model, batch)

    def optimizer_state(self) -> dict[str, Array]:
        """The optimizer's arrays by name, the same names in both frontends."""
        return {name: variable[...] for name, variable in _opt_variables(self.optimizer).items()}


def init_transformer(config: TransformerConfig, *, seed: int) -> Transformer:
    """A new model; the same seed gives the same bits in both frontends."""
    return Transformer(config, rngs=nnx.Rngs(seed))


def functional_step(
    config: TransformerConfig, tx: optax.GradientTransformation, *, label_smoothing: float = 0.0
) -> Callable[..., tuple[dict[str, Array], dict[str, Array], Metrics]]:
    """`update` as a pure function of flat dictionaries, for plain `jax.jit` and to compare programs.

    (weights, optimizer state, batch, key, n) -> (weights, optimizer state, metrics), for step n of a run with that key
    """

    def step(weights: Mapping[str, Array], state: Mapping[str, Array], batch: Batch, key: PRNGKeyArray, n: Array):
        model = from_weights(config, weights)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for name, variable in _opt_variables(optimizer).items():
            variable[...] = state[name]
        rngs = nnx.Rngs(dropout=key)
        rngs.dropout.count[...] = n
        metrics = update(model, optimizer, batch, rngs, label_smoothing=label_smoothing)
        return to_weights(model), {n: v[...] for n, v in _opt_variables(optimizer).items()}, metrics

    return step


def _opt_variables(optimizer: nnx.Optimizer) -> dict[str, nnx.Variable]:
    leaves = jax.tree.leaves_with_path(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {dotted(path): variable for path, variable in leaves}
