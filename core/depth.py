"""A stack of blocks, layer after layer: as a loop, or as one scan, whose program does not grow with the depth."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from core.config import TransformerConfig
from core.layers import site_keys

Layer = Callable[
    [Any, Array, Array | None, PRNGKeyArray | None, Array | None],  # block, x, input, key, rate of stochastic depth
    tuple[Array, dict[str, Any]],
]


@runtime_checkable
class Stacked(Protocol):
    """Blocks held as one block, whose arrays have a leading axis of layers."""

    depth_rates: tuple[float, ...]

    def split(self) -> tuple[PyTree[Array], Callable[[PyTree[Array]], Any]]:
        """The arrays, and what makes a block of one layer's."""
        ...


def over_layers(
    layer: Layer,
    x: Float[Array, "*B T D"],
    blocks: Sequence[Any] | Stacked,
    inputs: Sequence[Array] | None = None,
    *,
    config: TransformerConfig,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*B T D"], dict[str, Any]]:
    """x after `layer(block, x, input, key, depth_rate)` of each block, and what each gave beside, by name and number.

    Layer i has inputs[i], and the key that is child 1 + i of the stack's: child 0 drops what enters the stack. In a
    scan it is also told its rate of stochastic depth, for there one block stands for all.
    """
    if not isinstance(blocks, Stacked):
        extras = {}
        for i, (block, own) in enumerate(zip(blocks, site_keys(key, 1 + len(blocks))[1:], strict=True)):
            step = rematerialised(functools.partial(layer, block), config)
            with jax.named_scope(f"blocks.{i}"):
                x, extra = step(x, None if inputs is None else inputs[i], own, None)
            extras |= {f"blocks.{i}.{name}": value for name, value in extra.items()}
        return x, extras
    arrays, block_of = blocks.split()
    layers = len(blocks.depth_rates)

    @jax.named_scope("blocks")
    def body(x: Array, own: tuple) -> tuple[Array, dict[str, Any]]:
        arrays, child, given, depth_rate = own
        return layer(block_of(arrays), x, given, None if key is None else jax.random.fold_in(key, child), depth_rate)

    children = jnp.arange(1, 1 + layers, dtype=jnp.uint32)
    rates = jnp.asarray(blocks.depth_rates) if config.stochastic_depth_rate else None
    given = None if inputs is None else jnp.stack(inputs)
    x, stacked = jax.lax.scan(rematerialised(body, config, scanned=True), x, (arrays, children, given, rates))
    parts = {name: jnp.unstack(value) for name, value in stacked.items()}
    return x, {f"blocks.{i}.{name}": part[i] for i in range(layers) for name, part in parts.items()}


def rematerialised(function: Callable, config: TransformerConfig, *, scanned: bool = False) -> Callable:
    """The function, computed anew in the backward pass if the configuration says so."""
    if not config.remat:
        return function
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable
    if config.remat_keeps == "projections":
        policy = policies.dots_with_no_batch_dims_saveable
    # a scan's passes are loops of their own, which XLA cannot merge: no need to keep it from trying
    return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)
