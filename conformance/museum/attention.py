"""Bugs of attention and masks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from conformance.adapters import Attention, lenient
from conformance.museum.exhibit import REVIEW, Exhibit
from conformance.museum.jax_right import JaxAttention
from conformance.museum.right import CAN, NumpyAttention


class DeadRowNaN(NumpyAttention):
    def softmax(self, logits, allowed, sinks, dtype, training):
        weights = super().softmax(logits, allowed, sinks, dtype, training)
        total = weights.sum(axis=-1, keepdims=True)
        return weights if sinks is not None else weights * (total / total)


class HiddenNaNLeaks(NumpyAttention):
    def mix(self, weights, v, allowed):
        return np.einsum("...nts,...snh->...tnh", weights, np.asarray(v, np.float64))


class FillOverflowsInFloat16(NumpyAttention):
    def softmax(self, logits, allowed, sinks, dtype, training):
        fill = np.asarray(np.asarray(-1e10).astype(dtype), np.float64)
        logits = logits + np.where(allowed, 0.0, 1.0) * fill
        return super().softmax(logits, np.ones_like(allowed), sinks, dtype, training) * allowed


class Float64FillInFloat32(NumpyAttention):
    def softmax(self, logits, allowed, sinks, dtype, training):
        logits = np.where(allowed, logits, np.finfo(np.float64).min.astype(np.float32))
        highest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
        if sinks is not None:
            return super().softmax(logits, allowed, sinks, dtype, training)
        exponentials = np.exp(logits - highest)
        return exponentials / exponentials.sum(axis=-1, keepdims=True)


class TopLeft(NumpyAttention):
    def ahead(self, shape, q_offset):
        return super().ahead(shape, 0 if q_offset is None else q_offset)


class BottomRight(NumpyAttention):
    def ahead(self, shape, q_offset):
        return super().ahead(shape, shape[-1] - shape[-2] if q_offset is None else q_offset)


class CausalLostInTraining(NumpyAttention):
    def allowed(self, shape, *, causal, training, **rules):
        return super().allowed(shape, causal=causal and not training, training=training, **rules)


class WindowLostWithoutMask(NumpyAttention):
    def allowed(self, shape, *, mask, window, **rules):
        return super().allowed(shape, mask=mask, window=None if mask is None else window, **rules)


class WindowOneTooShort(NumpyAttention):
    def in_sight(self, ahead, causal, window):
        return super().in_sight(ahead, causal, None if window is None else (window[0] - 1, window[1]))


class LengthsOfTheFirstRow(NumpyAttention):
    def allowed(self, shape, *, mask, **rules):
        return super().allowed(shape, mask=None if mask is None else mask[:1], **rules)


class BroadcastMaskForHeadZero(NumpyAttention):
    def allowed(self, shape, *, mask, **rules):
        if mask is not None and mask.shape[-3] == 1:
            mask = np.broadcast_to(mask, shape).copy()
            mask[..., 1:, :, :] = True
        return super().allowed(shape, mask=mask, **rules)


class MaskOnTheQueryAxis(NumpyAttention):
    def allowed(self, shape, *, mask, **rules):
        if mask is not None and mask.shape[-2] == 1 and shape[-1] == shape[-2]:
            mask = mask.swapaxes(-1, -2)
        return super().allowed(shape, mask=mask, **rules)


class MaskAfterSoftmax(NumpyAttention):
    def softmax(self, logits, allowed, sinks, dtype, training):
        return super().softmax(logits, np.ones_like(allowed), sinks, dtype, training) * allowed


class FloatMaskAsBool(NumpyAttention):
    def check_mask(self, mask, shape):
        pass

    def allowed(self, shape, *, mask, **rules):
        return super().allowed(shape, mask=None if mask is None else mask.astype(bool), **rules)


class TrainingHasAnotherFill(NumpyAttention):
    def softmax(self, logits, allowed, sinks, dtype, training):
        if training:
            return super().softmax(np.where(allowed, logits, -1e9), np.ones_like(allowed), sinks, dtype, training)
        return super().softmax(logits, allowed, sinks, dtype, training)

    def mix(self, weights, v, allowed):
        return super().mix(weights, v, np.ones_like(allowed))


class RateUnchecked(NumpyAttention):
    def check_rate(self, rate):
        pass


class NeverDropped(NumpyAttention):
    def dropped(self, weights, rate, seed):
        return weights


class DroppedInEvaluation(NumpyAttention):
    def __call__(self, *arrays, dropout_rate=0.0, dropout_seed=None, **options):
        seed = 0 if dropout_seed is None else dropout_seed
        return super().__call__(*arrays, dropout_rate=dropout_rate, dropout_seed=seed, **options)


class OffForGood(NumpyAttention):
    evaluated = False

    def __call__(self, *arrays, dropout_rate=0.0, dropout_seed=None, **options):
        self.evaluated = self.evaluated or dropout_seed is None
        if self.evaluated:
            dropout_seed = None
        return super().__call__(*arrays, dropout_rate=dropout_rate, dropout_seed=dropout_seed, **options)


class TiledHeads(NumpyAttention):
    def for_each_head(self, x, heads):
        return np.concatenate([x] * (heads // x.shape[-2]), axis=-2)


class PaddingCounts(NumpyAttention):
    def softmax(self, logits, allowed, sinks, dtype, training):
        return super().softmax(np.where(allowed, logits, 0.0), np.ones_like(allowed), sinks, dtype, training)

    def mix(self, weights, v, allowed):
        return super().mix(weights * allowed, v, allowed)


class ProductsIn16Bit(NumpyAttention):
    def logits(self, q, k, scale, soft_cap):
        if q.dtype == np.float32:
            q, k = (x.astype(ml_dtypes.bfloat16) for x in (q, k))
        return super().logits(q, k, scale, soft_cap)


class WindowSidesSwapped(NumpyAttention):
    def in_sight(self, ahead, causal, window):
        return super().in_sight(ahead, causal, None if window is None else window[::-1])


class WindowIgnoresTheOffset(NumpyAttention):
    def allowed(self, shape, *, causal, window, q_offset, **rules):
        allowed = super().allowed(shape, causal=causal, window=None, q_offset=q_offset, **rules)
        return allowed if window is None else allowed & self.in_sight(self.ahead(shape, 0), False, window)


class OffsetLostWithMask(NumpyAttention):
    def allowed(self, shape, *, mask, q_offset, **rules):
        if mask is not None and q_offset is not None:
            q_offset = np.zeros_like(q_offset)
        return super().allowed(shape, mask=mask, q_offset=q_offset, **rules)


class SinksLostWithMask(NumpyAttention):
    def __call__(self, *arrays, mask=None, sinks=None, **options):
        return super().__call__(*arrays, mask=mask, sinks=sinks if mask is None else None, **options)


class SoftCapLostWithCausal(NumpyAttention):
    def __call__(self, *arrays, causal=False, soft_cap=None, **options):
        return super().__call__(*arrays, causal=causal, soft_cap=None if causal else soft_cap, **options)


class OptionsLostInTraining(NumpyAttention):
    def __call__(self, *arrays, scale=None, soft_cap=None, sinks=None, dropout_seed=None, **options):
        if dropout_seed is not None:
            scale = soft_cap = sinks = None
        more = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks, "dropout_seed": dropout_seed}
        return super().__call__(*arrays, **more, **options)


class NaNReplacedAfterwards(JaxAttention):
    def softmax(self, logits, allowed, sinks):
        if sinks is not None:
            return super().softmax(logits, allowed, sinks)
        weights = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf))
        return jnp.where(allowed.any(axis=-1, keepdims=True), weights, 0)


class HiddenKeysInTheGradient(JaxAttention):
    keys_are_hidden = False


def exhibit(number: int, wrong: type[NumpyAttention], defect: str, source: str, *laws: str) -> Exhibit:
    """An exhibit under the number of the museum's list."""
    return Exhibit(number, defect, source, Attention(defect, wrong(), CAN), laws)


