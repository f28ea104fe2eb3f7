"""Training and evaluating an Equinox model, in the idiom of the framework."""

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from core.config import TransformerConfig
from core.losses import Batch, Metrics, sequence_metrics
from core.training import accumulated
from core.vocabulary import projected_metrics
from core.weights import dotted, fitted, unstacked
from equinox_impl.decoding import evaluation
from equinox_impl.dispatch import Held
from equinox_impl.transformer import Classifier, DecoderOnlyTransformer, EncoderOnlyTransformer, Transformer
from equinox_impl.weights import from_weights, to_weights

Model = Transformer | EncoderOnlyTransformer | DecoderOnlyTransformer | Classifier
Kind = TypeVar("Kind", bound=Model)


def loss_fn(
    model: Model, batch: Batch, key: PRNGKeyArray | None = None, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch, and its metrics. An encoder-only model labels its source, a decoder-only one its inputs.

    A classifier has one label an example, labels and target mask `[*B, 1]`. To be differentiated as it is:
    `eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, batch, key, label_smoothing=0.1)`.
    """
    if isinstance(model, Classifier):
        logits = model(batch.source, source_mask=batch.source_mask, key=key)[..., None, :]
        metrics = sequence_metrics(logits, batch, label_smoothing=label_smoothing)
        return metrics.loss, metrics
    if isinstance(model, EncoderOnlyTransformer):
        x, _ = model.run(batch.source, source_mask=batch.source_mask, project=False, key=key)
    elif isinstance(model, DecoderOnlyTransformer):
        x, _ = model.run(batch.inputs, target_mask=batch.target_mask, project=False, key=key)
    else:
        x, _ = model.run(
            batch.source, batch.inputs, source_mask=batch.source_mask, target_mask=batch.target_mask, project=False,
            key=key,
        )  # fmt: skip
    metrics = projected_metrics(x, model.logits, batch, label_smoothing=label_smoothing)
    return metrics.loss, metrics


def update(
    model: Kind,
    opt_state: optax.OptState,
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    tx: optax.GradientTransformation,
    label_smoothing: float = 0.0,
    accumulate: bool = False,
) -> tuple[Kind, optax.OptState, Metrics]:
    """One step of the optimizer; `train_step` is the same, jitted.

    With `accumulate` the first axis of the batch is that of micro-batches: their gradients are added, by tokens.
    """

    def gradients(batch: Batch, key: PRNGKeyArray | None):
        def objective(model):
            return loss_fn(model, batch, key, label_smoothing=label_smoothing)

        return eqx.filter_grad(objective, has_aux=True)(model)

    grads, metrics = accumulated(gradients, batch, key) if accumulate else gradients(batch, key)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, metrics


def train_step(
    model: Kind,
    opt_state: optax.OptState,
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    tx: optax.GradientTransformation,
    label_smoothing: float = 0.0,
    accumulate: bool = False,
) -> tuple[Kind, optax.OptState, Metrics]:
    """`update`, jitted; the buffers of the model and of the optimizer's state are reused, so drop the old ones."""
    options = {"label_smoothing": label_smoothing, "accumulate": accumulate}
    return _train_step((batch, key), model, opt_state, tx=tx, **options)


@eqx.filter_jit(donate="all-except-first")
def _train_step(kept, model, opt_state, *, tx, **options):
    batch, key = kept
    return update(model, opt_state, batch, key, tx=tx, **options)


@eqx.filter_jit
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
        opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        held = self._held = Held(model, opt_state, jax.random.key(seed), jnp.uint32(0))

        def step(arrays: list[Array], batch: Batch) -> tuple[list[Array], Metrics]:
            model, opt_state, key, n = held.whole(arrays)
            own, options = jax.random.fold_in(key, n), {"label_smoothing": label_smoothing, "accumulate": accumulate}
            model, opt_state, metrics = update(model, opt_state, batch, own, tx=tx, **options)
            return Held(model, opt_state, key, n + 1).read(), metrics

        self._step = jax.jit(step, donate_argnums=0)

    @property
    def model(self) -> Kind:
        """As it is now; the next step takes its buffers."""
        return self._held.modules[0]

    @property
    def opt_state(self) -> optax.OptState:
        """As it is now; the next step takes its buffers."""
        return self._held.modules[1]

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
        return unstacked(_opt_arrays(self.opt_state))

    def resume(self, optimizer_state: Mapping[str, Array], *, step: int) -> None:
        """Goes on as after `step` steps, with a copy of that optimizer's state; the model has its weights already."""
        model, opt_state, key, _ = self._held.modules
        self._held.write(Held(model, _filled(opt_state, optimizer_state), key, jnp.uint32(step)).read())


def init_transformer(config: TransformerConfig, *, seed: int, model_class: type[Kind] = Transformer) -> Kind:
    """A new model; the same seed gives the same bits in both frontends."""
    return model_class(config, key=jax.random.key(seed))


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
        opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        opt_state = _filled(opt_state, state)
        key = jax.random.fold_in(key, n)
        options = {"label_smoothing": label_smoothing, "accumulate": accumulate}
        model, opt_state, metrics = update(model, opt_state, batch, key, tx=tx, **options)
        return to_weights(model), unstacked(_opt_arrays(opt_state)), metrics

    return step


def _filled(opt_state: optax.OptState, arrays: Mapping[str, Array]) -> optax.OptState:
    filled = fitted(arrays, _opt_arrays(opt_state))
    return jax.tree.unflatten(jax.tree.structure(opt_state), list(filled.values()))


def _opt_arrays(opt_state: optax.OptState) -> dict[str, Array]:
    return {dotted(path): array for path, array in jax.tree.leaves_with_path(opt_state)}
