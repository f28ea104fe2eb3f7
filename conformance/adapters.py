"""What the kit is pointed at: a function under a name, with the flags of what it can do.

Each kind fixes one plain signature. Arrays go in as NumPy and come out as anything that NumPy can read. A law that
needs a flag which an adapter lacks is skipped, and reported as "not offered". The flag `jax` says that the function
may be traced: the kit then compiles it, and takes its gradients.
"""

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

ANY_FUNCTION = {
    "jax": "may be traced by JAX: compiled, mapped and differentiated",
    "bfloat16": "takes bfloat16",
    "float16": "takes float16",
    "float64": "computes in float64 where the inputs are (JAX: under enable_x64)",
}


@dataclass(frozen=True)
class Adapter:
    """One implementation of one kind. `context` is entered around each call."""

    name: str
    function: Callable[..., Any]
    can: Set[str] = frozenset()
    context: Callable[[], AbstractContextManager] = nullcontext

    kind: ClassVar[str]
    flags: ClassVar[dict[str, str]]

    needs: ClassVar[dict[str, str | None]] = {"function": None}
    """What must be callable, and the flag that asks for it, or None."""

    def __post_init__(self):
        named = f"{type(self).__name__} {self.name!r}"
        if isinstance(self.can, str):
            raise TypeError(f"the flags of {named} must be a set of names, got {self.can!r}; give {{{self.can!r}}}")
        object.__setattr__(self, "can", frozenset(self.can))
        if unknown := sorted(self.can - self.flags.keys()):
            meant = difflib.get_close_matches(unknown[0], self.flags, 1)
            raise ValueError(
                f"{named} can do {unknown}, which is unknown; {f'perhaps {meant[0]!r} is meant; ' if meant else ''}"
                f"the flags are {', '.join(sorted(self.flags))}"
            )
        for part, flag in self.needs.items():
            if (flag is None or flag in self.can) and not callable(getattr(self, part)):
                because = "" if flag is None else f", for it has the flag {flag!r}"
                raise TypeError(f"{named} needs a {part} that can be called{because}, got {getattr(self, part)!r}")

    def __call__(self, *arrays, **options):
        with self.context():
            return as_numpy(self._compiled(*arrays, **options))

    def eager(self, *arrays, **options):
        """The call as a user makes it outside of jit."""
        with self.context():
            return as_numpy(self.function(*on_device(arrays), **on_device(options)))

    def mapped(self, *arrays, **options):
        """`jax.vmap` over the first axis of every array."""
        with self.context():
            return as_numpy(self._mapped(*arrays, **options))

    def pull_back(self, cotangent, *arrays, **options):
        """The gradients of <cotangent, function(*arrays)> by each of the arrays."""
        with self.context():
            return as_numpy(self._pulled(cotangent, *arrays, **options))

    def careful(self, *arrays, **options):
        """The call and its gradients, operation by operation: raises where NaN is made, or a key is used twice."""
        import jax

        from conformance.stepwise import stepwise

        def both(*arrays):
            out, pull = jax.vjp(lambda *x: self.function(*x, **options), *arrays)
            return out, *pull(jax.numpy.ones_like(out))

        options = on_device(options)
        with jax.debug_key_reuse(True), self.context():
            return as_numpy(stepwise(both, *on_device(arrays)))

    def wide(self) -> AbstractContextManager:
        """Where float64 is float64."""
        if "jax" not in self.can:
            return nullcontext()
        import jax

        return jax.enable_x64(True)

    @functools.cached_property
    def _compiled(self):
        return compiled(self.function) if "jax" in self.can else self.function

    @functools.cached_property
    def _mapped(self):
        import jax

        def mapped(*arrays, **options):
            traced, static = separate(options)
            call = lambda arrays, traced: self.function(*arrays, **traced, **static)
            return jax.vmap(call)(arrays, traced)

        return compiled(mapped)

    @functools.cached_property
    def _pulled(self):
        import jax

        def pulled(cotangent, *arrays, **options):
            return jax.vjp(lambda *x: self.function(*x, **options), *arrays)[1](cotangent)

        return compiled(pulled)


