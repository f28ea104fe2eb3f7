"""Our attention modules beside the frameworks' own, on the same weights, in turn: `python -m bench modules`."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import equinox_impl
import nnx_impl
from bench.speed import KINDS, ROUNDS, Time, batch_rows, timed_in_turn
from core.config import TransformerConfig

LENGTHS = (64, 512)
WIDTH, HEADS = 512, 8
Weights = dict[str, np.ndarray]
Module = tuple[Any, Callable[[Any, Float[Array, "B T D"]], Float[Array, "B T D"]]]


def module_times(lengths: Sequence[int] = LENGTHS, *, rounds: int = ROUNDS, causal: bool = True) -> list[Time]:
    """Of self-attention with its four projections, D=512, N=8, forward and with the gradients of all; ours first."""
    return [time for length in lengths for time in _times(length, rounds, causal)]


def _times(length: int, rounds: int, causal: bool) -> list[Time]:
    rng = np.random.default_rng(0)
    names = [f"{part}_proj.kernel" for part in "kovq"]
    weights = {name: (rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype("float32") for name in names}
    x = rng.standard_normal((batch_rows(length), length, WIDTH)).astype("float32")
    contenders = {
        name: _programs(*make(weights, length, causal), jnp.asarray(x)) for name, make in MODULES.items()
    } | _torch_programs(weights, x, causal)
    return timed_in_turn(contenders, length, rounds)


def _programs(arrays: Any, call: Callable, x: Array) -> dict[str, Callable[[], Any]]:
    gradients = jax.grad(lambda arrays, x: jnp.square(call(arrays, x)).sum(), argnums=(0, 1))
    return {kind: partial(jax.jit(do), arrays, x) for kind, do in zip(KINDS, (call, gradients), strict=True)}


def _nnx_impl(weights: Weights, length: int, causal: bool) -> Module:
    del length
    module = nnx_impl.MultiHeadAttention(_config(), positions=False, rngs=nnx.Rngs(0))
    for name, array in weights.items():
        getattr(module, name.partition(".")[0]).kernel[...] = array
    return _split(module, lambda module, x: module(x, causal=causal))


def _equinox_impl(weights: Weights, length: int, causal: bool) -> Module:
    del length
    module = equinox_impl.MultiHeadAttention(_config(), positions=False, key=jax.random.key(0))
    kernels = lambda module: [getattr(module, name.partition(".")[0]).kernel for name in weights]
    module = eqx.tree_at(kernels, module, list(map(jnp.asarray, weights.values())))
    return _partitioned(module, lambda module, x: module(x, causal=causal))


def _flax(weights: Weights, length: int, causal: bool) -> Module:
    module = nnx.MultiHeadAttention(HEADS, WIDTH, use_bias=False, decode=False, rngs=nnx.Rngs(0))
    for part, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        kernel = getattr(module, part).kernel
        kernel[...] = weights[f"{name}_proj.kernel"].reshape(kernel.shape)
    mask = _mask(length) if causal else None
    return _split(module, lambda module, x: module(x, mask=mask, deterministic=True))


def _eqx(weights: Weights, length: int, causal: bool) -> Module:
    module = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=jax.random.key(0))
    names = {"query_proj": "q", "key_proj": "k", "value_proj": "v", "output_proj": "o"}
    matrices = lambda module: [getattr(module, name).weight for name in names]
    module = eqx.tree_at(matrices, module, [jnp.asarray(weights[f"{name}_proj.kernel"].T) for name in names.values()])
    mask = _mask(length) if causal else None
    return _partitioned(module, lambda module, x: jax.vmap(lambda row: module(row, row, row, mask))(x))


MODULES = {
    "isoformer, NNX": _nnx_impl,
    "isoformer, Equinox": _equinox_impl,
    "nnx.MultiHeadAttention": _flax,
    "eqx.nn.MultiheadAttention": _eqx,
}


def _config() -> TransformerConfig:
    return TransformerConfig(
        source_vocab_size=8, target_vocab_size=8, d_model=WIDTH, num_heads=HEADS, attention_dropout_rate=0.0
    )


def _mask(length: int) -> Array:
    return jnp.tril(jnp.ones((length, length), bool))


def _split(module: nnx.Module, call: Callable) -> Module:
    graph, state = nnx.split(module)
    return state, lambda state, x: call(nnx.merge(graph, state), x)


def _partitioned(module: eqx.Module, call: Callable) -> Module:
    arrays, rest = eqx.partition(module, eqx.is_array)
    return arrays, lambda arrays, x: call(eqx.combine(arrays, rest), x)


def _torch_programs(weights: Weights, x: np.ndarray, causal: bool) -> dict[str, dict[str, Callable[[], Any]]]:
    """PyTorch's module, where the torch extra is installed; without weights, so that it takes its fused kernel."""
    if not importlib.util.find_spec("torch"):
        return {}
    torch = importlib.import_module("torch")
    module = torch.nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
    inward = np.concatenate([weights[f"{name}_proj.kernel"].T for name in "qkv"])
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.from_numpy(inward))
        module.out_proj.weight.copy_(torch.from_numpy(weights["o_proj.kernel"].T.copy()))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if causal else None
    given = torch.from_numpy(x).requires_grad_()
    call = lambda: module(given, given, given, attn_mask=mask, is_causal=causal, need_weights=False)[0]

    def forward():
        with torch.no_grad():
            return call().numpy()

    def both():
        return torch.autograd.grad(call().square().sum(), (*module.parameters(), given))

    return {"torch.nn.MultiheadAttention": dict(zip(KINDS, (forward, both), strict=True))}
