"""Exchange of weights between an Equinox model and a flat {dotted name: array}."""

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array

from core.config import TransformerConfig
from core.weights import dotted, fitted, unstacked
from equinox_impl.transformer import Classifier, DecoderOnlyTransformer, EncoderOnlyTransformer, Transformer

Model = TypeVar("Model", bound=Transformer | EncoderOnlyTransformer | DecoderOnlyTransformer | Classifier)


def to_weights(model: eqx.Module) -> dict[str, Array]:
    """Every parameter by its dotted name, as in `encoder.blocks.0.attention.q_proj.kernel`.

    They are the model's own arrays: a train step that follows reuses their memory, so save or copy them before.
    Of a model with `scan_layers` they are slices, by the same names.
    """
    return unstacked(_params(eqx.filter(model, eqx.is_inexact_array)))


def from_weights(
    config: TransformerConfig, weights: Mapping[str, Array], *, model_class: type[Model] = Transformer
) -> Model:
    """The model that the configuration describes, with a copy of these weights; no random numbers are drawn.

    ValueError lists every name that is missing, extra or of another shape or dtype.
    """
    model = eqx.filter_eval_shape(lambda key: model_class(config, key=key), jax.random.key(0))
    params, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    filled = fitted(weights, _params(params))
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(params), list(filled.values())), rest)


def _params(tree: eqx.Module) -> dict[str, Any]:
    return {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