class Attention(Adapter):
    """function(q [*B, T, N, H], k [*B, S, K, H], v [*B, S, K, Hv], **options) -> [*B, T, N, Hv].

    *B is one axis, N = K and H = Hv unless a flag says more. Each option is given only where its flag is set.
    """

    kind = "attention"
    flags = ANY_FUNCTION | {
        "leading axes": "any number of axes before T, none included",
        "grouped heads": "K key heads below N query heads",
        "value width": "values of another width than keys",
        "empty": "T = 0, S = 0 or no rows",
        "mask": "mask=, bool [*B, N, T, S], True where a query may attend",
        "broadcast mask": "the mask's axes may be 1",
        "bias": "bias=, float [*B, N, T, S], added to the scaled logits",
        "causal": "causal=True, with T = S",
        "offset": "q_offset=, int32 [*B]: query t stands at q_offset + t, key s at s",
        "window": "window=(left, right): how many keys before and after its own position a query sees",
        "scale": "scale=, a float instead of 1 / sqrt(H)",
        "soft cap": "soft_cap=c: logits become c tanh(logits / c), before the bias",
        "sinks": "sinks=, float [N]: one more logit a head, which has no value",
        "combined": "any of these options together",
        "dropout": "dropout_rate= and dropout_seed=, a uint32; without a seed it is evaluation",
    }


class Norm(Adapter):
    """function(x [*B, D], scale [D], bias [D] (only with the flag), *, epsilon) -> [*B, D]."""

    kind = "norm"
    flags = ANY_FUNCTION | {
        "centre": "subtracts the mean (layer norm; without it, RMS norm)",
        "bias": "takes a bias",
    }


class Rotary(Adapter):
    """function(x [*B, T, N, H], *, theta, positions (int32 [*B, T], only with the flag)) -> the same shape."""

    kind = "rotary"
    flags = ANY_FUNCTION | {
        "positions": "positions of the tokens; without it they are 0, 1, 2, ...",
        "odd width": "takes an odd H",
    }


class Dropout(Adapter):
    """function(x, *, rate, seed (a uint32, absent in evaluation)) -> the same shape."""

    kind = "dropout"
    flags = ANY_FUNCTION


class Sinusoid(Adapter):
    """function(*, length, d_model) -> table [length, d_model]."""

    kind = "sinusoidal table"
    flags: ClassVar = {"odd width": "takes an odd d_model"}


class Buckets(Adapter):
    """function(distances (int32, key minus query), *, bidirectional, num_buckets, max_distance) -> int, same shape."""

    kind = "T5 buckets"
    flags: ClassVar = {"jax": ANY_FUNCTION["jax"]}


class Slopes(Adapter):
    """function(*, num_heads) -> slopes [num_heads], positive."""

    kind = "ALiBi slopes"
    flags: ClassVar = {}


class RelativeShift(Adapter):
    """function(x [*B, T, T + S - 1]) -> [*B, T, S], out[i, j] = x[i, T - 1 - i + j]."""

    kind = "relative shift"
    flags: ClassVar = {"jax": ANY_FUNCTION["jax"], "leading axes": "any number of axes before T"}


class Loss(Adapter):
    """function(logits [B, T, V], labels int32 [B, T], weights float [B, T], *, label_smoothing) -> mean, a scalar."""

    kind = "loss"
    flags = ANY_FUNCTION | {"smoothing": "label_smoothing above 0"}


@dataclass(frozen=True)
class WeightsFile(Adapter):
    """function(path, {name: array}) writes a file, load(path) -> {name: array} reads it."""

    load: Callable[..., Any] = None  # type: ignore[assignment]

    needs: ClassVar = {"function": None, "load": None}
    kind = "weights file"
    flags: ClassVar = {
        "bfloat16": ANY_FUNCTION["bfloat16"],
        "safetensors": "the file is in the safetensors format",
        "checksum": "promises to refuse any changed bit",
    }


class Stateful(Adapter):
    """One whose function gives (numbers, state)."""

    def __call__(self, *arrays, **options):
        with self.context():
            out, state = self.function(*arrays, **options)
            return np.asarray(out), state


