"""One frozen description of a Transformer, which validates itself and is passed whole."""

import dataclasses
import json
import math
import typing
from typing import Any, Literal

import jax

Activation = Literal["relu", "gelu", "swiglu"]
NormOrder = Literal["post", "pre"]
Positions = Literal["sinusoidal", "learned", "rotary", "none"]
FloatType = Literal["float32", "bfloat16", "float16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Every choice that shapes a model. The defaults are the base model of Vaswani et al. (2017), but for
    `tie_embeddings`: the paper's "all" needs one vocabulary for both sides.

    Encoder-only models read `source_vocab_size`, decoder-only models `target_vocab_size`;
    the encoder-decoder needs both. Raises ValueError naming the rule, the value and the remedy.

    >>> TransformerConfig(target_vocab_size=100, d_model=64, num_heads=4).head_dim
    16
    """

    source_vocab_size: int | None = None
    target_vocab_size: int | None = None
    d_model: int = 512
    num_heads: int = 8
    num_kv_heads: int | None = None  # None: as many as num_heads; fewer: grouped heads
    d_ff: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    max_length: int = 1024  # rows of a learned position table; other positions know no end
    dropout_rate: float = 0.1  # on embeddings and on each sublayer's output
    attention_dropout_rate: float = 0.0  # on attention weights
    activation: Activation = "relu"  # gelu is the exact one
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_order: NormOrder = "post"
    norm_epsilon: float = 1e-6
    positions: Positions = "sinusoidal"
    rotary_theta: float = 10_000.0
    attention_bias: bool = False
    feed_forward_bias: bool = True
    # none: three tables; target: target embedding = output projection (works for any two
    # vocabularies); all: the source embedding too, as in the paper, for one joint vocabulary
    tie_embeddings: Literal["none", "target", "all"] = "target"
    dtype: FloatType = "float32"  # of activations; softmax, norms and logits are at least float32
    param_dtype: FloatType = "float32"  # in which parameters are stored

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("d_model", "num_heads", "d_ff", "max_length"):
            _check_range(self, name, 1, math.inf)
        for name in ("num_encoder_layers", "num_decoder_layers"):
            _check_range(self, name, 0, math.inf)
        for name in ("source_vocab_size", "target_vocab_size", "num_kv_heads"):
            if getattr(self, name) is not None:
                _check_range(self, name, 1, math.inf)
        for name in ("dropout_rate", "attention_dropout_rate"):
            check_rate(name, getattr(self, name))
        for name in ("norm_epsilon", "rotary_theta"):
            _check_range(self, name, math.ulp(0.0), math.inf)
        _check_divides(self, "num_heads", "d_model")
        if self.num_kv_heads is not None:
            _check_divides(self, "num_kv_heads", "num_heads")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                "rotary positions need an even head width d_model / num_heads, "
                f"got {self.d_model} / {self.num_heads} = {self.head_dim}"
            )
        sizes = (self.source_vocab_size, self.target_vocab_size)
        if self.tie_embeddings == "all" and None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                "tie_embeddings='all' needs one joint vocabulary, got source_vocab_size="
                f"{sizes[0]}, target_vocab_size={sizes[1]}; use 'target' or 'none'"
            )
        if "float64" in (self.dtype, self.param_dtype) and jax.dtypes.canonicalize_dtype("float64") != "float64":
            raise ValueError("float64 needs jax.config.update('jax_enable_x64', True) first")

    @property
    def head_dim(self) -> int:
        """Width H of one head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number K of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def vocab_size(self, side: Literal["source", "target"]) -> int:
        """That side's vocabulary size; ValueError if the configuration has none."""
        size = self.source_vocab_size if side == "source" else self.target_vocab_size
        if size is None:
            raise ValueError(f"this model needs {side}_vocab_size, got None; give it in the configuration")
        return size

    def replace(self, **changes: Any) -> "TransformerConfig":
        """A copy with some fields changed, validated anew."""
        _check_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One JSON object of all fields, for a file beside the weights."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "TransformerConfig":
        """The inverse of `to_json`; unknown fields and wrong types raise ValueError."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a configuration is one JSON object, got {type(fields).__name__}")
        _check_fields(fields)
        return cls(**fields)


def check_rate(name: str, rate: float) -> None:
    """ValueError unless 0 <= rate < 1 (NaN included)."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")


def _check_fields(fields: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"unknown configuration fields {unknown}; known are {sorted(known)}")


def _check_types(config: TransformerConfig) -> None:
    for name, hint in typing.get_type_hints(TransformerConfig).items():
        value = getattr(config, name)
        if typing.get_origin(hint) is Literal:
            if value not in typing.get_args(hint):
                raise ValueError(f"{name} must be one of {typing.get_args(hint)}, got {value!r}")
            continue
        accepted = typing.get_args(hint) or (hint,)
        if float in accepted:
            accepted += (int,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            names = " or ".join("None" if t is type(None) else t.__name__ for t in accepted)
            raise ValueError(f"{name} must be {names}, got {value!r}")


def _check_range(config: TransformerConfig, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value < high:
        raise ValueError(f"{name} must be at least {low:g} and finite, got {value}")


def _check_divides(config: TransformerConfig, divisor: str, name: str) -> None:
    if getattr(config, name) % getattr(config, divisor):
        raise ValueError(
            f"{name} must be a multiple of {divisor}, "
            f"got {name}={getattr(config, name)}, {divisor}={getattr(config, divisor)}"
        )
