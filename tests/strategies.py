"""What the laws draw: small shapes in buckets, so that JAX compiles little, and bulk data by a seed."""

import itertools
import types
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
from hypothesis import strategies as st

from core.config import Activation, Kept, NormOrder, Positions, RotaryLayout, RotaryScaling, TransformerConfig

seeds = st.integers(0, 2**32 - 1)


class AttentionShape(NamedTuple):
    """Sizes of one attention; `batch` are the leading axes."""

    batch: tuple[int, ...]
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int


SQUARE_SHAPES = [
    AttentionShape((2,), 3, 3, 2, 2, 4, 4),
    AttentionShape((), 1, 1, 1, 1, 1, 1),
    AttentionShape((3,), 5, 5, 4, 2, 3, 5),
    AttentionShape((2, 1, 2), 7, 7, 3, 1, 8, 2),
]
RECTANGULAR_SHAPES = [
    AttentionShape((2,), 2, 5, 2, 2, 4, 4),
    AttentionShape((), 7, 3, 6, 3, 5, 3),
    AttentionShape((2, 2), 1, 8, 4, 1, 2, 7),
]
square_shapes = st.sampled_from(SQUARE_SHAPES)
attention_shapes = st.sampled_from(SQUARE_SHAPES + RECTANGULAR_SHAPES)


def qkv(shape: AttentionShape, seed: int, dtype="float32", scale: float = 1.0) -> list[np.ndarray]:
    """Queries, keys and values, all numbers distinct."""
    rng = np.random.default_rng(seed)
    sizes = [(shape.T, shape.N, shape.H), (shape.S, shape.K, shape.H), (shape.S, shape.K, shape.Hv)]
    return [(scale * rng.standard_normal((*shape.batch, *size))).astype(dtype) for size in sizes]


def bool_mask(shape: AttentionShape, seed: int, density: float = 0.6) -> np.ndarray:
    """A mask with the rank of the logits, some of its axes 1; whole rows may be False."""
    rng = np.random.default_rng([seed, 1])
    full = (*shape.batch, shape.N, shape.T, shape.S)
    size = tuple(n if rng.random() < 0.7 else 1 for n in full[:-1]) + full[-1:]
    return rng.random(size) < density


