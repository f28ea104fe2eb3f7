"""Bad input to attention: each error says the rule, what came and the remedy."""

import jax.numpy as jnp
import numpy as np
import pytest

from core.attention import (
    allowed_keys,
    attention_weights,
    attention_with_weights,
    dot_product_attention,
    split_heads,
    weighted_values,
)
from core.blockwise import blockwise_attention
from core.masks import Causal, Padding, Prefix, Segments, Window
from core.relative import ALiBi
from core.step_attention import step_attention
from tests.strategies import AttentionShape, qkv
from tests.test_attention import gaussian


def small(**changes):
    """Arguments of one small attention, B=2, T=S=3, N=4, K=2, H=2, some replaced."""
    q, k, v = map(jnp.asarray, qkv(AttentionShape((2,), 3, 3, 4, 2, 2, 2), 0))
    return {"q": q, "k": k, "v": v} | changes


BAD = {
    "float mask": ({"mask": jnp.zeros((2, 4, 3, 3))}, TypeError, "mask must be bool.*float32.*bias="),
    "0/1 mask": ({"mask": jnp.ones((2, 1, 1, 3), jnp.int32)}, TypeError, r"int32.*astype\(bool\)"),
    "bool bias": ({"bias": jnp.ones((2, 1, 1, 3), bool)}, TypeError, "bias must be floating.*bool.*mask="),
    "[T, S] bias": ({"bias": jnp.zeros((3, 3))}, ValueError, r"bias must broadcast.*\(2, 4, 3, 3\).*\(3, 3\)"),
    "mask of other keys": ({"mask": jnp.ones((2, 1, 3, 4), bool)}, ValueError, r"\(2, 1, 3, 4\)"),
    "mask of 2 of 4 heads": ({"mask": jnp.ones((2, 2, 3, 3), bool)}, ValueError, r"\(2, 2, 3, 3\)"),
    "head widths": ({"k": jnp.ones((2, 3, 2, 5))}, ValueError, r"agree in \*B and H.*\(2, 3, 4, 2\).*\(2, 3, 2, 5\)"),
    "batches": ({"k": jnp.ones((1, 3, 2, 2))}, ValueError, r"agree in \*B and H.*\(1, 3, 2, 2\)"),
    "keys of two axes": (
        {"q": jnp.ones((3, 4, 2)), "k": jnp.ones((3, 2)), "v": jnp.ones((3, 2, 2))},
        ValueError,
        r"agree in \*B and H.*\(3, 2\)",
    ),
    "ranks": ({"k": jnp.ones((3, 2, 2))}, ValueError, r"agree in \*B and H.*\(3, 2, 2\)"),
    "lengths of k and v": ({"v": jnp.ones((2, 4, 2, 2))}, ValueError, r"k and v must agree.*\(2, 4, 2, 2\)"),
    "heads of k and v": ({"v": jnp.ones((2, 3, 1, 2))}, ValueError, r"k and v must agree.*\(2, 3, 1, 2\)"),
    "heads": ({"k": jnp.ones((2, 3, 3, 2)), "v": jnp.ones((2, 3, 3, 2))}, ValueError, "multiple.*N=4, K=3"),
    "more key heads": ({"k": jnp.ones((2, 3, 8, 2)), "v": jnp.ones((2, 3, 8, 2))}, ValueError, "N=4, K=8"),
    "no key heads": ({"k": jnp.ones((2, 3, 0, 2)), "v": jnp.ones((2, 3, 0, 2))}, ValueError, "N=4, K=0"),
    "no width": ({"q": jnp.ones((2, 3, 4, 0)), "k": jnp.ones((2, 3, 2, 0))}, ValueError, "H at least 1.*H=0"),
    "integer q": ({"q": jnp.ones((2, 3, 4, 2), jnp.int32)}, TypeError, "floating.*int32"),
    "integer k": ({"k": jnp.ones((2, 3, 2, 2), jnp.int32)}, TypeError, "floating.*int32"),
    "integer q, k": (
        {"q": jnp.ones((2, 3, 4, 2), jnp.int8), "k": jnp.ones((2, 3, 2, 2), jnp.int8)},
        TypeError,
        "floating.*int8",
    ),
    "integer v": ({"v": jnp.ones((2, 3, 2, 2), jnp.int32)}, TypeError, "v must be floating.*int32"),
    "mixed": ({"k": jnp.ones((2, 3, 2, 2), jnp.bfloat16)}, TypeError, "one floating dtype.*float32.*bfloat16.*cast"),
    "mask of one key of three": ({"mask": jnp.ones((2, 1, 3, 2), bool)}, ValueError, r"\(2, 4, 3, 3\).*\(2, 1, 3, 2\)"),
    "a mask that is no array": ({"mask": [[True]]}, TypeError, r"mask must be one of core.masks.*got \[\[True\]\]"),
    "a mask that is True": ({"mask": True}, TypeError, "mask must be one of core.masks or a bool array, got True"),
    "padding of other rows": (
        {"mask": Causal() & Padding(jnp.ones((3, 3), bool))},
        ValueError,
        r"padding mask must have \[\*B, S\], here \(2, 3\), got \(3, 3\)",
    ),
    "segments of other rows": (
        {"mask": Segments(jnp.ones((3, 3), jnp.int32))},
        ValueError,
        r"segment ids of queries must have \[\*B, T\], here \(2, 3\), got \(3, 3\)",
    ),
    "prefix of other rows": (
        {"mask": Prefix(jnp.ones(3, jnp.int32))},
        ValueError,
        r"batch shape \(2,\), got int32 \(3,\)",
    ),
    "integer bias": ({"bias": jnp.ones((2, 1, 1, 3), jnp.int32)}, TypeError, "bias must be floating.*int32"),
    "soft cap 0": ({"soft_cap": 0.0}, ValueError, "soft_cap must be a finite number above 0, or None.*got 0.0"),
    "soft cap < 0": ({"soft_cap": -2.0}, ValueError, "soft_cap must be .*got -2.0"),
    "soft cap NaN": ({"soft_cap": float("nan")}, ValueError, "soft_cap must be .*got nan"),
    "soft cap without end": ({"soft_cap": float("inf")}, ValueError, "soft_cap must be .*got inf"),
    "soft cap an array": ({"soft_cap": jnp.ones(())}, ValueError, "soft_cap must be a finite number above 0, or None"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale must be a finite number, or None for .*got nan"),
    "scale without end": ({"scale": float("-inf")}, ValueError, "scale must be a finite number.*got -inf"),
    "scale by feature": (
        {"scale": jnp.ones(2)},
        ValueError,
        r"scale must be a finite number.*got \[1. 1.\]; scale q by",
    ),
    "causal no": ({"causal": "no"}, TypeError, "causal must be True or False, got 'no'"),
    "relative by name": ({"relative": "alibi"}, TypeError, r"relative must be one of core.relative.*got 'alibi'"),
    "relative as a class": ({"relative": ALiBi}, TypeError, r"relative must be one of .* such as ALiBi\(\).*<class"),
    "bias a list": ({"bias": [[0.0]]}, TypeError, r"bias must be an array or None, got \[\[0.0\]\]"),
    "sinks a number": ({"sinks": 0.0}, TypeError, "sinks must be an array or None, got 0.0"),
    "sinks of key heads": ({"sinks": jnp.ones(2)}, ValueError, r"one logit for each of N=4 heads, got float32 \(2,\)"),
    "sinks by row": ({"sinks": jnp.ones((2, 4))}, ValueError, r"one logit for each of N=4 heads.*\(2, 4\)"),
    "one sink": ({"sinks": jnp.ones(())}, ValueError, r"one logit for each of N=4 heads.*float32 \(\)"),
    "integer sinks": (
        {"sinks": jnp.ones(4, jnp.int32)},
        ValueError,
        r"one logit for each of N=4 heads, got int32 \(4,\)",
    ),
    "no heads' axis": (
        {"q": jnp.ones((3, 2)), "k": jnp.ones((3, 2))},
        ValueError,
        r"q \[\*B, T, N, H\].*got q \(3, 2\)",
    ),
    "float16 k": ({"k": jnp.ones((2, 3, 2, 2), jnp.float16)}, TypeError, "one floating dtype.*float32.*float16.*cast"),
    "window int": ({"window": 3}, ValueError, r"window must be \(left, right\).*got 3.*window=\(w - 1, 0\)"),
    "window < 0": ({"window": (-1, 0)}, ValueError, r"window must be.*got \(-1, 0\)"),
    "window of 3": ({"window": (1, 0, 0)}, ValueError, r"window must be.*\(1, 0, 0\)"),
    "float window": ({"window": (1.5, 0)}, ValueError, r"window must be.*\(1.5, 0\)"),
    "offset shape": ({"causal": True, "q_offset": jnp.zeros(3, jnp.int32)}, ValueError, r"q_offset.*\(2,\).*\(3,\)"),
    "float offset": ({"causal": True, "q_offset": 1.5}, TypeError, "q_offset must be .*integer"),
    "float offsets": ({"causal": True, "q_offset": jnp.array([0.5, 1.5])}, TypeError, "q_offset must be .*integer"),
    "implementation": ({"implementation": "fast"}, ValueError, "implementation must be None or one of.*'fast'"),
    "dropout 1": ({"dropout_rate": 1.0}, ValueError, "dropout rate must be at least 0 and below 1, got 1.0"),
    "dropout -1": ({"dropout_rate": -1.0}, ValueError, "at least 0.*got -1.0"),
    "dropout NaN": ({"dropout_rate": float("nan")}, ValueError, "at least 0.*got nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_rule_and_remedy(name, untyped):
    changes, error, message = BAD[name]
    for rule in ({}, {"mask": Causal()}):  # an attention that hides something goes another way
        with pytest.raises(error, match=message):
            dot_product_attention(**small(**rule | changes))


@pytest.mark.parametrize("name", BAD)
def test_every_way_to_ask_refuses_the_same(name, untyped):
    """By blocks; with weights; the weights alone, where v and dropout are not at fault; the cells, where those are."""
    changes, error, message = BAD[name]
    rules = small(**changes)
    q, k, v = (rules.pop(name) for name in "qkv")
    blockwise = {"implementation": "blockwise"} | rules
    calls = [lambda: attention_with_weights(q, k, v, **rules), lambda: dot_product_attention(q, k, v, **blockwise)]
    if "implementation" not in changes:
        calls.append(lambda: blockwise_attention(q, k, v, **rules))
    if not {"v", "dropout_rate", "implementation"} & changes.keys():
        calls.append(lambda: attention_weights(q, k, **rules))
    if changes.keys() <= {"mask", "bias", "window", "causal", "q_offset"}:
        calls.append(lambda: allowed_keys(q, k, **rules))
    for call in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    "attend", [attention_with_weights, attention_weights, allowed_keys, blockwise_attention, step_attention]
)
@pytest.mark.parametrize("wrong", [{"casual": True}, {"windows": (0, 0), "causal": True}, {"msk": None}])
def test_a_rule_that_there_is_not_is_never_ignored(attend, wrong, untyped):
    rules = small(**wrong)
    q, k, v = (rules.pop(name) for name in "qkv")
    values = () if attend in (attention_weights, allowed_keys) else (v,)
    with pytest.raises(
        TypeError, match=f"attention has no rule {min(wrong.keys() - {'causal'})}; the rules are mask, "
    ):
        attend(q, k, *values, **rules)


@pytest.mark.parametrize("wrong", [(3, 3), (3,), (1, 3, 3), (1, 3, 1, 3, 3), (1, 1, 1, 1, 3)])
def test_a_mask_of_another_rank_is_refused_even_where_all_sizes_are_equal(wrong, untyped):
    """[B, S] with B = T = S = N would broadcast without a word."""
    q = k = v = jnp.asarray(gaussian((3, 3, 3, 2)))
    with pytest.raises(ValueError, match=r"mask must broadcast to the logits.*got \(.*Padding"):
        dot_product_attention(q, k, v, mask=jnp.ones(wrong, bool))


@pytest.mark.parametrize(
    "rules", [{"causal": True}, {"window": (1, 0)}, {"mask": ~Causal()}, {"mask": Window(1, 0) | Prefix(1)}]
)
@pytest.mark.parametrize(("queries", "keys"), [(2, 5), (5, 2), (1, 3)])
def test_causal_with_other_lengths_needs_an_offset_and_names_both(queries, keys, rules, untyped):
    T, S = queries, keys
    q, k, v = map(jnp.asarray, qkv(AttentionShape((2,), T, S, 2, 2, 2, 2), 0))
    with pytest.raises(ValueError, match=rf"T={T} queries meet S={S} keys: 0 aligns .*S - T = {S - T} the last"):
        dot_product_attention(q, k, v, **rules)


@pytest.mark.parametrize("heads", [4, 0, -1])
def test_heads_that_do_not_divide_the_width_are_refused(heads, untyped):
    with pytest.raises(ValueError, match=f"the width D must be a multiple of num_heads, got D=10, num_heads={heads}"):
        split_heads(jnp.asarray(gaussian((2, 3, 10))), heads)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 4, 2, 2), (2, 3, 3, 2), (3, 2, 2), (2, 3, 4, 4, 2)])
def test_values_that_do_not_go_with_their_weights_are_refused(shape, untyped):
    rule = r"weights \[\*B, N, T, S\] and v \[\*B, S, K, Hv\] must agree in \*B and S, N a multiple of K"
    with pytest.raises(ValueError, match=rf"{rule}, got weights \(2, 4, 3, 3\), v \({shape[0]}, "):
        weighted_values(jnp.ones((2, 4, 3, 3)), jnp.ones(shape))


def test_what_numpy_made_is_taken_too(untyped):
    given = small(bias=jnp.asarray(gaussian((2, 4, 3, 3))), sinks=jnp.asarray(gaussian(4)), causal=True)
    of_numpy = {name: np.bool_(x) if name == "causal" else np.asarray(x) for name, x in given.items()}
    np.testing.assert_array_equal(dot_product_attention(**of_numpy), dot_product_attention(**given))
