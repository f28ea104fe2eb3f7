"""The small layers: linear, norms, dropout, embedding, feed-forward, residual."""

import functools
import math
import re
from collections.abc import Callable
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.source_info_util import current_name_stack
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, PRNGKeyArray

from core.config import Activation, NormOrder, check_at_least, check_choice, check_rate

Aux = TypeVar("Aux")

GATED = ("glu", "geglu", "swiglu", "reglu")
"""Activations that have a gate projection."""
_FEW_ROWS = 16  # docs/performance.md has the measurement
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "glu": jax.nn.sigmoid,
    "geglu": functools.partial(jax.nn.gelu, approximate=False),
    "swiglu": jax.nn.silu,
    "reglu": jax.nn.relu,
}

kernel_init = jax.nn.initializers.glorot_uniform()
"""Kernels (in, out): uniform, variance 2 / (in + out) (Glorot and Bengio 2010)."""
embedding_init = jax.nn.initializers.variance_scaling(1.0, "fan_out", "normal")
"""Embeddings (V, D): normal, variance 1 / D, so that rows have length 1, and sqrt(D) after scaling."""
relative_init = jax.nn.initializers.normal(0.02)
"""What relative positions learn: normal, deviation 0.02 (as in Transformer-XL)."""


def wide_dtype(x: Array) -> jnp.dtype:
    """The dtype of sums, softmax and norms: float64 for float64, float32 for all else."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def wider_dtype(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    """That of more bits; the first if they have as many."""
    return max(a, b, key=lambda dtype: dtype.itemsize)


def check_floating(name: str, x: Array) -> None:
    """TypeError, saying in which module, unless it is floating point: integers would be cut off without a word."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {x.dtype}{_place()}; cast it to float32")


def linear(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], bias: Float[Array, "O"] | None = None
) -> Float[Array, "*B O"]:
    """x kernel + bias, with the parameters cast to x's dtype."""
    check_parameter("kernel", kernel, "I O", x=x)
    if bias is not None:
        check_parameter("bias", bias, "O", kernel=kernel)
    # one plain product of matrices, for the gradient by the kernel is slower where it sums over several axes
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = (rows @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])
    return y if bias is None else y + _along_last(bias.astype(x.dtype), y)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"], *, epsilon: float
) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al. 2016), in at least float32.

    The variance is that of the centred values: E[x^2] - E[x]^2 loses all digits where the mean is large.
    """
    check_parameter("scale", scale, "D", x=x)
    check_parameter("bias", bias, "D", x=x)
    _check_epsilon(epsilon)
    wide = x.astype(wide_dtype(x))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    scaled = normed * _along_last(scale.astype(wide.dtype), wide)
    return (scaled + _along_last(bias.astype(wide.dtype), wide)).astype(x.dtype)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], *, epsilon: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang and Sennrich 2019), in at least float32."""
    check_parameter("scale", scale, "D", x=x)
    _check_epsilon(epsilon)
    wide = x.astype(wide_dtype(x))
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    return (normed * _along_last(scale.astype(wide.dtype), wide)).astype(x.dtype)


def _check_epsilon(epsilon: float) -> None:
    if not isinstance(epsilon, jax.Array):  # as in jax.jit(rms_norm)
        check_at_least("epsilon", epsilon, 0)


