"""The small layers: linear, norms, dropout, embedding, feed-forward, residual."""

from collections.abc import Callable
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from core.config import Activation, NormOrder, check_rate

Aux = TypeVar("Aux")

kernel_init = jax.nn.initializers.glorot_uniform()
"""Kernels (in, out): uniform, variance 2 / (in + out) (Glorot and Bengio 2010)."""
embedding_init = jax.nn.initializers.variance_scaling(1.0, "fan_out", "normal")
"""Embeddings (V, D): normal, variance 1 / D, so that rows have length 1, and sqrt(D) after scaling."""


def wide_dtype(x: Array) -> jnp.dtype:
    """The dtype of sums, softmax and norms: float64 for float64, float32 for all else."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def linear(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], bias: Float[Array, "O"] | None = None
) -> Float[Array, "*B O"]:
    """x kernel + bias, with the parameters cast to x's dtype."""
    y = x @ kernel.astype(x.dtype)
    return y if bias is None else y + _along_last(bias.astype(x.dtype), y)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"], *, epsilon: float
) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al. 2016), in at least float32.

    The variance is that of the centred values: E[x^2] - E[x]^2 loses all digits where the mean is large.
    """
    wide = x.astype(wide_dtype(x))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    scaled = normed * _along_last(scale.astype(wide.dtype), wide)
    return (scaled + _along_last(bias.astype(wide.dtype), wide)).astype(x.dtype)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], *, epsilon: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang and Sennrich 2019), in at least float32."""
    wide = x.astype(wide_dtype(x))
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    return (normed * _along_last(scale.astype(wide.dtype), wide)).astype(x.dtype)


def dropout(x: Float[Array, "*S"], rate: float, *, key: PRNGKeyArray | None = None) -> Float[Array, "*S"]:
    """Each element 0 with probability `rate`, else divided by 1 - rate; without a key x itself."""
    check_rate("the dropout rate", rate)
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


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
    check_tokens(tokens, embedding.shape[0])
    rows = embedding.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows if scale == 1 else rows * scale


def check_tokens(tokens: Integer[Array, "*B"], vocab_size: int, name: str = "tokens") -> None:
    """TypeError unless they are integers; ValueError where their values are known and out of range."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {tokens.dtype}")
    if (values := known_values(tokens)) is not None and values.size:
        low, high = values.min(), values.max()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got values from {low} to {high}")


def known_values(x: Array) -> np.ndarray | None:
    """The numbers in x; None where they are not known, inside of jit, grad or vmap."""
    return None if isinstance(x, Tracer) else np.asarray(x)


def unembed(x: Float[Array, "*B D"], kernel: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """Logits over the vocabulary, in at least float32. A tied table goes in transposed."""
    dtype = wide_dtype(x)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)


def feed_forward(
    x: Float[Array, "*B D"],
    up: Callable[[Array], Array],
    down: Callable[[Array], Array],
    gate: Callable[[Array], Array] | None = None,
    *,
    activation: Activation,
) -> Float[Array, "*B D"]:
    """down(activation(up(x))), relu (2017) or exact gelu; swiglu: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""
    if activation == "swiglu":
        if gate is None:
            raise ValueError("swiglu needs a gate projection beside up and down, got none")
        return down(jax.nn.silu(gate(x)) * up(x))
    if activation == "gelu":
        return down(jax.nn.gelu(up(x), approximate=False))
    return down(jax.nn.relu(up(x)))


def residual(
    x: Float[Array, "*B D"],
    sublayer: Callable[[Array], tuple[Array, Aux]],
    *,
    norm: Callable[[Array], Array],
    norm_order: NormOrder,
    dropout: Callable[[Array], Array],
) -> tuple[Float[Array, "*B D"], Aux]:
    """post: norm(x + dropout(f(x))) (2017); pre: x + dropout(f(norm(x))) (Xiong et al. 2020).

    Returns beside the sum what the sublayer returned beside its output.
    """
    if norm_order == "pre":
        y, aux = sublayer(norm(x))
        return x + dropout(y), aux
    y, aux = sublayer(x)
    return norm(x + dropout(y)), aux


def _along_last(vector: Float[Array, "D"], like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