@st.composite
def configs(draw, **fixed) -> TransformerConfig:
    """A small configuration; the first choice of each field is the simplest. Most have blocks on both sides."""
    layers = st.sampled_from([1, 1, 1, 1, 2, 0])
    heads = draw(st.sampled_from([1, 2, 4]))
    width = draw(st.sampled_from([2, 4, 6])) * heads
    fields = {
        "source_vocab_size": 11,
        "target_vocab_size": 13,
        "source_features": 3,
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([None, 1, max(1, heads // 2)])),
        "value_dim": draw(st.sampled_from([None, 3])),
        "d_ff": draw(st.sampled_from([5, 16])),
        "num_encoder_layers": draw(layers),
        "num_decoder_layers": draw(layers),
        "max_length": 12,
        "dropout_rate": draw(st.sampled_from([0.0, 0.25])),
        "attention_dropout_rate": draw(st.sampled_from([0.0, 0.25])),
        "embedding_dropout_rate": draw(st.sampled_from([None, 0.5])),
        "stochastic_depth_rate": draw(st.sampled_from([0.0, 0.25])),
        "activation": draw(st.sampled_from(get_args(Activation))),
        "norm": draw(st.sampled_from(["layer_norm", "rms_norm"])),
        "norm_order": draw(st.sampled_from(get_args(NormOrder))),
        "positions": draw(st.sampled_from(get_args(Positions))),
        "relative_distance": 5,
        "relative_buckets": 4,
        "rotary_layout": draw(st.sampled_from(get_args(RotaryLayout))),
        "rotary_dim": draw(st.sampled_from([None, 2])),
        "rotary_scaling": draw(st.sampled_from(get_args(RotaryScaling))),
        "rotary_factor": 4.0,
        "attention_bias": draw(st.booleans()),
        "attention_scale": draw(st.sampled_from([None, 1.0])),
        "attention_soft_cap": draw(st.sampled_from([None, 2.0])),
        "attention_sinks": draw(st.booleans()),
        "attention_window": draw(st.sampled_from([None, (2, 1)])),
        "qk_norm": draw(st.booleans()),
        "feed_forward_bias": draw(st.booleans()),
        "tie_embeddings": draw(st.sampled_from(["none", "target", "all"])),
        "scale_embeddings": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "param_dtype": draw(st.sampled_from(["float32", "bfloat16"])),
    }
    fields["remat"], fields["scan_layers"] = draw(st.booleans()), draw(st.booleans())
    fields["remat_keeps"] = draw(st.sampled_from(get_args(Kept)))
    fields["parallel_residual"] = fields["norm_order"] != "post" and draw(st.booleans())
    fields |= fixed
    if fields["tie_embeddings"] == "all":
        fields["source_vocab_size"] = fields["target_vocab_size"]
    return TransformerConfig(**fields)


def choices(hint: Any) -> list[Any]:
    """The values that a field's annotation names: those of its Literals, both truth values, None."""
    if get_origin(hint) in (types.UnionType, Union):
        return [value for member in get_args(hint) for value in choices(member)]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return {bool: [False, True], types.NoneType: [None]}.get(hint, [])


CHOICES = {name: choices(hint) for name, hint in get_type_hints(TransformerConfig).items()}
NUMBERS = {  # values that annotations do not name
    "d_model": [16, 24],
    "d_ff": [5, 16],
    "num_heads": [2, 4],
    "num_kv_heads": [1],
    "value_dim": [3],
    "attention_scale": [1.0],
    "attention_soft_cap": [2.0],
    "attention_window": [(2, 1)],
    "norm_epsilon": [1e-6, 1e-3],
    "dropout_rate": [0.0, 0.25],
    "embedding_dropout_rate": [0.5],
    "attention_dropout_rate": [0.0, 0.25],
    "stochastic_depth_rate": [0.0, 0.25],
    "source_features": [3],
}
WITH_POSITIONS = {
    "learned": {"max_length": 7},
    "shaw": {"relative_distance": 2},
    "t5": {"relative_distance": 5, "relative_buckets": 4, "history_length": 2},
    "transformer_xl": {"history_length": 3},
}
WITH_SCALING = [
    {"rotary_layout": layout, "rotary_dim": width, "rotary_theta": theta, "rotary_original_length": length, **factor}
    for layout in CHOICES["rotary_layout"]
    for width, theta, length, factor in (
        (None, 1e4, 64, {"rotary_factor": 4.0}),
        (4, 500.0, 32, {"rotary_factor": 2.0}),
    )
]
TOGETHER = [  # fields whose values mean something, or are allowed, only beside others
    [{"positions": name} | WITH_POSITIONS.get(name, {}) for name in CHOICES["positions"] if name != "rotary"]
    + [
        {"positions": "rotary", "rotary_scaling": scaling} | others
        for scaling, others in zip(CHOICES["rotary_scaling"], itertools.cycle(WITH_SCALING), strict=False)
    ],
    [
        {"norm_order": order, "parallel_residual": parallel}
        for order in CHOICES["norm_order"]
        for parallel in CHOICES["parallel_residual"][: 1 if order == "post" else 2]
    ],
    [
        {"tie_embeddings": tied, "source_vocab_size": 13 if tied == "all" else 11, "target_vocab_size": 13}
        for tied in CHOICES["tie_embeddings"]
    ],
    [{"remat": False}, *({"remat": True, "remat_keeps": kept} for kept in CHOICES["remat_keeps"])],
    [{"scan_layers": scan, "num_encoder_layers": 1 + scan, "num_decoder_layers": 1 + scan} for scan in (False, True)],
]


def covering_rows() -> list[dict[str, Any]]:
    """Fields of small configurations, one row for each kind of positions, that take every value between them.

    Each value of an option comes in as many rows as any other, to one, and any two of two small options meet in one.
    A new option takes part by its annotation, or by its line in `NUMBERS`.
    """
    together = {name for option in TOGETHER for value in option for name in value}
    values = {name: named + NUMBERS.get(name, []) for name, named in CHOICES.items() if name not in together}
    options = TOGETHER + [[{name: value} for value in its] for name, its in values.items() if its]
    rows, rng = len(options[0]), np.random.default_rng(0)
    columns = [np.arange(rows)]  # which value each row takes of each option

    def meets_all(option: list, column: np.ndarray) -> bool:
        pairs = [(len(option) * len(other), its) for other, its in zip(options, columns, strict=False)]
        return all(len(set(zip(column, its, strict=True))) == count for count, its in pairs if count <= rows // 2)

    for option in options[1:]:
        column = rng.permutation(np.arange(rows) % len(option))
        while not meets_all(option, column):
            column = rng.permutation(column)
        columns.append(column)
    return [
        dict(field for option, i in zip(options, row, strict=True) for field in option[i].items())
        for row in zip(*columns, strict=True)
    ]


COVERING_ROWS = covering_rows()


class AttentionCase(NamedTuple):
    """One whole attention problem and, worked out cell by cell, who may see whom."""

    shape: AttentionShape
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    rules: dict  # keyword arguments of attention
    allowed: np.ndarray  # [*B, N, T, S]

    @property
    def qkv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.q, self.k, self.v

    @property
    def seen(self) -> np.ndarray:
        """[*B, S, K]: keys that some query may see."""
        grouped = self.allowed.reshape(*self.shape.batch, self.shape.K, -1, self.shape.T, self.shape.S)
        return grouped.any(axis=(-3, -2)).swapaxes(-1, -2)


def allowed_cells(shape: AttentionShape, rules: dict) -> np.ndarray:
    """The contract of mask, bias, causal, q_offset and window, one cell at a time."""
    full = (*shape.batch, shape.N, shape.T, shape.S)
    mask = np.broadcast_to(rules.get("mask", True), full)
    bias = np.broadcast_to(rules.get("bias", 0.0), full)
    offset = np.broadcast_to(rules.get("q_offset", 0), shape.batch)
    left, right = rules.get("window") or (np.inf, np.inf)
    allowed = np.zeros(full, bool)
    for cell in np.ndindex(full):
        *row, _, t, s = cell
        ahead = s - (t + offset[tuple(row)])
        allowed[cell] = mask[cell] and bias[cell] != -np.inf and -left <= ahead <= right
        allowed[cell] &= not (rules.get("causal") and ahead > 0)
    return allowed


RULES = ["", "mask", "mask causal", "bias window"]


float32 = st.just("float32")
floats = st.sampled_from(["float32", "float32", "bfloat16", "float16", "float64"])  # most compute in the first


@st.composite
def attention_cases(draw, shapes=attention_shapes, rules=RULES, dtypes=float32) -> AttentionCase:
    """Attention under a combination of rules, with an offset for each row; masks of full shape, to compile little."""
    shape, seed, names = draw(shapes), draw(seeds), draw(st.sampled_from(rules)).split()
    rng, full = np.random.default_rng([seed, 2]), (*shape.batch, shape.N, shape.T, shape.S)
    given = {}
    if "mask" in names:
        given["mask"] = np.broadcast_to(bool_mask(shape, seed, 0.7), full)
    if "bias" in names:
        open_cells = np.broadcast_to(bool_mask(shape, seed + 1, 0.8), full)
        given["bias"] = np.where(open_cells, rng.standard_normal(full), -np.inf).astype("float32")
    if "causal" in names:
        given["causal"] = True
    if "window" in names:
        given["window"] = (2, 1)
    if {"causal", "window"} & set(names):
        given["q_offset"] = rng.integers(-1, shape.S, shape.batch).astype("int32")
    return AttentionCase(shape, *qkv(shape, seed, draw(dtypes)), given, allowed_cells(shape, given))


LAST = 2**31 - 1  # positions are int32
EDGES = [0, 1, 2, 1023, 1024, 4097, 2**16 + 1, 2**20 - 1, 2**20, 2**24 + 1, 2**30 + 3, LAST - 1, LAST]
positions = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**20), st.integers(0, LAST))
far_and_near = st.sampled_from([4, 2**20, LAST - 8])


def ids_up_to(last: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Distinct positions in no order, the last one among them."""
    ids = np.random.default_rng([seed, 4]).integers(0, last, shape, endpoint=True).astype("int32")
    ids[(-1,) * len(shape)] = last
    return ids


class Combination(NamedTuple):
    """Options of attention that are given together, by name, and the shape they are given for."""

    shape: AttentionShape
    names: str
    soft_cap: float | None = None
    scale: float | None = None

    def __str__(self) -> str:
        return f"{self.names or 'none'} {self.soft_cap} {self.scale}"


COMBINATIONS = [  # every two options meet in one of them
    Combination(SQUARE_SHAPES[0], ""),
    Combination(SQUARE_SHAPES[2], "sinks causal alibi", soft_cap=0.7),
    Combination(RECTANGULAR_SHAPES[0], "mask bias causal shaw", scale=0.3),
    Combination(RECTANGULAR_SHAPES[1], "mask bias window sinks shaw", soft_cap=2.0),
    Combination(RECTANGULAR_SHAPES[2], "mask bias window alibi", soft_cap=0.7, scale=1.5),
    Combination(AttentionShape((1, 3), 5, 1, 2, 1, 7, 1), "bias causal sinks shaw window", scale=-0.8),
    Combination(SQUARE_SHAPES[3], "mask causal sinks alibi", scale=0.3),
]


class Options(NamedTuple):
    """The arrays of a combination, all numbers distinct; of None those that are not given."""

    allowed: np.ndarray  # [*B, N, T, S]
    offset: np.ndarray  # [*B]
    real: np.ndarray | None = None  # [*B, S]
    prefix: np.ndarray | None = None  # [*B]
    cells: np.ndarray | None = None  # [*B, N, T, S]
    bias: np.ndarray | None = None  # [*B, N, T, S]
    sinks: np.ndarray | None = None  # [N]
    key_rows: np.ndarray | None = None  # [5, H]
    value_rows: np.ndarray | None = None  # [5, Hv]


def options(combination: Combination, seed: int, dtype) -> Options:
    """Row 0 of the mask, where there is one, is all False: its queries are dead."""
    shape, names, rng = combination.shape, combination.names.split(), np.random.default_rng([seed, 4])
    full, given, rules = (*shape.batch, shape.N, shape.T, shape.S), {}, {}
    offset = np.zeros(shape.batch, "int32") if shape.T == shape.S else rng.integers(-1, shape.S, shape.batch, "int32")
    if "mask" in names:
        given["real"] = rng.random((*shape.batch, shape.S)) < 0.8
        given["prefix"] = np.asarray(rng.integers(0, shape.S + 1, shape.batch, "int32"))
        given["cells"] = rng.random(full) < 0.7
        given["cells"][..., 0, :] = False
        in_prefix = np.arange(shape.S) < given["prefix"][..., None, None, None]
        rules["mask"] = given["real"][..., None, None, :] & (in_prefix | given["cells"])
    if "bias" in names:
        blocked = rng.random(full) < 0.2
        given["bias"] = rules["bias"] = np.where(blocked, -np.inf, rng.standard_normal(full)).astype(dtype)
    if "sinks" in names:
        given["sinks"] = rng.standard_normal(shape.N).astype(dtype)
    if "shaw" in names:
        given["key_rows"] = rng.standard_normal((5, shape.H)).astype(dtype)
        given["value_rows"] = rng.standard_normal((5, shape.Hv)).astype(dtype)
    if "causal" in names:
        rules["causal"] = True
    if "window" in names:
        rules["window"] = (2, 1)
    return Options(allowed_cells(shape, {**rules, "q_offset": offset}), np.asarray(offset), **given)
