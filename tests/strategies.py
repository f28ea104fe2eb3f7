"""What the laws draw: small shapes in buckets, so that JAX compiles little, and bulk data by a seed."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from core.config import TransformerConfig

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
    """A small configuration; the first choice of each field is the simplest."""
    heads = draw(st.sampled_from([1, 2, 4]))
    width = draw(st.sampled_from([2, 4, 6])) * heads
    fields = {
        "source_vocab_size": 11,
        "target_vocab_size": 13,
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([None, 1, max(1, heads // 2)])),
        "d_ff": draw(st.sampled_from([5, 16])),
        "num_encoder_layers": draw(st.integers(0, 2)),
        "num_decoder_layers": draw(st.integers(0, 2)),
        "max_length": 12,
        "dropout_rate": draw(st.sampled_from([0.0, 0.25])),
        "attention_dropout_rate": draw(st.sampled_from([0.0, 0.25])),
        "activation": draw(st.sampled_from(["relu", "gelu", "swiglu"])),
        "norm": draw(st.sampled_from(["layer_norm", "rms_norm"])),
        "norm_order": draw(st.sampled_from(["post", "pre"])),
        "positions": draw(st.sampled_from(["sinusoidal", "learned", "rotary", "none"])),
        "attention_bias": draw(st.booleans()),
        "feed_forward_bias": draw(st.booleans()),
        "tie_embeddings": draw(st.sampled_from(["none", "target", "all"])),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "param_dtype": draw(st.sampled_from(["float32", "bfloat16"])),
    }
    fields |= fixed
    if fields["tie_embeddings"] == "all":
        fields["source_vocab_size"] = fields["target_vocab_size"]
    return TransformerConfig(**fields)


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


@st.composite
def attention_cases(draw, shapes=attention_shapes, rules=RULES) -> AttentionCase:
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
    return AttentionCase(shape, *qkv(shape, seed), given, allowed_cells(shape, given))