@dataclass(frozen=True)
class Cache(Stateful):
    """Causal attention in steps: function(state, x [B, T, width]) -> (out [B, T, ...], state).

    States are never changed in place. `start(rows, capacity)` is an empty state, `full(x)` the same attention
    without a cache. `select(state, rows)` picks rows, `truncate(state, lengths [B])` forgets the tail of each row.
    `tolerance` is how far an output may lie from the full forward's: 2e-5 in float32, 1e-12 where all is float64.
    """

    width: int = 0
    start: Callable[..., Any] = None  # type: ignore[assignment]
    full: Callable[..., Any] = None  # type: ignore[assignment]
    select: Callable[..., Any] | None = None
    truncate: Callable[..., Any] | None = None
    tolerance: float = 2e-5

    needs: ClassVar = {
        **dict.fromkeys(("function", "start", "full")),
        **{"select": "reorder", "truncate": "truncate"},
    }
    kind = "cache"
    flags: ClassVar = {
        "chunks": "T above 1 in a step",
        "reorder": "select",
        "truncate": "truncate, all rows to one length",
        "ragged": "truncate, each row to its own length",
    }


@dataclass(frozen=True)
class Run(Stateful):
    """A training that may be stopped: function(state, steps) -> (losses [steps], state), from where the state stands.

    `start(seed)` is the state before the first step, `save(folder, state)` writes it into a folder that it makes, and
    `load(folder)` reads it, in another process too. A state that was handed on is not used again.
    """

    start: Callable[..., Any] = None  # type: ignore[assignment]
    save: Callable[..., Any] = None  # type: ignore[assignment]
    load: Callable[..., Any] = None  # type: ignore[assignment]

    needs: ClassVar = dict.fromkeys(("function", "start", "save", "load"))
    kind = "training run"
    flags: ClassVar = {}


class Search(Adapter):
    """function(table [B, L, V, V], first int32 [B], *, max_length, beam_size, eos, pad, **options) -> int [B, L].

    Beam search, L = max_length: of each row the best hypothesis, with its end token `eos`, then padding. The model is
    the table: after a row was fed the tokens t_0 = first, t_1, ..., t_n, the logits of the next one are
    table[row, n, (t_n + t_0 + t_1 + ... + t_n) % V]. So the sum is the cache, and it must follow its hypothesis.
    """

    kind = "beam search"
    flags: ClassVar = {
        "jax": ANY_FUNCTION["jax"],
        "length penalty": "length_penalty=a: the score is log P / ((5 + length) / 6)^a; without it, log P",
    }


class Sampling(Adapter):
    """function(logits [B, V], *, seed (a uint32), **options) -> int [B]: one token a row, each drawn by itself."""

    kind = "sampling"
    flags: ClassVar = {
        "jax": ANY_FUNCTION["jax"],
        "temperature": "temperature=, above 0",
        "top k": "top_k=, from 1 to V",
        "top p": "top_p=, above 0 and at most 1; all flags that are set also together",
    }


KINDS = (
    Attention, Norm, Rotary, Dropout, Sinusoid, Buckets, Slopes, RelativeShift, Loss, WeightsFile, Cache, Search,
    Sampling,
)  # fmt: skip


def separate(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that are arrays, and those that are not."""
    arrays = {name: x for name, x in options.items() if hasattr(x, "dtype")}
    return arrays, {name: x for name, x in options.items() if name not in arrays}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` where arrays are traced and all other options are constants."""
    import jax

    @functools.cache
    def with_constants(constants):
        return jax.jit(lambda arrays, traced: function(*arrays, **traced, **dict(constants)))

    def call(*arrays, **options):
        traced, static = separate(options)
        return with_constants(tuple(sorted(static.items())))(arrays, traced)

    return call


def on_device(tree):
    """The same with JAX arrays for NumPy's."""
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "dtype") else x, tree)


def as_numpy(tree):
    """The same with NumPy arrays for those of any library."""
    return tuple(map(np.asarray, tree)) if isinstance(tree, tuple | list) else np.asarray(tree)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """JAX as it comes: ranks and dtypes are promoted. The peers rely on it."""
    import jax

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
