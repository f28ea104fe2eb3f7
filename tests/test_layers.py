"""Laws of the small layers, for any leading axes."""

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from core.config import Activation, TransformerConfig
from core.layers import (
    GATED,
    attend,
    branch_dropout,
    check_tokens,
    dropout,
    dropout_key,
    embed,
    embedding_init,
    feed_forward,
    kernel_init,
    layer_norm,
    linear,
    masked_mean,
    relative_init,
    residual,
    rms_norm,
    site_keys,
    source_vectors,
    stochastic_depth,
    unembed,
    wider_dtype,
    zero_padding,
)
from tests.strategies import seeds

leading = st.sampled_from([(2,), (), (3, 1, 2), (0, 2)])
exactly = functools.partial(np.testing.assert_array_equal, strict=True)


def drawn(seed, *shapes, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def wide(*arrays):
    return [np.asarray(x, "float64") for x in arrays]


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_parameters_may_be_stored_in_another_type_than_that_of_x(dtype, stored):
    """The result has x's type; logits are float32."""
    (x,), (kernel, scale, bias) = drawn(1, (2, 3, 5), dtype=dtype), drawn(2, (5, 5), (5,), (5,), dtype=stored)
    x64, kernel64, scale64, bias64 = wide(x, kernel, scale, bias)
    centred = x64 - x64.mean(-1, keepdims=True)
    for got, wanted, out in (
        (linear(x, kernel, bias), x64 @ kernel64 + bias64, dtype),
        (unembed(x, kernel), x64 @ kernel64, "float32"),
        (layer_norm(x, scale, bias, epsilon=1e-6), centred / x64.std(-1, keepdims=True) * scale64 + bias64, dtype),
        (rms_norm(x, scale, epsilon=1e-6), x64 / np.sqrt((x64**2).mean(-1, keepdims=True)) * scale64, dtype),
    ):
        assert got.dtype == out
        np.testing.assert_allclose(np.asarray(got, "float64"), wanted, rtol=0, atol=0.1)
    exactly(np.asarray(unembed(x, kernel)), np.asarray(unembed(x, kernel.astype(dtype))))


@pytest.mark.parametrize("drop", [dropout, stochastic_depth])
def test_a_rate_of_zero_draws_nothing(drop):
    (x,) = drawn(0, (2, 3))
    assert drop(x, 0.0, key=jax.random.key(0)) is x


def test_the_first_and_the_last_token_are_tokens():
    check_tokens(jnp.asarray([[0, 6]]), 7, "tokens")


def poisoned(batch, length, seed, dtype="float32"):
    """Vectors, which of them are real, and both once more with NaN and infinity at the others."""
    (x,), rng = drawn(seed, (*batch, length, 3), dtype=dtype), np.random.default_rng(seed)
    real = rng.random((*batch, length)) < rng.choice([0.0, 0.5, 1.0], (*batch, 1))
    junk = np.resize([np.nan, np.inf, -np.inf], x.shape).astype(dtype)
    return x, jnp.asarray(real), jnp.where(real[..., None], x, junk)


@given(leading, st.sampled_from([4, 1, 0]), seeds)
def test_the_masked_mean_is_that_of_the_real_positions_whatever_stands_at_others(batch, length, seed):
    x, real, foul = poisoned(batch, length, seed)
    wanted = np.zeros((*batch, 3))
    for row in np.ndindex(batch):
        if np.any(real[row]):
            wanted[row] = np.asarray(x[row], "float64")[np.asarray(real[row])].mean(axis=0)
    got = masked_mean(foul, real)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    exactly(got, masked_mean(x, real))
    exactly(np.asarray(got)[~np.any(real, axis=-1)], np.zeros_like(wanted, "float32")[~np.any(real, axis=-1)])
    exactly(masked_mean(x), masked_mean(x, jnp.ones_like(real)))


@given(leading, seeds)
def test_the_gradient_of_a_masked_mean_is_each_real_positions_share(batch, seed):
    _, real, foul = poisoned(batch, 4, seed)
    gradient = jax.grad(lambda x: (masked_mean(x, real) * jnp.arange(1.0, 4.0).reshape((1,) * len(batch) + (3,))).sum())
    share = np.asarray(real) / np.maximum(np.asarray(real).sum(axis=-1, keepdims=True), 1)
    np.testing.assert_allclose(gradient(foul), share[..., None] * np.arange(1, 4), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_masked_mean_of_sixteen_bits_is_rounded_once(dtype):
    x, real, _ = poisoned((16,), 500, 1, dtype)
    got = masked_mean(x, real)
    exactly(got, masked_mean(x.astype(jnp.float32), real).astype(dtype))
    assert np.any(got)


def test_a_masked_mean_of_float64_stays_float64(x64):
    x, real, _ = poisoned((16,), 4, 2, "float64")
    wanted = (np.asarray(x) * np.asarray(real)[..., None]).sum(-2) / np.maximum(np.asarray(real).sum(-1), 1)[..., None]
    np.testing.assert_allclose(masked_mean(x, real), wanted, rtol=1e-15, atol=1e-16, strict=True)


@given(leading, seeds)
def test_padding_is_zero_and_takes_no_gradient(batch, seed):
    x, real, foul = poisoned(batch, 4, seed)
    wanted = np.where(np.asarray(real)[..., None], x, np.float32(0))
    exactly(np.asarray(zero_padding(foul, real)), wanted)
    assert zero_padding(foul) is foul
    gradient = jax.grad(lambda x: (zero_padding(x, real) * x).sum())(x)
    np.testing.assert_array_equal(gradient, 2 * wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(batch=leading, seed=seeds)
def test_source_vectors_are_read_in_the_models_type_with_zeros_for_padding(batch, seed, dtype):
    x, real, foul = poisoned(batch, 4, seed)
    got = source_vectors(foul, real, features=3, dtype=dtype)
    exactly(np.asarray(got), np.where(np.asarray(real)[..., None], np.asarray(x.astype(dtype)), jnp.zeros((), dtype)))
    exactly(source_vectors(x.astype(jnp.float16), features=3, dtype=dtype), x.astype(jnp.float16).astype(dtype))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            np.zeros((2, 3), "uint8"),
            TypeError,
            "source vectors must be floating, got uint8; scale pixels as in x / 255",
        ),
        (np.zeros((2, 3), "int32"), TypeError, "source vectors must be floating, got int32"),
        (np.zeros((2, 4), "float32"), ValueError, r"P = source_features = 3, got \(2, 4\); reshape them or change the"),
        (np.zeros((2, 1), "float32"), ValueError, r"vectors \[\*B, S, P\] with P = source_features = 3, got \(2, 1\)"),
        (np.zeros(3, "float32"), ValueError, r"source must be vectors .* got \(3,\)"),
        (np.zeros((), "float32"), ValueError, r"source must be vectors .* got \(\)"),
    ],
)
def test_source_vectors_of_another_kind_are_refused(source, error, message, untyped):
    with pytest.raises(error, match=message):
        source_vectors(jnp.asarray(source), features=3, dtype="float32")


