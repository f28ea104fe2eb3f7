"""One frozen description of a Transformer, which validates itself and is passed whole."""

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "glu", "geglu", "swiglu", "reglu"]
NormOrder = Literal["post", "pre", "sandwich"]
Positions = Literal["sinusoidal", "learned", "rotary", "shaw", "transformer_xl", "t5", "alibi", "none"]
RotaryLayout = Literal["half", "interleaved"]
RotaryScaling = Literal["none", "linear", "ntk", "yarn", "llama3"]
FloatType = Literal["float32", "bfloat16", "float16", "float64"]
Kept = Literal["nothing", "projections"]
Implementation = Literal["materialised", "blockwise", None]
MaybeNone: TypeAlias = Any
"""In the type of a part that is None where the configuration asks for none. Any, as in typeshed: whoever chose the
configuration knows, and need not prove it to a type checker at every use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Every choice that shapes a model. The defaults are the base model of Vaswani et al. (2017), but for
    `tie_embeddings`: the paper's "all" needs one vocabulary for both sides.

    Encoder-only models read `source_vocab_size`, decoder-only models `target_vocab_size`;
    the encoder-decoder needs both. A classifier reads `source_features`, and `target_vocab_size`
    is how many classes it knows. Raises ValueError naming the rule, the value and the remedy.

    >>> TransformerConfig(target_vocab_size=100, d_model=64, num_heads=4).head_dim
    16
    """

    source_vocab_size: int | None = None
    target_vocab_size: int | None = None
    source_features: int | None = None  # width of source vectors, for a model that reads vectors instead of tokens
    d_model: int = 512
    d_ff: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    max_length: int = 1024  # rows of a learned position table; other positions know no end

    # attention
    num_heads: int = 8
    num_kv_heads: int | None = None  # None: as many as num_heads; fewer: grouped heads
    value_dim: int | None = None  # width of a head's values; None: that of its queries and keys
    attention_bias: bool = False
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim); T5 has 1
    attention_soft_cap: float | None = None  # c: logits become c tanh(logits / c)
    attention_sinks: bool = False  # a learned logit for each head that has no value
    attention_window: tuple[int, int] | None = None  # of self-attention: keys before and after the query's own
    qk_norm: bool = False  # the norm over each head's queries and keys
    attention_implementation: Implementation = None  # None picks by size; where weights are asked for: materialised

    # positions
    positions: Positions = "sinusoidal"
    relative_distance: int = 128  # Shaw: beyond it all are equal; T5: where the last bucket begins
    relative_buckets: int = 32  # of T5
    rotary_theta: float = 10_000.0
    rotary_layout: RotaryLayout = "half"
    rotary_dim: int | None = None  # features of a head that are turned; None: all
    rotary_scaling: RotaryScaling = "none"
    rotary_factor: float = 1.0  # how many times longer than rotary_original_length texts may be
    rotary_original_length: int = 2048
    history_length: int = 0  # vectors of earlier segments that a decoder keeps, as in Transformer-XL

    # blocks
    activation: Activation = "relu"  # gelu is the exact one
    feed_forward_bias: bool = True
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_order: NormOrder = "post"
    norm_epsilon: float = 1e-6
    parallel_residual: bool = False  # all sublayers of a block read the block's input

    # regularisation
    dropout_rate: float = 0.1  # on each sublayer's output
    embedding_dropout_rate: float | None = None  # on what enters a stack; None: dropout_rate
    attention_dropout_rate: float = 0.0  # on attention weights
    stochastic_depth_rate: float = 0.0  # of the last block; it grows evenly from the first

    # embeddings and numbers
    # none: three tables; target: target embedding = output projection (works for any two
    # vocabularies); all: the source embedding too, as in the paper, for one joint vocabulary
    tie_embeddings: Literal["none", "target", "all"] = "target"
    scale_embeddings: bool = True  # times sqrt(d_model), on the way in
    # what jnp.dtype takes, kept as its name; the model computes in `dtype` however its arrays are stored or cast
    dtype: FloatType | DTypeLike = "float32"  # of activations; softmax, norms and logits are at least float32
    param_dtype: FloatType | DTypeLike = "float32"  # in which parameters are stored
    remat: bool = False  # blocks are computed again in the backward pass, to hold only what goes between them
    remat_keeps: Kept = "nothing"  # and what else they hold; projections: what comes out of every kernel
    scan_layers: bool = False  # a stack is one block with stacked parameters, compiled once whatever the depth

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, _float_type(name, getattr(self, name)))
        _check_types(self)
        for name in ("d_model", "num_heads", "d_ff", "max_length", "relative_distance", "rotary_original_length"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("num_encoder_layers", "num_decoder_layers", "history_length"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("source_vocab_size", "target_vocab_size", "source_features", "num_kv_heads", "value_dim"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        for name in ("dropout_rate", "embedding_dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"):
            if getattr(self, name) is not None:
                check_rate(name, getattr(self, name))
        for name in ("norm_epsilon", "rotary_theta", "attention_scale", "attention_soft_cap"):
            if getattr(self, name) is not None:
                check_above(name, getattr(self, name), 0)
        check_at_least("rotary_factor", self.rotary_factor, 1)
        _check_divides(self, "num_heads", "d_model")
        if self.num_kv_heads is not None:
            _check_divides(self, "num_kv_heads", "num_heads")
        if self.attention_window is not None:
            check_window(self.attention_window)
        if self.positions == "rotary":
            _check_rotary(self)
        if self.positions == "t5":
            _check_buckets(self)
        if self.parallel_residual and self.norm_order == "post":
            raise ValueError("parallel_residual has no place for norm_order='post'; use 'pre' or 'sandwich'")
        if self.history_length and self.positions in ("sinusoidal", "learned"):
            raise ValueError(
                "history_length needs positions that go by distance, for each segment counts from 0 anew, "
                f"got positions={self.positions!r}; use 'transformer_xl', 'rotary', 'shaw', 't5' or 'alibi'"
            )
        sizes = (self.source_vocab_size, self.target_vocab_size)
        if self.tie_embeddings == "all" and None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                "tie_embeddings='all' needs one joint vocabulary, got source_vocab_size="
                f"{sizes[0]}, target_vocab_size={sizes[1]}; use 'target' or 'none'"
            )
        for dtype in (self.dtype, self.param_dtype):
            check_enabled(dtype)

    @property
    def head_dim(self) -> int:
        """Width H of one head."""
        return self.d_model // self.num_heads

    @property
    def value_width(self) -> int:
        """Width Hv of one head's values."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def kv_heads(self) -> int:
        """Number K of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rotary_width(self) -> int:
        """How many features of a head rotary positions turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def embedding_scale(self) -> float:
        """By which embeddings are multiplied on the way in."""
        return math.sqrt(self.d_model) if self.scale_embeddings else 1.0

    @property
    def stack_dropout_rate(self) -> float:
        """Dropout on what enters a stack."""
        return self.dropout_rate if self.embedding_dropout_rate is None else self.embedding_dropout_rate

    def depth_rate(self, layer: int, layers: int) -> float:
        """Stochastic depth of one layer: the first's share of the rate is 1 / layers, the last's all of it."""
        return self.stochastic_depth_rate * (layer + 1) / layers

    def vocab_size(self, side: Literal["source", "target"]) -> int:
        """That side's vocabulary size; ValueError if the configuration has none."""
        size = self.source_vocab_size if side == "source" else self.target_vocab_size
        if size is None:
            raise ValueError(f"this model needs {side}_vocab_size, got None; give it in the configuration")
        return size

    @property
    def source_width(self) -> int:
        """Width P of a source vector; ValueError if the configuration has none."""
        if self.source_features is None:
            raise ValueError("this model needs source_features, got None; give it in the configuration")
        return self.source_features

    def __repr__(self) -> str:
        """What differs from the defaults."""
        fields = [(field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)]
        return f"TransformerConfig({', '.join(f'{name}={value!r}' for name, value, usual in fields if value != usual)})"

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
        if isinstance(window := fields.get("attention_window"), list):  # JSON knows no tuples
            fields["attention_window"] = tuple(window)
        return cls(**fields)


def check_rate(name: str, rate: float) -> None:
    """ValueError unless 0 <= rate < 1 (NaN included)."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")


def check_at_least(name: str, number: float, low: float) -> None:
    """ValueError unless low <= number < infinity (NaN included)."""
    if not low <= number < math.inf:
        raise ValueError(f"{name} must be at least {low:g} and finite, got {number}")


def check_above(name: str, number: float, low: float) -> None:
    """ValueError unless low < number < infinity (NaN included)."""
    if not low < number < math.inf:
        raise ValueError(f"{name} must be above {low:g} and finite, got {number}")


def check_choice(name: str, given: object, choices: Any) -> None:
    """ValueError unless it is one of a Literal's."""
    if given not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {given!r}")


def check_enabled(dtype: DTypeLike) -> None:
    """ValueError for float64 where JAX would make float32 of it."""
    if dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise ValueError("float64 needs jax.config.update('jax_enable_x64', True) first")


def _check_fields(fields: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"unknown configuration fields {unknown}; known are {sorted(known)}")


def check_window(window: tuple[int, int]) -> None:
    """ValueError unless it is two counts of keys."""
    if not isinstance(window, tuple) or len(window) != 2 or any(type(w) is not int or w < 0 for w in window):
        raise ValueError(
            "a window must be (left, right), how many keys before and after the query's own position it may see, "
            f"got {window!r}; a causal window of w keys is causal=True, window=(w - 1, 0)"
        )


def _float_type(name: str, given: DTypeLike) -> FloatType:
    try:
        found = None if given is None else jnp.dtype(given).name  # None would be float64
    except TypeError:
        found = None
    for float_type in get_args(FloatType):
        if found == float_type:
            return float_type
    raise ValueError(f"{name} must be one of {get_args(FloatType)}, got {given!r}")


def _check_types(config: TransformerConfig) -> None:
    for name, hint in typing.get_type_hints(TransformerConfig).items():
        value = getattr(config, name)
        if name in ("dtype", "param_dtype"):
            continue
        if typing.get_origin(hint) is Literal:
            check_choice(name, value, hint)
            continue
        union = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = tuple(typing.get_origin(kind) or kind for kind in union)
        if float in accepted:
            accepted += (int,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            names = " or ".join("None" if t is types.NoneType else t.__name__ for t in accepted)
            raise ValueError(f"{name} must be {names}, got {value!r}")


def _check_divides(config: TransformerConfig, divisor: str, name: str) -> None:
    if getattr(config, name) % getattr(config, divisor):
        raise ValueError(
            f"{name} must be a multiple of {divisor}, "
            f"got {name}={getattr(config, name)}, {divisor}={getattr(config, divisor)}"
        )


def _check_rotary(config: TransformerConfig) -> None:
    if config.rotary_width % 2:
        raise ValueError(
            "rotary positions turn an even number of features, rotary_dim or else d_model / num_heads, "
            f"got {config.rotary_width}"
        )
    if not 2 <= config.rotary_width <= config.head_dim:
        raise ValueError(f"rotary_dim must lie in [2, head width {config.head_dim}], got {config.rotary_width}")
    if config.rotary_scaling == "yarn":
        check_above("the rotary_theta of YaRN", config.rotary_theta, 1)


def _check_buckets(config: TransformerConfig) -> None:
    if config.relative_buckets < 4 or config.relative_buckets % 2:
        raise ValueError(f"relative_buckets must be even and at least 4, got {config.relative_buckets}")
    if config.relative_distance <= config.relative_buckets // 2:
        raise ValueError(
            "relative_distance must be above half of relative_buckets, "
            f"got relative_distance={config.relative_distance}, relative_buckets={config.relative_buckets}"
        )
