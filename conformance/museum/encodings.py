"""Bugs of positional encodings."""

import math
from typing import Any

import ml_dtypes
import numpy as np

from conformance import oracle
from conformance.adapters import Buckets, RelativeShift, Rotary, Sinusoid, Slopes
from conformance.museum.exhibit import REVIEW, Exhibit


def rotary_in_16_bit(x, *, positions, theta):
    low = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    places = positions.astype(ml_dtypes.bfloat16).astype(np.float32)
    return oracle.rotary(low if x.dtype != np.float32 else x, places, theta).astype(x.dtype)


def rotary_layout_ignored(x, *, positions, theta):
    """Halves are split, and neighbours are joined."""
    turned = oracle.rotary(x, positions, theta)
    return np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(x.shape).astype(x.dtype)


def rotary_clamps(x, *, positions, theta):
    return oracle.rotary(x, np.minimum(positions, 512), theta).astype(x.dtype)


def rotary_of_the_first_row(x, *, positions, theta):
    return oracle.rotary(x, np.broadcast_to(positions[:1], positions.shape), theta).astype(x.dtype)


def odd_width_crashes(*, length, d_model):
    table = np.zeros((length, d_model), np.float32)
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, d_model, 2) / d_model)
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)
    return table


def buckets_by_logarithm(distances, *, bidirectional, num_buckets, max_distance, dtype: Any = np.float32, flip=False):
    """T5 as it is usually written."""
    first, n = 0, distances if flip else -distances
    if bidirectional:
        num_buckets //= 2
        first, n = np.where(n < 0, num_buckets, 0), np.abs(n)
    n, exact = np.maximum(n, 0), num_buckets // 2
    ratio = (np.log(np.maximum(n, 1).astype(dtype) / dtype(exact)) / dtype(math.log(max_distance / exact))).astype(
        dtype
    )
    large = exact + (ratio * dtype(num_buckets - exact)).astype(np.int32)
    return first + np.where(n < exact, n, np.minimum(large, num_buckets - 1))


def buckets_wrong_side(distances, **options):
    return buckets_by_logarithm(distances, **options, flip=True)


def buckets_in_16_bit(distances, **options):
    return buckets_by_logarithm(distances, **options, dtype=ml_dtypes.bfloat16)


def slopes_of_powers_only(*, num_heads):
    return 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)


def slopes_off_by_one(*, num_heads):
    return 2.0 * oracle.slopes(num_heads)


def slopes_in_16_bit(*, num_heads):
    return oracle.slopes(num_heads).astype(np.float16)


def shift_leaks(x):
    """Pad, reshape, cut: right for T = S, but a row that is too long runs into the next."""
    *batch, queries, columns = x.shape
    keys = columns - queries + 1
    padded = np.concatenate([np.zeros((*batch, queries, 1), x.dtype), x[..., -keys:]], axis=-1)
    flat = padded.reshape(*batch, -1)[..., queries:]
    return flat.reshape(*batch, -1)[..., : queries * keys].reshape(*batch, queries, keys)


def shift_wrong_slice(x):
    keys = x.shape[-1] - x.shape[-2] + 1
    return np.concatenate([oracle.relative_shift(x)[..., 1:], x[..., -1:]], axis=-1) if keys > 1 else x[..., :keys]


def shift_ignores_memory(x):
    """Offsets by S - 1 where T - 1 is due."""
    queries = x.shape[-2]
    keys = x.shape[-1] - queries + 1
    index = np.clip(keys - 1 - np.arange(queries)[:, None] + np.arange(keys), 0, x.shape[-1] - 1)
    return np.take_along_axis(x, np.broadcast_to(index, (*x.shape[:-2], queries, keys)), axis=-1)


CAN_TURN = {"bfloat16", "positions"}
BOTH_WAYS = "every_distance_has_its_bucket_in_both_directions"
EXHIBITS = (
    Exhibit(
        22,
        "rotary angles in 16 bit",
        "gpt-neox#1003, transformers#29285",
        Rotary("angles in 16 bit", rotary_in_16_bit, CAN_TURN),
        ("the_angles_of_four_thousand_positions_are_exact",),
    ),
    Exhibit(
        23,
        "rotary layout ignored",
        "vllm-ascend#12820",
        Rotary("layout ignored", rotary_layout_ignored, CAN_TURN),
        ("pair_i_is_made_of_elements_i_and_i_plus_half",),
    ),
    Exhibit(
        24,
        "rotary offset beyond the table",
        "equinox PR#799",
        Rotary("clamped", rotary_clamps, CAN_TURN),
        ("the_angles_of_a_million_positions_are_exact", "products_depend_on_the_distance_alone"),
    ),
    Exhibit(
        24,
        "every row is turned by the first row's positions",
        REVIEW,
        Rotary("first row", rotary_of_the_first_row, CAN_TURN),
        ("every_token_turns_by_its_own_position",),
    ),
    Exhibit(
        25,
        "an odd d_model crashes",
        "BERT-pytorch#78",
        Sinusoid("odd crash", odd_width_crashes, {"odd width"}),
        ("an_odd_width_is_the_next_even_table_without_its_last_column",),
    ),
    Exhibit(
        26, "T5 buckets of the wrong side", "transformers#8518", Buckets("wrong side", buckets_wrong_side), (BOTH_WAYS,)
    ),
    Exhibit(
        26,
        "T5 buckets by a 16 bit logarithm",
        "candle#899",
        Buckets("16 bit logarithm", buckets_in_16_bit),
        (BOTH_WAYS,),
    ),
    Exhibit(
        27,
        "relative shift leaks rows",
        "espnet#2684",
        RelativeShift("leaks rows", shift_leaks, {"leading axes"}),
        ("row_i_moves_left_by_t_minus_one_minus_i",),
    ),
    Exhibit(
        27,
        "relative shift takes the wrong slice",
        "labml#185",
        RelativeShift("wrong slice", shift_wrong_slice, {"leading axes"}),
        ("row_i_moves_left_by_t_minus_one_minus_i",),
    ),
    Exhibit(
        27,
        "relative shift ignores the memory",
        "x-transformers#103",
        RelativeShift("memory ignored", shift_ignores_memory, {"leading axes"}),
        ("row_i_moves_left_by_t_minus_one_minus_i",),
    ),
    Exhibit(
        28,
        "ALiBi for powers of two only",
        "mlx#343",
        Slopes("powers only", slopes_of_powers_only),
        ("other_numbers_of_heads_interleave_the_next_power",),
    ),
    Exhibit(
        28,
        "ALiBi exponent off by one",
        "transformers#28380",
        Slopes("off by one", slopes_off_by_one),
        ("the_slopes_of_a_power_of_two_are_powers_of_two",),
    ),
    Exhibit(
        28,
        "ALiBi slopes in 16 bit",
        "flash-attention#845",
        Slopes("16 bit", slopes_in_16_bit),
        ("the_slopes_of_a_power_of_two_are_powers_of_two",),
    ),
)