def test_initial_parameters_have_the_variance_that_is_said():
    """Within 6 deviations of the estimate, sqrt(2 / n) of it for normal numbers."""
    draw = lambda init, i, o: np.asarray(init(jax.random.key(3), (i, o), jnp.float32), "float64")
    kernel, embedding, relative = draw(kernel_init, 90, 30), draw(embedding_init, 90, 30), draw(relative_init, 90, 30)
    for array, variance in ((kernel, 2 / 120), (embedding, 1 / 30), (relative, 0.02**2)):
        assert abs((array**2).mean() / variance - 1) < 6 * (2 / array.size) ** 0.5
        assert abs(array.mean()) < 6 * (variance / array.size) ** 0.5
    assert np.abs(kernel).max() <= (6 / 120) ** 0.5  # uniform


@given(leading, seeds)
def test_linear_is_a_matrix_and_a_bias(batch, seed):
    x, kernel, bias = drawn(seed, (*batch, 5), (5, 3), (3,))
    x64, kernel64, bias64 = wide(x, kernel, bias)
    np.testing.assert_allclose(linear(x, kernel, bias), x64 @ kernel64 + bias64, atol=1e-5)
    np.testing.assert_allclose(linear(x, kernel), x64 @ kernel64, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(16, 1, 4), (2, 8, 1, 4), (1, 4), (1, 1, 4)])
def test_a_few_single_tokens_read_a_tied_table_as_it_lies(shape, dtype):
    assert "optimization_barrier" in str(jax.make_jaxpr(attend)(jnp.ones(shape, dtype), jnp.ones((7, 4))))


