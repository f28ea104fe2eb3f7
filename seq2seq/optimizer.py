"""The optax transformation that training options stand for."""

import fnmatch
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from core.weights import dotted, is_stacked, unstacked
from seq2seq.errors import UserError
from seq2seq.options import TrainingOptions


def make_optimizer(options: TrainingOptions) -> optax.GradientTransformation:
    """Update k uses the rate of step k, counted from 0."""
    tx = optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(learning_rate(options), b2=0.98, weight_decay=options.weight_decay, mask=decayed),
    )
    if options.frozen:
        label = lambda name, x: "frozen" if _frozen(name, x, options.frozen) else "free"
        labels = lambda params: by_name(label, params)
        tx = optax.multi_transform({"free": tx, "frozen": optax.set_to_zero()}, labels)
    if options.average:
        tx = optax.chain(tx, weight_average(options.average))
    return optax.apply_if_finite(tx, max_consecutive_errors=2**30)


def learning_rate(options: TrainingOptions) -> optax.Schedule:
    """The rate of step k, counted from 0: up to the peak in a line, then by the schedule."""
    peak, warmup = options.learning_rate, options.warmup

    def rate(count):
        step = jnp.asarray(count, jnp.float32) + 1
        after = {
            "inverse_sqrt": lambda: jnp.sqrt(warmup / step),
            "cosine": lambda: 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((step - warmup) / (options.steps - warmup), 0, 1))),
            "constant": lambda: jnp.ones_like(step),
        }
        return peak * jnp.where(step < warmup, step / warmup, after[options.schedule]())

    return rate


def decayed(params: PyTree) -> PyTree:
    """True for matrices: what multiplies vectors may shrink, what is added to them or scales them may not."""
    return by_name(lambda name, x: x.ndim - is_stacked(name, x) > 1, params)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns is the name of a parameter, as in `encoder.*`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def by_name(function: Callable, params: PyTree) -> PyTree:
    """`function(dotted name, leaf)` of each parameter, in either frontend's tree."""
    return jax.tree.map_with_path(lambda path, x: function(dotted(path).removesuffix(".value"), x), params)


def _frozen(name: str, x: jax.Array, patterns: tuple[str, ...]) -> bool:
    found = {matches(own, patterns) for own in unstacked({name: jax.ShapeDtypeStruct(x.shape, x.dtype)})}
    if len(found) > 1:
        raise UserError(
            f"with scanned layers all of {name} is frozen or none, got frozen={patterns}; "
            "name all layers, or leave out --scan-layers"
        )
    return found.pop()


class AverageState(NamedTuple):
    """The moving average of the weights, and how many steps it has seen."""

    steps: jax.Array
    average: PyTree


def weight_average(decay: float) -> optax.GradientTransformation:
    """Changes no update, keeps the exponential moving average of the weights they lead to (Polyak and Juditsky 1992).

    Early on it forgets faster, by (1 + n) / (10 + n), so that the first weights do not linger.
    """

    def init(params):
        return AverageState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params)
        )  # copies: train steps give buffers away

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("weight_average needs the parameters in update(), got none")
        n = jnp.asarray(state.steps, jnp.float32)
        keep = jnp.minimum(decay, (1 + n) / (10 + n))
        moved = lambda a, p, u: a + (1 - keep).astype(a.dtype) * (p + u - a)
        return updates, AverageState(state.steps + 1, jax.tree.map(moved, state.average, params, updates))

    return optax.GradientTransformation(init, update)
