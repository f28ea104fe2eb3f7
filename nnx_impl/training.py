"""Training and evaluating a Flax NNX model, in the idiom of the framework."""

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from core.config import TransformerConfig
from core.losses import Batch, Metrics, sequence_metrics
from core.training import accumulated
from core.vocabulary import projected_metrics
from core.weights import dotted, fitted, unstacked
from nnx_impl.decoding import evaluation
from nnx_impl.dispatch import Held
from nnx_impl.layers import Rngs, call_key
from nnx_impl.transformer import Classifier, DecoderOnlyTransformer, EncoderOnlyTransformer, Transformer
from nnx_impl.weights import from_weights, to_weights

Model = Transformer | EncoderOnlyTransformer | DecoderOnlyTransformer | Classifier
Kind = TypeVar("Kind", bound=Model)


def loss_fn(
    model: Model, batch: Batch, rngs: Rngs | None = None, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch, and its metrics. An encoder-only model labels its source, a decoder-only one its inputs.

    A classifier has one label an example, labels and target mask `[*B, 1]`. To be differentiated as it is:
    `nnx.value_and_grad(loss_fn, has_aux=True)(model, batch, rngs, label_smoothing=0.1)`.
    """
    if isinstance(model, Classifier):
        logits = model(batch.source, source_mask=batch.source_mask, rngs=rngs)[..., None, :]
        metrics = sequence_metrics(logits, batch, label_smoothing=label_smoothing)
        return metrics.loss, metrics
    if isinstance(model, EncoderOnlyTransformer):
        x, _ = model.run(batch.source, source_mask=batch.source_mask, project=False, rngs=rngs)
    elif isinstance(model, DecoderOnlyTransformer):
        x, _ = model.run(batch.inputs, target_mask=batch.target_mask, project=False, rngs=rngs)
    else:
        x, _ = model.run(
            batch.source, batch.inputs, source_mask=batch.source_mask, target_mask=batch.target_mask, project=False,
            rngs=rngs,
        )  # fmt: skip
    metrics = projected_metrics(x, model.logits, batch, label_smoothing=label_smoothing)
    return metrics.loss, metrics


def update(
    model: Model,
    optimizer: nnx.Optimizer,
    batch: Batch,
    rngs: Rngs | None,
    *,
    label_smoothing: float = 0.0,
    accumulate: bool = False,
) -> Metrics:
    """One step of the optimizer, in place; `train_step` is the same, jitted.

    With `accumulate` the first axis of the batch is that of micro-batches: their gradients are added, by tokens.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def gradients(batch: Batch, key: PRNGKeyArray | None):
        def objective(params):
            return loss_fn(nnx.merge(graphdef, params, rest), batch, key, label_smoothing=label_smoothing)

        return jax.grad(objective, has_aux=True)(params)

    stack = model.encoder if isinstance(model, EncoderOnlyTransformer | Classifier) else model.decoder
    key = call_key(rngs, stack.dropout)
    grads, metrics = accumulated(gradients, batch, key) if accumulate else gradients(batch, key)
    optimizer.update(model, grads)
    return metrics


train_step = nnx.jit(update, donate_argnames=("model", "optimizer"), static_argnames=("label_smoothing", "accumulate"))
"""`train_step(model, optimizer, batch, rngs, ...)` is `update`: both are updated in place, buffers reused."""


@nnx.jit(graph_updates=False)
def eval_step(model: Model, batch: Batch) -> Metrics:
    """The metrics of a batch with dropout off, the loss not smoothed."""
    return loss_fn(evaluation(model), batch)[1]


class Trainer(Generic[Kind]):
    """A model, its optimizer and its randomness, behind the methods that both frontends share.

    A step costs the host what plain `jax.jit` of its arrays does, for they are held flat: reach the model as
    `trainer.model`, for the one that was given has lost its buffers after a step. Structure and modes stay as given.
    """

    def __init__(
        self,
        model: Kind,
        tx: optax.GradientTransformation,
        *,
        seed: int = 0,
        label_smoothing: float = 0.0,
        accumulate: bool = False,
    ):
        held = self._held = Held(model, nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.Rngs(dropout=seed))

        def step(arrays: list[Array], batch: Batch) -> tuple[list[Array], Metrics]:
            model, optimizer, rngs = held.whole(arrays)
            metrics = update(model, optimizer, batch, rngs, label_smoothing=label_smoothing, accumulate=accumulate)
            return Held(model, optimizer, rngs).read(), metrics

        self._step = jax.jit(step, donate_argnums=0)

    @property
    def model(self) -> Kind:
        """As it is now."""
        return self._held.modules[0]

    @property
    def optimizer(self) -> nnx.Optimizer:
        """As it is now."""
        return self._held.modules[1]

    @property
    def rngs(self) -> nnx.Rngs:
        """As they are now: the count of the dropout stream is that of the steps."""
        return self._held.modules[2]

    def train(self, batch: Batch) -> Metrics:
        """One step; step n drops by fold_in(key(seed), n)."""
        arrays, metrics = self._step(self._held.read(), batch)
        self._held.write(arrays)
        return metrics

    def evaluate(self, batch: Batch) -> Metrics:
        """The metrics of a batch with dropout off."""
        return eval_step(self.model, batch)

    def optimizer_state(self) -> dict[str, Array]:
        """The optimizer's arrays by name, the same names in both frontends."""
        return unstacked({name: variable[...] for name, variable in _opt_variables(self.optimizer).items()})

    def resume(self, optimizer_state: Mapping[str, Array], *, step: int) -> None:
        """Goes on as after `step` steps, with a copy of that optimizer's state; the model has its weights already."""
        variables = _opt_variables(self.optimizer)
        for name, array in fitted(optimizer_state, variables).items():
            variables[name].set_value(array)
        self.rngs.dropout.count.set_value(jnp.uint32(step))


def init_transformer(config: TransformerConfig, *, seed: int, model_class: type[Kind] = Transformer) -> Kind:
    """A new model; the same seed gives the same bits in both frontends."""
    return model_class(config, rngs=nnx.Rngs(seed))


def functional_step(
    config: TransformerConfig,
    tx: optax.GradientTransformation,
    *,
    model_class: type[Model] = Transformer,
    label_smoothing: float = 0.0,
    accumulate: bool = False,
) -> Callable[..., tuple[dict[str, Array], dict[str, Array], Metrics]]:
    """`update` as a pure function of flat dictionaries, for plain `jax.jit` and to compare programs.

    (weights, optimizer state, batch, key, n) -> (weights, optimizer state, metrics), for step n of a run with that key
    """

    def step(weights: Mapping[str, Array], state: Mapping[str, Array], batch: Batch, key: PRNGKeyArray, n: Array):
        model = from_weights(config, weights, model_class=model_class)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        variables = _opt_variables(optimizer)
        for name, array in fitted(state, variables).items():
            variables[name].set_value(array)
        rngs = nnx.Rngs(dropout=key)
        rngs.dropout.count[...] = n
        metrics = update(model, optimizer, batch, rngs, label_smoothing=label_smoothing, accumulate=accumulate)
        return to_weights(model), unstacked({n: v[...] for n, v in variables.items()}), metrics

    return step


def _opt_variables(optimizer: nnx.Optimizer) -> dict[str, nnx.Variable]:
    leaves = jax.tree.leaves_with_path(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {dotted(path): variable for path, variable in leaves if jax.tree.leaves(variable)}  # what is masked is empty