def jax_exhibit(number: int, wrong: type[JaxAttention], defect: str, source: str, *laws: str) -> Exhibit:
    """The same of a function that JAX may trace, for what only gradients show."""
    return Exhibit(number, defect, source, Attention(defect, wrong(), Attention.flags.keys(), lenient), laws)


EXHIBITS = (
    exhibit(
        1,
        DeadRowNaN,
        "a row without keys is NaN",
        "equinox#274, pytorch#41508",
        "a_query_with_nothing_to_see_gives_zero",
    ),
    jax_exhibit(
        1,
        NaNReplacedAfterwards,
        "a row without keys is NaN, replaced afterwards",
        REVIEW,
        "no_nan_is_made_on_the_way",
    ),
    exhibit(
        2, HiddenNaNLeaks, "NaN behind the mask leaks", "pytorch#101967", "a_value_that_no_query_sees_may_hold_anything"
    ),
    jax_exhibit(
        2,
        HiddenKeysInTheGradient,
        "NaN behind the mask leaks into gradients",
        REVIEW,
        "nan_behind_the_mask_leaves_gradients_finite",
    ),
    exhibit(
        3,
        FillOverflowsInFloat16,
        "a fill of -1e10 overflows in float16",
        "flax#982, flax#1527",
        "a_mask_in_float16_needs_no_number_that_overflows",
    ),
    exhibit(
        4, Float64FillInFloat32, "a float64 fill cast to float32", "jax#37422", "a_query_with_nothing_to_see_gives_zero"
    ),
    exhibit(
        5,
        TopLeft,
        "causal is top left where T != S, unsaid",
        "pytorch#108108",
        "causal_with_other_lengths_must_be_told_where_the_queries_stand",
    ),
    exhibit(
        5,
        BottomRight,
        "causal is bottom right where T != S, unsaid",
        "flash-attention#436",
        "causal_with_other_lengths_must_be_told_where_the_queries_stand",
    ),
    exhibit(
        7,
        CausalLostInTraining,
        "causal is lost with dropout on",
        "keras#23038",
        "the_future_does_not_change_the_past_with_dropout_on",
        "the_path_of_training_computes_what_that_of_evaluation_does",
    ),
    exhibit(7, OffsetLostWithMask, "the offset is lost beside a mask", REVIEW, "options_hold_together"),
    exhibit(7, SinksLostWithMask, "sinks are lost beside a mask", REVIEW, "options_hold_together"),
    exhibit(7, SoftCapLostWithCausal, "the soft cap is lost beside causal", REVIEW, "options_hold_together"),
    exhibit(
        7,
        OptionsLostInTraining,
        "scale, soft cap and sinks are lost with dropout on",
        REVIEW,
        "the_path_of_training_computes_what_that_of_evaluation_does",
    ),
    exhibit(
        9,
        WindowLostWithoutMask,
        "the window is lost without a mask",
        "jax#32300",
        "a_window_counts_keys_before_and_after_the_own_position",
    ),
    exhibit(
        10,
        WindowOneTooShort,
        "the window is off by one",
        "transformers#39408",
        "a_window_counts_keys_before_and_after_the_own_position",
        "a_window_of_nothing_but_itself_gives_the_own_value",
    ),
    exhibit(
        10,
        WindowSidesSwapped,
        "the window's sides are swapped",
        REVIEW,
        "a_window_counts_keys_before_and_after_the_own_position",
    ),
    exhibit(
        10,
        WindowIgnoresTheOffset,
        "the window ignores the offset",
        REVIEW,
        "an_offset_places_the_windows_of_the_queries_too",
    ),
    exhibit(
        11,
        LengthsOfTheFirstRow,
        "every row has the first row's length",
        "jax#23349",
        "a_mask_axis_of_one_holds_for_all",
    ),
    exhibit(
        12,
        BroadcastMaskForHeadZero,
        "a broadcast mask reaches head 0 only",
        "burn#4778, jax#28974",
        "a_mask_axis_of_one_holds_for_all",
    ),
    exhibit(
        13,
        MaskOnTheQueryAxis,
        "the padding mask on the query axis",
        "hyunwoongko/transformer#40",
        "a_mask_axis_of_one_holds_for_all",
    ),
    exhibit(
        14,
        MaskAfterSoftmax,
        "the mask after the softmax",
        "pytorch-image-models#2236",
        "the_weights_of_a_row_sum_to_one",
    ),
    exhibit(15, FloatMaskAsBool, "a float mask is read as bool", "pytorch#107084", "a_float_mask_is_refused"),
    exhibit(
        16,
        TrainingHasAnotherFill,
        "training and evaluation treat padding differently",
        "pytorch#86120",
        "the_path_of_training_treats_dead_rows_like_that_of_evaluation",
    ),
    exhibit(
        17, RateUnchecked, "the dropout rate is not checked", "flax#5497", "a_rate_outside_of_zero_to_one_is_refused"
    ),
    exhibit(
        18,
        NeverDropped,
        "attention dropout is never applied",
        "transformers#28059",
        "dropout_is_applied_to_its_share_of_the_weights",
    ),
    exhibit(
        18,
        DroppedInEvaluation,
        "attention dropout is applied in evaluation",
        "equinox#287",
        "without_a_seed_there_is_no_dropout",
    ),
    exhibit(
        19,
        OffForGood,
        "evaluation switches dropout off for good",
        "Megatron-LM#411, lerobot#3668",
        "evaluation_does_not_switch_dropout_off_for_good",
    ),
    exhibit(
        21,
        TiledHeads,
        "key heads are tiled, not repeated",
        "onnx#7274, jax-js#180",
        "query_head_n_reads_key_head_n_div_group",
    ),
    exhibit(
        36, PaddingCounts, "padding enters the total", "transformers#17463", "padded_keys_behind_a_mask_change_nothing"
    ),
    exhibit(
        46,
        ProductsIn16Bit,
        "products in 16 bit on one backend, unsaid",
        "jax#35916",
        "the_output_is_the_softmax_weighted_mean_of_the_values",
    ),
)