def dropout(x: Float[Array, "*S"], rate: float, *, key: PRNGKeyArray | None = None) -> Float[Array, "*S"]:
    """Each element 0 with probability `rate`, else divided by 1 - rate; without a key x itself."""
    check_rate("the dropout rate", rate)
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def stochastic_depth(
    x: Float[Array, "*B T D"], rate: float | Float[Array, ""], *, key: PRNGKeyArray | None = None
) -> Float[Array, "*B T D"]:
    """Each example wholly 0 with probability `rate`, else divided by 1 - rate (Huang et al. 2016).

    In a scan over layers the rate is an array, for there each layer has another.
    """
    if not isinstance(rate, jax.Array):
        check_rate("the stochastic depth rate", rate)
    check_axes("x", x, "T D")
    if key is None or _is_zero(rate):
        return x
    keep = 1 - jnp.asarray(rate, wide_dtype(x))  # an array in either case, so that both round alike
    kept = jax.random.bernoulli(key, keep, (*x.shape[:-2], 1, 1))
    return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def branch_dropout(
    x: Float[Array, "*B T D"],
    rate: float,
    depth_rate: float | Float[Array, ""],
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*B T D"]:
    """Dropout of a residual's branch, element by element, then example by example."""
    if _is_zero(depth_rate):
        return dropout(x, rate, key=key)
    element_key, example_key = site_keys(key, 2)
    return stochastic_depth(dropout(x, rate, key=element_key), depth_rate, key=example_key)


def dropout_key(key: PRNGKeyArray | None, *, rate: float, deterministic: bool) -> PRNGKeyArray | None:
    """The key that a dropout site uses: none in evaluation, and one in training or ValueError."""
    if deterministic or rate == 0:
        return None
    if key is None:
        raise ValueError(
            f"dropout at rate {rate} in training mode needs a key, got none; "
            "give rngs= (NNX) or key= (Equinox) at the call, or switch dropout off with evaluation(model)"
        )
    return key


@overload
def site_keys(key: PRNGKeyArray, number: int) -> list[PRNGKeyArray]: ...
@overload
def site_keys(key: PRNGKeyArray | None, number: int) -> list[PRNGKeyArray] | list[None]: ...
def site_keys(key: PRNGKeyArray | None, number: int) -> list[PRNGKeyArray] | list[None]:
    """The one rule of randomness: child i of a module gets fold_in(key, i); no key, no keys."""
    return [None] * number if key is None else [jax.random.fold_in(key, i) for i in range(number)]


def embed(tokens: Integer[Array, "*B"], embedding: Float[Array, "V D"], *, scale: float = 1.0) -> Float[Array, "*B D"]:
    """Row `tokens` of the table, times scale. A token outside [0, V) raises, and gives NaN under jit."""
    check_parameter("embedding", embedding, "V D")
    check_tokens(tokens, embedding.shape[0])
    rows = embedding.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows if scale == 1 else rows * scale


def check_tokens(tokens: Integer[Array, "*B"], vocab_size: int, name: str = "tokens") -> None:
    """TypeError unless they are integers; ValueError where their values are known and out of range."""
    check_integers(name, tokens)
    if (values := known_values(tokens)) is not None and values.size:
        low, high = values.min(), values.max()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got values from {low} to {high}")


def check_integers(name: str, x: Array) -> None:
    """TypeError unless they are integers."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {x.dtype}")


def check_axes(name: str, x: Array, axes: str) -> None:
    """ValueError unless it has these axes at least."""
    if x.ndim < len(axes.split()):
        raise ValueError(f"{name} must be [*B, {', '.join(axes.split())}], got {x.shape}")


def check_real(name: str, real: Array, shape: tuple[int, ...]) -> None:
    """TypeError unless it is bool, ValueError unless it has that shape: others would broadcast, or weigh."""
    if real.dtype != jnp.bool_:
        raise TypeError(f"{name} must be bool, True where a position counts, got {real.dtype}; use tokens != pad_id")
    if real.shape != tuple(shape):
        raise ValueError(f"{name} must have one entry for each position, shape {tuple(shape)}, got {real.shape}")


def check_parameter(name: str, parameter: Array, axes: str, *, axis: int = 0, **fitting: Array) -> None:
    """ValueError or TypeError, saying in which module, unless the parameter is floating point and has these axes,
    and what it is to fit is floating point and as wide as its `axis`."""
    if parameter.ndim != len(axes.split()):
        remedy = "was it replaced or sliced?"
        if parameter.ndim > len(axes.split()):
            remedy = "a model of an ensemble has an axis of members before: call it by nnx.vmap or eqx.filter_vmap"
        raise ValueError(f"{name} must be [{', '.join(axes.split())}], got {parameter.shape}{_place()}; {remedy}")
    check_floating(name, parameter)
    for other, x in fitting.items():
        check_floating(other, x)
        if x.shape[-1:] != parameter.shape[axis : axis + 1]:
            raise ValueError(f"{other} must be as wide as {name} {parameter.shape}{_place()}, got {x.shape}")


def _place() -> str:
    path = re.sub(r"\w+\(|\)", "", str(current_name_stack())).replace("/", ".")  # without jvp( ) and the like
    return f" in {path}" if path else ""


def known_values(x: ArrayLike) -> np.ndarray | None:
    """The numbers in x; None where they are not known, inside of jit, grad or vmap."""
    return None if isinstance(x, Tracer) else np.asarray(x)


def unembed(x: Float[Array, "*B D"], kernel: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """Logits over the vocabulary, in at least float32. A tied table goes in transposed."""
    check_parameter("kernel", kernel, "D V", x=x)
    dtype = wide_dtype(x)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)


def attend(x: Float[Array, "*B D"], embedding: Float[Array, "V D"]) -> Float[Array, "*B V"]:
    """`unembed` by a tied table. For a few single tokens it is table x^T, which reads the table as it lies."""
    check_parameter("embedding", embedding, "V D", axis=1, x=x)
    rows = math.prod(x.shape[:-1])
    if x.ndim < 2 or x.shape[-2] != 1 or not 0 < rows <= _FEW_ROWS:
        return unembed(x, embedding.T)
    logits = jnp.matmul(embedding.astype(x.dtype), x.reshape(rows, x.shape[-1]).T, preferred_element_type=wide_dtype(x))
    # without the barrier XLA makes the other product of it again
    return jax.lax.optimization_barrier(logits).T.reshape(*x.shape[:-1], embedding.shape[0])


def source_vectors(
    source: Float[Array, "*B S P"], real: Bool[Array, "*B S"] | None = None, *, features: int, dtype: DTypeLike
) -> Float[Array, "*B S P"]:
    """What a model reads of vectors: in its dtype, and 0 where they are padding.

    TypeError unless they are floating, ValueError unless they are `features` wide.
    """
    if not jnp.issubdtype(source.dtype, jnp.floating):
        raise TypeError(f"source vectors must be floating, got {source.dtype}; scale pixels as in x / 255")
    if source.ndim < 2 or source.shape[-1] != features:
        raise ValueError(
            f"source must be vectors [*B, S, P] with P = source_features = {features}, got {source.shape}; "
            "reshape them or change the configuration"
        )
    return zero_padding(source, real).astype(jnp.dtype(dtype))


def zero_padding(x: Float[Array, "*B S D"], real: Bool[Array, "*B S"] | None = None) -> Float[Array, "*B S D"]:
    """x where it is real, else 0 without any gradient, NaN or not."""
    if real is None:
        return x
    check_real("a padding mask", real, x.shape[:-1])
    return jnp.where(real[..., None], x, jnp.zeros((), x.dtype))


def masked_mean(x: Float[Array, "*B S D"], real: Bool[Array, "*B S"] | None = None) -> Float[Array, "*B D"]:
    """The mean over the real positions, summed in at least float32; 0 if there are none."""
    check_axes("x", x, "S D")
    check_floating("x", x)
    wide = zero_padding(x.astype(wide_dtype(x)), real)
    count = x.shape[-2] if real is None else real.sum(axis=-1, keepdims=True)
    return (wide.sum(axis=-2) / jnp.maximum(count, 1).astype(wide.dtype)).astype(x.dtype)


def feed_forward(
    x: Float[Array, "*B D"],
    up: Callable[[Array], Array],
    down: Callable[[Array], Array],
    gate: Callable[[Array], Array] | None = None,
    *,
    activation: Activation,
) -> Float[Array, "*B D"]:
    """down(activation(up(x))) (2017); gated: down(activation(gate(x)) * up(x)) (Shazeer 2020)."""
    check_choice("activation", activation, Activation)
    function = _ACTIVATIONS[activation]
    up, down = jax.named_scope("up_proj")(up), jax.named_scope("down_proj")(down)
    if activation not in GATED:
        return down(function(up(x)))
    if gate is None:
        raise ValueError(f"{activation} needs a gate projection beside up and down, got none")
    gate = jax.named_scope("gate_proj")(gate)
    return down(function(gate(x)) * up(x))


def residual(
    x: Float[Array, "*B D"],
    sublayer: Callable[[Array], tuple[Array, Aux]],
    *,
    norm: Callable[[Array], Array],
    norm_order: NormOrder,
    dropout: Callable[[Array], Array],
    out_norm: Callable[[Array], Array] | None = None,
    stem: Float[Array, "*B D"] | None = None,
) -> tuple[Float[Array, "*B D"], Aux]:
    """post: norm(x + dropout(f(x))) (2017); pre: x + dropout(f(norm(x))) (Xiong et al. 2020);
    sandwich: x + dropout(out_norm(f(norm(x)))) (Ding et al. 2021).

    `stem` is what f reads if that is not x: in a parallel block all sublayers read the block's input (Wang and
    Komatsuzaki 2021). Returns beside the sum what the sublayer returned beside its output.
    """
    check_choice("norm_order", norm_order, NormOrder)
    stem = x if stem is None else stem
    if norm_order == "post":
        y, aux = sublayer(stem)
        return norm(x + dropout(y)), aux
    y, aux = sublayer(norm(stem))
    if norm_order == "sandwich":
        if out_norm is None:
            raise ValueError("the sandwich order needs a second norm, out_norm, got none")
        y = out_norm(y)
    return x + dropout(y), aux


def _is_zero(rate: float | Array) -> bool:
    return not isinstance(rate, jax.Array) and rate == 0


def _along_last(vector: Float[Array, "D"], like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