def test_a_table_read_as_it_lies_is_rounded_to_the_vectors_as_the_other_product_rounds_it():
    x, table = drawn(0, (3, 1, 4), (7, 4))
    x = x.astype(jnp.bfloat16)
    np.testing.assert_allclose(attend(x, table), unembed(x, table.T), rtol=1e-6, atol=1e-6)
    assert np.abs(attend(x, table) - x.astype(jnp.float32) @ table.T).max() > 1e-4


@pytest.mark.parametrize("shape", [(17, 1, 4), (3, 6, 1, 4), (3, 2, 4), (2, 4), (4,), (0, 1, 4), (0, 4)])
def test_all_others_read_it_transposed(shape):
    assert "optimization_barrier" not in str(jax.make_jaxpr(attend)(jnp.ones(shape), jnp.ones((7, 4))))


@pytest.mark.parametrize(
    ("a", "b", "wider"),
    [
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("bfloat16", "float16", "bfloat16"),
        ("float16", "bfloat16", "float16"),
    ],
)
def test_the_wider_dtype_has_more_bits_and_of_equals_is_the_first(a, b, wider):
    assert wider_dtype(jnp.dtype(a), jnp.dtype(b)) == jnp.dtype(wider)


def test_a_tied_table_gives_the_same_logits_by_either_product(x64):
    """Few single tokens, many, and whole sequences; no token at all."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((7, 4)))
    for batch in [(1,), (2, 1), (16, 1), (17, 1), (2, 3, 1), (2, 3), (0, 1), ()]:
        x = jnp.asarray(rng.standard_normal((*batch, 4)))
        np.testing.assert_allclose(jax.jit(attend)(x, table), np.asarray(x) @ np.asarray(table).T, rtol=0, atol=1e-13)
        assert attend(x.astype(jnp.bfloat16), table).dtype == jnp.float32


@given(leading, seeds)
def test_unembedding_sixteen_bits_gives_float32_logits(batch, seed):
    x, kernel = drawn(seed, (*batch, 5), (5, 7), dtype=jnp.bfloat16)
    logits = unembed(x, kernel)
    assert logits.dtype == jnp.float32
    x64, kernel64 = wide(x, kernel)
    np.testing.assert_allclose(logits, x64 @ kernel64, atol=1e-5)


@pytest.mark.parametrize("batch", [(2,), (3, 1, 2)])
def test_parameters_are_cast_to_the_dtype_of_x(batch):
    x, kernel, bias, scale = drawn(0, (*batch, 4), (4, 3), (3,), (4,))
    low = x.astype(jnp.bfloat16)
    assert linear(low, kernel, bias).dtype == jnp.bfloat16
    assert layer_norm(low, scale, scale, epsilon=1e-6).dtype == jnp.bfloat16
    assert rms_norm(low, scale, epsilon=1e-6).dtype == jnp.bfloat16
    assert unembed(low, kernel).dtype == jnp.float32


def exact_norm(x, scale, bias, epsilon, centre):
    centred = x - centre * x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon) * scale + bias


@given(leading, seeds, st.sampled_from([0.0, 1e2, 1e4]), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_norms_are_their_formulas_also_where_the_mean_is_large(batch, seed, mean, epsilon):
    """E[x^2] - E[x]^2 would have no digit left at mean 1e4; the mean of 16 errs by 16 * 2^-24 of itself at most."""
    x, scale, bias = drawn(seed, (*batch, 16), (16,), (16,))
    x = x + mean
    exact = wide(x, scale, bias)
    wanted, error = exact_norm(*exact, epsilon, centre=1), 16 * 2.0**-24 * np.abs(exact[0]).max(-1, keepdims=True)
    deviation = np.sqrt(exact[0].var(-1, keepdims=True) + epsilon)
    bound = 4e-5 + (error / deviation) * np.abs(exact[1]) + (error / deviation) ** 2 * np.abs(wanted - exact[2])
    np.testing.assert_array_less(np.abs(layer_norm(x, scale, bias, epsilon=epsilon) - wanted), bound)
    wanted = exact_norm(*exact[:2], 0, epsilon, centre=0)
    np.testing.assert_allclose(rms_norm(x, scale, epsilon=epsilon), wanted, rtol=0, atol=4e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norms_of_sixteen_bits_are_computed_in_float32(dtype):
    (x,) = drawn(0, (2, 3, 16), dtype=dtype)
    scale, bias = drawn(1, (16,), (16,))
    x = x * jnp.asarray(300, dtype)  # the squares overflow float16
    high = x.astype(jnp.float32)
    exactly(layer_norm(x, scale, bias, epsilon=1e-6), layer_norm(high, scale, bias, epsilon=1e-6).astype(dtype))
    exactly(rms_norm(x, scale, epsilon=1e-6), rms_norm(high, scale, epsilon=1e-6).astype(dtype))


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_norms_without_variance_give_no_nan(value):
    scale, bias = drawn(0, (6,), (6,))
    x = jnp.full((2, 3, 6), value)
    exactly(layer_norm(x, scale, bias, epsilon=1e-6), np.broadcast_to(bias, x.shape))
    assert np.isfinite(jax.grad(lambda x: layer_norm(x, scale, bias, epsilon=1e-6).sum())(x)).all()
    assert np.isfinite(jax.grad(lambda x: rms_norm(x, scale, epsilon=1e-6).sum())(x)).all()


def test_gradients_are_those_of_finite_differences(x64):
    x, scale, bias, kernel = drawn(0, (2, 3, 4), (4,), (4,), (4, 4), dtype="float64")
    check_grads(jax.jit(lambda *a: layer_norm(*a, epsilon=1e-6)), (x, scale, bias), order=2, modes=["rev"])
    check_grads(jax.jit(lambda *a: rms_norm(*a, epsilon=1e-6)), (x, scale), order=2, modes=["rev"])
    check_grads(jax.jit(linear), (x, kernel, bias), order=2, modes=["rev"])
    check_grads(jax.jit(unembed), (x, kernel), order=2, modes=["rev"])
    check_grads(
        jax.jit(lambda table: embed(jnp.array([[0, 3], [3, 1]]), table, scale=2.0)), (x[0].repeat(2, 0),), order=2
    )


# bad input


X, INTEGERS = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4), jnp.int32)
SQUARE, VECTOR, REAL = jnp.ones((4, 4)), jnp.ones(4), jnp.ones((2, 3), bool)
NORMS = {
    "layer_norm": lambda x, scale, epsilon=1e-6: layer_norm(x, scale, VECTOR, epsilon=epsilon),
    "rms_norm": lambda x, scale, epsilon=1e-6: rms_norm(x, scale, epsilon=epsilon),
}
BIASED = {
    "linear": (lambda bias: linear(X, SQUARE, bias), "O", r"kernel must be as wide as bias \({}\), got \(4, 4\)"),
    "layer_norm": (
        lambda bias: layer_norm(X, VECTOR, bias, epsilon=1e-6), "D",
        r"x must be as wide as bias \({}\), got \(2, 3, 4\)",
    ),
}  # fmt: skip
NEEDS_FLOATS = {
    "linear": (linear, SQUARE, "kernel"),
    **{name: (norm, VECTOR, "scale") for name, norm in NORMS.items()},
    "unembed": (unembed, SQUARE, "kernel"),
    "attend": (attend, SQUARE, "embedding"),
    "attend, one token": (lambda x, table: attend(x[:, :1], table), SQUARE, "embedding"),
}


@pytest.mark.parametrize("width", ["1,", "3,"])
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_of_another_width_is_refused(name, width, untyped):
    function, _, message = BIASED[name]
    with pytest.raises(ValueError, match=message.format(width)):
        function(jnp.ones(int(width[0])))


@pytest.mark.parametrize(
    ("shape", "remedy"), [((), "replaced or sliced"), ((1, 4), "nnx.vmap or eqx"), ((2, 1, 4), "nnx.vmap or eqx")]
)
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_of_another_rank_is_refused(name, shape, remedy, untyped):
    function, axis, _ = BIASED[name]
    with pytest.raises(ValueError, match=rf"bias must be \[{axis}\], got \({', '.join(map(str, shape))}\); .*{remedy}"):
        function(jnp.ones(shape))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("name", NEEDS_FLOATS)
def test_numbers_that_are_not_floating_are_refused(name, dtype, untyped):
    function, parameter, called = NEEDS_FLOATS[name]
    with pytest.raises(TypeError, match=f"x must be floating point, got {dtype}; cast it to float32"):
        function(X.astype(dtype), parameter)
    with pytest.raises(TypeError, match=f"{called} must be floating point, got {dtype}; cast it to float32"):
        function(X, parameter.astype(dtype))


def test_a_bias_a_table_and_a_mean_that_are_not_floating_are_refused(untyped):
    for biased, _, _ in BIASED.values():
        with pytest.raises(TypeError, match="bias must be floating point, got int32"):
            biased(jnp.ones(4, jnp.int32))
    with pytest.raises(TypeError, match="embedding must be floating point, got int32"):
        embed(jnp.zeros(2, jnp.int32), SQUARE.astype(jnp.int32), scale=0.5)
    for mask in (None, REAL):
        with pytest.raises(TypeError, match="x must be floating point, got int32"):
            masked_mean(INTEGERS, mask)


def test_a_dtype_that_is_refused_is_named_with_its_module(untyped):
    named = jax.named_scope("decoder")(linear)
    with pytest.raises(TypeError, match=r"x must be floating point, got int32 in decoder; cast it"):
        jax.jit(named)(INTEGERS, SQUARE)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_a_scale_of_another_width_is_refused(norm, width, untyped):
    with pytest.raises(ValueError, match=rf"x must be as wide as scale \({width},\), got \(2, 3, 4\)"):
        NORMS[norm](X, jnp.ones(width))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("length", [1, 3])
def test_a_tied_table_of_another_width_is_refused(length, width, untyped):
    with pytest.raises(ValueError, match=rf"x must be as wide as embedding \(4, {width}\), got \(2, {length}, 4\)"):
        attend(X[:, :length], SQUARE[:, :width])


@pytest.mark.parametrize("epsilon", [-1e-6, -math.inf, math.nan, math.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_an_epsilon_below_zero_or_without_end_is_refused(norm, epsilon, untyped):
    with pytest.raises(ValueError, match=f"epsilon must be at least 0 and finite, got {epsilon}"):
        NORMS[norm](X, VECTOR, epsilon)


@pytest.mark.parametrize("norm", NORMS)
def test_epsilon_may_be_zero_or_traced(norm, untyped):
    (x,) = drawn(0, (2, 3, 4))
    traced = jax.jit(NORMS[norm])(x, VECTOR, jnp.float32(0.0))
    np.testing.assert_allclose(traced, NORMS[norm](x, VECTOR, 0.0), rtol=1e-6)


MASKED = {
    "masked_mean": masked_mean,
    "zero_padding": zero_padding,
    "source_vectors": functools.partial(source_vectors, features=4, dtype="float32"),
}


@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (3,), (), (2, 3, 1)])
@pytest.mark.parametrize("name", MASKED)
def test_a_padding_mask_of_another_shape_is_refused(name, shape, untyped):
    message = (
        rf"a padding mask must have one entry for each position, shape \(2, 3\), got \({', '.join(map(str, shape))}"
    )
    with pytest.raises(ValueError, match=message):
        MASKED[name](X, jnp.ones(shape, bool))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("name", MASKED)
def test_a_padding_mask_must_be_bool(name, dtype, untyped):
    with pytest.raises(TypeError, match=f"a padding mask must be bool, .*got {dtype}; use tokens != pad_id"):
        MASKED[name](X, jnp.full((2, 3), 0.5).astype(dtype))


@pytest.mark.parametrize("shape", [(4,), ()])
def test_what_lacks_the_axis_of_positions_is_refused(shape, untyped):
    x, message = jnp.ones(shape), rf"x must be \[\*B, {{}}, D\], got \({'4,' if shape else ''}\)"
    with pytest.raises(ValueError, match=message.format("S")):
        masked_mean(x)
    for key in (None, jax.random.key(0)):
        with pytest.raises(ValueError, match=message.format("T")):
            stochastic_depth(x, 0.5, key=key)


# dropout


DATA = np.random.default_rng(0).standard_normal((4, 3, 64, 32)).astype("float32")


@functools.cache
def kept(seed, rate):
    return np.asarray(dropout(jnp.asarray(DATA), rate, key=jax.random.key(seed))) != 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_scales_what_it_keeps(rate):
    out, stays = np.asarray(dropout(jnp.asarray(DATA), rate, key=jax.random.key(0))), kept(0, rate)
    np.testing.assert_allclose(out[stays], DATA[stays] / (1 - rate), rtol=1e-6)
    assert abs(stays.mean() - (1 - rate)) < 6 * math.sqrt(rate * (1 - rate) / stays.size)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_dropout_is_independent_along_every_axis(axis):
    rows = np.moveaxis(kept(1, 0.4), axis, 0).reshape(DATA.shape[axis], -1)
    agreement = (rows[:, None] == rows[None]).mean(-1)[~np.eye(len(rows), dtype=bool)]
    assert np.abs(agreement - 0.52).max() < 6 * math.sqrt(0.52 * 0.48 / rows.shape[1])


def test_dropout_is_its_key_and_needs_one():
    x, key = jnp.asarray(DATA), jax.random.key(2)
    exactly(dropout(x, 0.5, key=key), dropout(x, 0.5, key=jax.random.key(2)))
    assert abs((kept(2, 0.5) == kept(3, 0.5)).mean() - 0.5) < 6 * 0.5 / math.sqrt(DATA.size)
    exactly(dropout(x, 0.5), DATA)
    exactly(dropout(x, 0.0, key=key), DATA)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dropout_keeps_the_dtype(dtype):
    assert dropout(jnp.asarray(DATA, dtype), 0.25, key=jax.random.key(0)).dtype == dtype


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("key", [None, 0])
def test_a_rate_outside_its_range_is_refused_even_without_a_key(rate, key, untyped):
    with pytest.raises(ValueError, match=f"dropout rate must be at least 0 and below 1, got {rate}"):
        dropout(jnp.asarray(DATA), rate, key=None if key is None else jax.random.key(key))


def test_a_missing_key_raises_in_training_and_is_ignored_in_evaluation():
    key = jax.random.key(0)
    assert dropout_key(key, rate=0.1, deterministic=False) is key
    assert dropout_key(None, rate=0.0, deterministic=False) is None
    for given_key in (None, key):
        assert dropout_key(given_key, rate=0.1, deterministic=True) is None
    with pytest.raises(
        ValueError,
        match=r"rate 0\.1 in training mode needs a key, got none; give rngs= \(NNX\) or key= \(Equinox\) at the call",
    ):
        dropout_key(None, rate=0.1, deterministic=False)


def test_sites_get_different_keys_that_do_not_depend_on_how_many_there_are():
    key = jax.random.key(5)
    keys = [tuple(jax.random.key_data(k).tolist()) for k in (key, *site_keys(key, 6))]
    assert len(set(keys)) == 7
    assert [tuple(jax.random.key_data(k).tolist()) for k in site_keys(key, 3)] == keys[1:4]
    assert site_keys(None, 3) == [None] * 3


# tokens


@given(leading, seeds, st.sampled_from([1.0, 0.25, 3.0]))
def test_embedding_is_a_row_of_the_table(batch, seed, scale):
    (table,) = drawn(seed, (300, 5))
    tokens = np.random.default_rng(seed).integers(0, 300, batch).astype("int32")
    wanted = np.asarray(table)[tokens] * np.float32(scale)
    exactly(np.asarray(embed(jnp.asarray(tokens), table, scale=scale)), wanted)
    exactly(np.asarray(jitted_embed(tokens, table, scale)), wanted)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_tokens_may_be_any_integers(dtype, untyped):
    (table,) = drawn(0, (300, 5))
    tokens = np.random.default_rng(0).integers(0, 128, (2, 3))
    exactly(np.asarray(embed(jnp.asarray(tokens, dtype), table)), np.asarray(table)[tokens])


jitted_embed = jax.jit(lambda tokens, table, scale: embed(tokens, table, scale=scale), static_argnums=2)


@pytest.mark.parametrize("bad", [-1, 7, -7, -8, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_token_out_of_range_raises_and_gives_nan_under_jit(bad, dtype):
    (table,) = drawn(0, (7, 4), dtype=dtype)
    tokens = jnp.asarray([[0, bad], [6, 3]], jnp.int32)
    low, high = min(bad, 0), max(bad, 6)
    with pytest.raises(ValueError, match=rf"tokens must lie in \[0, 7\), got values from {low} to {high}"):
        embed(tokens, table)
    rows = np.array(jitted_embed(tokens, table, 2.0), "float32")
    assert np.isnan(rows[0, 1]).all()
    rows[0, 1] = 0
    wanted = 2 * np.asarray(table, "float32")[[[0, 0], [6, 3]]]
    wanted[0, 1] = 0
    exactly(rows, wanted)


def test_a_token_out_of_range_poisons_its_own_example_under_vmap_and_grad():
    (table,) = drawn(0, (7, 4))
    rows = np.asarray(jax.vmap(lambda t: embed(t, table))(jnp.asarray([[1], [7]])))
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1]).all()
    gradient = jax.jit(jax.grad(lambda table, t: embed(t, table).sum()))(table, jnp.asarray([6, 7, -1]))
    exactly(np.asarray(gradient), np.repeat(np.arange(7) == 6, 4).reshape(7, 4).astype("float32"))


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_tokens_must_be_integers(dtype, untyped):
    with pytest.raises(TypeError, match=f"sources must be integers, got {dtype}"):
        check_tokens(jnp.zeros((2, 3), dtype), 7, "sources")
    with pytest.raises(TypeError, match=f"tokens must be integers, got {dtype}"):
        embed(jnp.zeros((2, 3), dtype), jnp.ones((7, 4)))


# feed-forward, residual


@given(leading, seeds)
def test_feed_forward_is_its_formula(batch, seed):
    x, up, gate, down = drawn(seed, (*batch, 3), (3, 8), (3, 8), (8, 3))
    by = lambda kernel: lambda x: linear(x, kernel)
    x64, up64, gate64, down64 = wide(x, up, gate, down)
    h, g = x64 @ up64, x64 @ gate64
    erf = np.vectorize(math.erf, otypes=["float64"])
    gelu = lambda z: z * (1 + erf(z / 2**0.5)) / 2
    inner = {
        "relu": np.maximum(h, 0),
        "gelu": gelu(h),
        "gelu_tanh": h / (1 + np.exp(-2 * (2 / math.pi) ** 0.5 * (h + 0.044715 * h**3))),
        "silu": h / (1 + np.exp(-h)),
        "glu": h / (1 + np.exp(-g)),
        "geglu": gelu(g) * h,
        "swiglu": g / (1 + np.exp(-g)) * h,
        "reglu": np.maximum(g, 0) * h,
    }
    assert inner.keys() == set(get_args(Activation))
    for activation, value in inner.items():
        gate_of = by(gate) if activation in GATED else None
        got = feed_forward(x, by(up), by(down), gate_of, activation=activation)
        np.testing.assert_allclose(got, value @ down64, rtol=0, atol=2e-5, err_msg=activation)


@pytest.mark.parametrize("activation", ["glu", "geglu", "swiglu", "reglu"])
def test_gated_activations_need_a_gate(activation):
    assert activation in GATED
    with pytest.raises(ValueError, match=f"{activation} needs a gate projection beside up and down, got none"):
        feed_forward(jnp.ones((2, 3)), lambda x: x, lambda x: x, activation=activation)


def test_an_unknown_activation_or_order_is_refused_with_the_choices(untyped):
    with pytest.raises(ValueError, match=r"activation must be one of \('relu', .*, 'reglu'\), got 'tanh'"):
        feed_forward(X, lambda x: x, lambda x: x, activation="tanh")
    with pytest.raises(ValueError, match=r"norm_order must be one of \('post', 'pre', 'sandwich'\), got 'posst'"):
        in_words("posst")


class Word(str):
    """Stands for an array, so that a formula can be read off."""

    def __add__(self, other):
        return Word(f"{self}+{other}")


def in_words(order, *, out_norm="o", stem=None):
    apply = lambda name: lambda x: Word(f"{name}({x})")
    sublayer = lambda x: (apply("f")(x), "beside")
    step = getattr(residual, "__wrapped__", residual)
    return step(
        Word("x"), sublayer, norm=apply("n"), norm_order=order, dropout=apply("d"), stem=stem,
        out_norm=None if out_norm is None else apply(out_norm),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("order", "stem", "wanted"),
    [
        ("pre", None, "x+d(f(n(x)))"),
        ("post", None, "n(x+d(f(x)))"),
        ("sandwich", None, "x+d(o(f(n(x))))"),
        ("pre", "s", "x+d(f(n(s)))"),
        ("sandwich", "s", "x+d(o(f(n(s))))"),
    ],
)
def test_residuals_are_the_published_formulas(order, stem, wanted):
    assert in_words(order, stem=stem and Word(stem)) == (wanted, "beside")


def test_the_sandwich_needs_its_second_norm():
    with pytest.raises(ValueError, match="the sandwich order needs a second norm, out_norm, got none"):
        in_words("sandwich", out_norm=None)


# stochastic depth


EXAMPLES = np.random.default_rng(1).standard_normal((2, 2000, 2, 3)).astype("float32")


def sigmas(kept, rate):
    return abs(kept.mean() - (1 - rate)) / math.sqrt(rate * (1 - rate) / kept.size)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_stochastic_depth_drops_whole_examples_and_scales_the_others(rate):
    out = np.asarray(stochastic_depth(jnp.asarray(EXAMPLES), rate, key=jax.random.key(0)))
    stays = (out != 0).any(axis=(-2, -1))
    np.testing.assert_allclose(out[stays], EXAMPLES[stays] / (1 - rate), rtol=1e-6)
    assert (out[~stays] == 0).all()
    assert sigmas(stays, rate) < 6
    assert sigmas(stays[0] == stays[1], 2 * rate * (1 - rate)) < 6  # rows are independent


def test_a_rate_of_stochastic_depth_may_be_traced():
    x, key = jnp.asarray(EXAMPLES), jax.random.key(2)
    exactly(jax.jit(stochastic_depth)(x, jnp.float32(0.5), key=key), stochastic_depth(x, 0.5, key=key))


def test_stochastic_depth_is_its_key_and_needs_one():
    x, key = jnp.asarray(EXAMPLES), jax.random.key(2)
    exactly(stochastic_depth(x, 0.5, key=key), stochastic_depth(x, 0.5, key=jax.random.key(2)))
    other = np.asarray(stochastic_depth(x, 0.5, key=jax.random.key(3))) == stochastic_depth(x, 0.5, key=key)
    assert sigmas(other.all(axis=(-2, -1)), 0.5) < 6
    exactly(stochastic_depth(x, 0.5), EXAMPLES)
    exactly(stochastic_depth(x, 0.0, key=key), EXAMPLES)
    assert stochastic_depth(x[0, 0].astype(jnp.bfloat16), 0.5, key=key).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [1.0, -0.1, math.nan])
@pytest.mark.parametrize("key", [None, 0])
def test_a_depth_rate_outside_its_range_is_refused_even_without_a_key(rate, key, untyped):
    key = None if key is None else jax.random.key(key)
    message = f"the stochastic depth rate must be at least 0 and below 1, got {rate}"
    with pytest.raises(ValueError, match=message):
        stochastic_depth(jnp.asarray(EXAMPLES), rate, key=key)
    with pytest.raises(ValueError, match=message):
        branch_dropout(jnp.asarray(EXAMPLES), 0.5, rate, key=key)


def test_a_branch_drops_elements_and_examples_independently():
    x, key, rate, depth_rate = jnp.asarray(EXAMPLES[..., :1, :1]), jax.random.key(4), 0.4, 0.3
    kept = np.asarray(branch_dropout(x, rate, depth_rate, key=key)) != 0
    assert sigmas(kept, 1 - (1 - rate) * (1 - depth_rate)) < 6  # one mask for both would keep 1 - rate
    out = np.asarray(branch_dropout(jnp.asarray(EXAMPLES), rate, depth_rate, key=key))
    np.testing.assert_allclose(out[out != 0], EXAMPLES[out != 0] / ((1 - rate) * (1 - depth_rate)), rtol=1e-6)
    stays = (out != 0).any(axis=(-2, -1))
    dropped = depth_rate + (1 - depth_rate) * rate**6  # or all six elements of the example
    assert sigmas(stays, dropped) < 6
    exactly(branch_dropout(x, rate, 0.0, key=key), dropout(x, rate, key=key))
    exactly(branch_dropout(x, rate, depth_rate), np.asarray(x))
    only = np.asarray(branch_dropout(jnp.asarray(EXAMPLES), 0.0, depth_rate, key=key))
    assert ((only != 0).all(axis=(-2, -1)) | (only == 0).all(axis=(-2, -1))).all()
    assert sigmas((only != 0).any(axis=(-2, -1)), depth_rate) < 6


def test_the_depth_rate_grows_evenly_to_the_last_layer():
    config = TransformerConfig(stochastic_depth_rate=0.4)
    np.testing.assert_allclose([config.depth_rate(i, 4) for i in range(4)], [0.1, 0.2, 0.3, 0.4], rtol=1e-15)
    assert config.depth_rate(0, 1) == 0.4
    assert TransformerConfig().depth_rate(5, 6) == 0.0
