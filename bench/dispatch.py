"""What a call costs the host, by how it is made and by the number of arrays: `python -m bench dispatch`.

The trees are real models and optimizers; the programs do next to nothing with each array, so that what is left is the
host's work: time of the calling thread, until the call returns, waiting left out (`eqx.filter_jit` waits for a result).
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.table import Table

import equinox_impl
import nnx_impl
from core.config import TransformerConfig
from equinox_impl.dispatch import Held as EquinoxHeld
from nnx_impl.dispatch import Held as NNXHeld

LAYERS = (2, 7, 27)
"""Of encoder and decoder: 62, 212 and 812 arrays."""
ROUNDS = 25
JOBS = {
    "forward": "reads all parameters",
    "decode step": "reads all parameters, and changes a cache of two arrays a layer",
    "train step": "changes all parameters and AdamW's two moments of each",
}
RAW = "jax.jit, flat list"
Calls = dict[str, Callable[[], Any]]


class Cost(NamedTuple):
    """Microseconds of one way of making a call, and how they compare with the flat list in the same rounds."""

    job: str
    parameters: int
    style: str
    median: float
    low: float  # the quartiles
    high: float
    ratio: float


def dispatch_costs(layers: Sequence[int] = LAYERS, *, rounds: int = ROUNDS) -> list[Cost]:
    """Of every number of layers, job and style."""
    return [cost for number in layers for cost in _costs(number, rounds)]


def _costs(layers: int, rounds: int) -> list[Cost]:
    """In an order drawn anew for each round; of three calls in a row the least."""
    found = []
    for job, calls in {"forward": _forward, "decode step": _decode, "train step": _train}.items():
        styles = calls(layers)
        samples: dict[str, list[float]] = {style: [] for style in styles}
        for call in styles.values():
            for _ in range(3):  # compiles, and fills what each style caches
                jax.block_until_ready(call())
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(list(styles), len(styles)):
                jax.block_until_ready(styles[name]())  # so that none pays for what another drove out of the caches
                samples[name].append(min(_host_time(styles[name]) for _ in range(3)))
        parameters = len(jax.tree.leaves(eqx.filter(_equinox(layers), eqx.is_array)))
        for name, times in samples.items():
            low, median, high = statistics.quantiles(times, n=4)
            ratio = statistics.median(a / b for a, b in zip(times, samples[RAW], strict=True))
            found.append(Cost(job, parameters, name, median, low, high, ratio))
    return found


def _host_time(call: Callable[[], Any]) -> float:
    start = time.thread_time()
    result = call()
    taken = 1e6 * (time.thread_time() - start)
    jax.block_until_ready(result)
    return taken


def tables(costs: Sequence[Cost]) -> list[Table]:
    """One for each job: styles by number of parameters."""
    sizes, made = sorted({cost.parameters for cost in costs}), []
    for job in JOBS:
        table = Table("style", *(f"{n} parameters" for n in sizes), title=f"host cost of a {job}: {JOBS[job]}")
        for style in dict.fromkeys(cost.style for cost in costs if cost.job == job):
            row = [cost for cost in costs if (cost.job, cost.style) == (job, style)]
            table.add_row(
                style,
                *(f"{c.median:,.0f} µs ({c.low:,.0f}-{c.high:,.0f}), {c.ratio:.2f} x" for n in sizes for c in row
                  if c.parameters == n),
            )  # fmt: skip
        made.append(table)
    return made


def _config(layers: int) -> TransformerConfig:
    return TransformerConfig(
        source_vocab_size=4, target_vocab_size=4, d_model=2, num_heads=1, d_ff=2, num_encoder_layers=layers,
        num_decoder_layers=layers,
    )  # fmt: skip


def _nnx(layers: int) -> nnx_impl.Transformer:
    return nnx_impl.init_transformer(_config(layers), seed=0)


def _equinox(layers: int) -> equinox_impl.Transformer:
    return equinox_impl.init_transformer(_config(layers), seed=0)


def _read(tree: Any, x: jax.Array) -> jax.Array:
    """A number of every array."""
    return x + sum(a.reshape(-1)[0] for a in jax.tree.leaves(tree) if isinstance(a, jax.Array))


def _grown(tree: Any) -> Any:
    """Every array changed."""
    return jax.tree.map(lambda a: a + jnp.ones((), a.dtype) if isinstance(a, jax.Array) else a, tree)


def _forward(layers: int) -> Calls:
    x = jnp.float32(0)
    ours, theirs = _nnx(layers), _equinox(layers)
    flat, named = jax.tree.leaves(ours), nnx_impl.to_weights(ours)
    plain, graph = jax.jit(_read), nnx.jit(_read)
    no_updates, tree_mode = nnx.jit(_read, graph_updates=False), nnx.jit(_read, graph=False, graph_updates=False)
    cached = nnx.cached_partial(nnx.jit(_read), _nnx(layers))
    graphdef, state = nnx.split(ours)
    merged = jax.jit(lambda graphdef, state, x: _read(nnx.merge(graphdef, state), x), static_argnums=0)
    once = jax.jit(lambda state, x: _read(nnx.merge(graphdef, state), x))
    filtered = eqx.filter_jit(_read)
    params, static = eqx.partition(theirs, eqx.is_array)
    combined = jax.jit(lambda params, x: _read(eqx.combine(params, static), x))
    return {
        RAW: lambda: plain(flat, x),
        "jax.jit, dictionary by name": lambda: plain(named, x),
        "nnx.jit": lambda: graph(ours, x),
        "nnx.jit, graph_updates=False": lambda: no_updates(ours, x),
        "nnx.jit, tree mode": lambda: tree_mode(ours, x),
        "nnx.cached_partial": lambda: cached(x),
        "nnx.split each call, jax.jit": lambda: merged(*nnx.split(ours), x),
        "nnx.split once, jax.jit of the State": lambda: once(state, x),
        "jax.jit of the NNX module": lambda: plain(ours, x),
        "nnx_impl.compiled": _bound(nnx_impl.compiled(_read, ours), x),
        "eqx.filter_jit": lambda: filtered(theirs, x),
        "eqx.partition each call, jax.jit": lambda: combined(eqx.partition(theirs, eqx.is_array)[0], x),
        "eqx.partition once, jax.jit of the tree": lambda: combined(params, x),
        "equinox_impl.compiled": _bound(equinox_impl.compiled(_read, theirs), x),
    }


def _decode(layers: int) -> Calls:
    """The cache goes from call to call, and its buffers with it."""
    x = jnp.float32(0)
    ours, theirs = _nnx(layers), _equinox(layers)

    def step(model: Any, cache: list[jax.Array], x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return _read(model, x), _grown(cache)

    def carried(run: Callable[..., tuple[jax.Array, list[jax.Array]]], *before: Any) -> Callable[[], Any]:
        cache = [jnp.zeros((1, 2)) for _ in range(2 * layers)]

        def call() -> jax.Array:
            nonlocal cache
            out, cache = run(*before, cache, x)
            return out

        return call

    plain = jax.jit(step, donate_argnums=1)
    in_graph = nnx.jit(step, donate_argnums=1)
    in_tree = nnx.jit(step, donate_argnums=1, graph=False, graph_updates=False)
    donating = eqx.filter_jit(lambda kept, cache: step(kept[0], cache, kept[1]), donate="all-except-first")
    return {
        RAW: carried(plain, jax.tree.leaves(ours)),
        "nnx.jit": carried(in_graph, ours),
        "nnx.jit, tree mode": carried(in_tree, ours),
        "nnx.cached_partial": carried(nnx.cached_partial(nnx.jit(step, donate_argnums=1), _nnx(layers))),
        "nnx_impl.compiled": carried(nnx_impl.compiled(step, ours, donate=(0,))),
        "eqx.filter_jit": carried(lambda cache, x: donating((theirs, x), cache)),
        "equinox_impl.compiled": carried(equinox_impl.compiled(step, theirs, donate=(0,))),
    }


def _train(layers: int) -> Calls:
    """Everything goes from call to call, and its buffers with it."""
    tx, x = optax.adamw(1e-3), jnp.float32(0)

    def in_nnx() -> tuple[nnx_impl.Transformer, nnx.Optimizer]:
        model = _nnx(layers)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def in_equinox() -> tuple[equinox_impl.Transformer, optax.OptState]:
        model = _equinox(layers)
        return model, tx.init(eqx.filter(model, eqx.is_inexact_array))

    def in_place(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        for tree in (model, optimizer):
            for variable in jax.tree.leaves(tree, is_leaf=lambda v: isinstance(v, nnx.Variable)):
                variable.set_value(_grown(variable.get_value()))
        return x + 1

    def carried(run: Callable[..., tuple[Any, jax.Array]], state: Any) -> Callable[[], Any]:
        def call() -> jax.Array:
            nonlocal state
            state, out = run(state, x)
            return out

        return call

    def held(holder: Any) -> Callable[[], Any]:
        run = jax.jit(
            lambda arrays, x: (type(holder)(*_grown(holder.whole(arrays))).read(), x + 1), donate_argnums=0
        )  # fmt: skip

        def call() -> jax.Array:
            arrays, out = run(holder.read(), x)
            holder.write(arrays)
            return out

        return call

    plain = jax.jit(lambda tree, x: (_grown(tree), x + 1), donate_argnums=0)
    whole, by_name, by_hand = (list(map(jnp.copy, NNXHeld(*in_nnx()).read())), in_nnx(), in_nnx())
    named = {str(i): jnp.copy(array) for i, array in enumerate(NNXHeld(*by_name).read())}
    jitted = nnx.jit(in_place, donate_argnums=(0, 1))
    graph, cached = in_nnx(), nnx.cached_partial(nnx.jit(in_place, donate_argnums=(0, 1)), *in_nnx())
    filtered = eqx.filter_jit(lambda kept, tree: (_grown(tree), kept + 1), donate="all-except-first")
    arrays = eqx.filter(in_equinox(), eqx.is_array)
    merged = jax.jit(lambda graphdef, state, x: _changed(in_place, graphdef, state, x), static_argnums=0)

    def split_each_call() -> jax.Array:
        graphdef, state = nnx.split(by_hand)
        state, out = merged(graphdef, state, x)
        nnx.update(by_hand, state)
        return out

    return {
        RAW: carried(plain, whole),
        "jax.jit, dictionary by name": carried(plain, named),
        "nnx.jit": lambda: jitted(*graph, x),
        "nnx.cached_partial": lambda: cached(x),
        "nnx.split and update each call, jax.jit": split_each_call,
        "nnx.split once, jax.jit of the State": carried(plain, nnx.split(in_nnx())[1]),
        "nnx_impl.Trainer's way": held(NNXHeld(*in_nnx())),
        "eqx.filter_jit": carried(lambda tree, x: filtered(x, tree), in_equinox()),
        "eqx.partition once, jax.jit of the tree": carried(plain, arrays),
        "equinox_impl.Trainer's way": held(EquinoxHeld(*in_equinox())),
    }


def _changed(in_place: Callable, graphdef: Any, state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    model, optimizer = nnx.merge(graphdef, state)
    out = in_place(model, optimizer, x)
    return nnx.state((model, optimizer)), out


def _bound(run: Callable[..., Any], x: jax.Array) -> Callable[[], Any]:
    return lambda: run(x)
