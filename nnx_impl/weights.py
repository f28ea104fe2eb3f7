"""Exchange of weights between a Flax NNX model and a flat {dotted name: array}."""

from collections.abc import Mapping
from typing import TypeVar

from flax import nnx
from jaxtyping import Array

from core.config import TransformerConfig
from core.weights import fitted, unstacked
from nnx_impl.transformer import Classifier, DecoderOnlyTransformer, EncoderOnlyTransformer, Transformer

Model = TypeVar("Model", bound=Transformer | EncoderOnlyTransformer | DecoderOnlyTransformer | Classifier)


def to_weights(model: nnx.Module) -> dict[str, Array]:
    """Every parameter by its dotted name, as in `encoder.blocks.0.attention.q_proj.kernel`.

    They are the model's own arrays: a train step that follows reuses their memory, so save or copy them before.
    Of a model with `scan_layers` they are slices, by the same names.
    """
    return unstacked({name: param[...] for name, param in _params(nnx.state(model, nnx.Param)).items()})


def from_weights(
    config: TransformerConfig, weights: Mapping[str, Array], *, model_class: type[Model] = Transformer
) -> Model:
    """The model that the configuration describes, with a copy of these weights; no random numbers are drawn.

    ValueError lists every name that is missing, extra or of another shape or dtype.
    """
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    params = _params(state)
    for name, array in fitted(weights, params).items():
        params[name].set_value(array)
    nnx.update(model, state)
    return model


def _params(state: nnx.State) -> dict[str, nnx.Param]:
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}
