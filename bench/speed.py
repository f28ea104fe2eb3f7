"""Our attention beside the peers', on the same numbers, in turn: `python -m bench speed`."""

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

from bench.turns import in_turn
from core.attention import IMPLEMENTATIONS, dot_product_attention

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROUNDS = 9
KINDS = ("forward", "forward + backward")
LONG = 4096  # beyond it only what holds no logits of the whole is measured: the others want tens of gigabytes
IN_BLOCKS = ("isoformer", "isoformer, blockwise", "torch")
Attention = Callable[[Any, Any, Any], Any]


class Time(NamedTuple):
    """Seconds of one program: the least, which other work on the machine hardly touches, and the median."""

    length: int
    implementation: str
    kind: str
    least: float
    median: float


def attention_times(lengths: Sequence[int] = LENGTHS, *, rounds: int = ROUNDS, causal: bool = True) -> list[Time]:
    """Of attention, N=8, H=64, float32, forward and with its gradient; ours first."""
    return [time for length in lengths for time in _times(length, rounds, causal)]


def batch_rows(length: int) -> int:
    """B: one row where four of them would make logits of gigabytes."""
    return 4 if length < 2048 else 1


def _times(length: int, rounds: int, causal: bool) -> list[Time]:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((batch_rows(length), length, 8, 64)).astype(np.float32) for _ in range(3)]
    contenders = {}
    for name, (convert, *programs) in (jax_contenders(length, causal=causal) | _torch_contenders(causal)).items():
        if length > LONG and name not in IN_BLOCKS:
            continue
        arguments = [convert(array) for array in inputs]
        contenders[name] = {kind: partial(do, *arguments) for kind, do in zip(KINDS, programs, strict=True)}
    return timed_in_turn(contenders, length, rounds)


def timed_in_turn(contenders: Mapping[str, Mapping[str, Callable[[], Any]]], length: int, rounds: int) -> list[Time]:
    """The times of contenders by name and kind; AssertionError unless forward they give what the first one gives."""
    wanted: np.ndarray | None = None
    for name, programs in contenders.items():
        found = np.asarray(programs["forward"]())
        wanted = found if wanted is None else wanted
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    programs = {(name, kind): program for name, kinds in contenders.items() for kind, program in kinds.items()}
    samples = in_turn(programs, rounds=rounds)
    return [Time(length, name, kind, min(times), statistics.median(times)) for (name, kind), times in samples.items()]


def tables(found: Sequence[Time], *, title: str = "attention") -> list[Table]:
    """One for each kind: implementations by length, beside ours."""
    made = []
    for kind in KINDS:
        table = Table("T = S", "implementation", "median", "least", "ours / theirs", title=f"{title}, {kind}")
        for length in dict.fromkeys(time.length for time in found):
            rows = [time for time in found if (time.length, time.kind) == (length, kind)]
            for row in rows:
                times = (f"{1000 * seconds:.2f} ms" for seconds in (row.median, row.least))
                table.add_row(str(length), row.implementation, *times, f"{rows[0].least / row.least:.2f}")
        made.append(table)
    return made


def jax_contenders(length: int, *, causal: bool = True) -> dict[str, tuple[Callable, Attention, Attention]]:
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None] if causal else None
    ours = lambda implementation: partial(dot_product_attention, causal=causal, implementation=implementation)
    functions = {
        "isoformer": ours(None),
        **{f"isoformer, {name}": ours(name) for name in IMPLEMENTATIONS},
        "jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal),
        "flax.nnx": lambda q, k, v: nnx.dot_product_attention(q, k, v, mask=mask),
    }
    return {
        name: (jnp.asarray, jax.jit(function), jax.jit(_with_gradient(function)))
        for name, function in functions.items()
    }


def _with_gradient(function: Attention) -> Attention:
    return jax.grad(lambda q, k, v: jnp.square(function(q, k, v)).sum(), argnums=(0, 1, 2))


def _torch_contenders(causal: bool) -> dict[str, tuple[Callable, Attention, Attention]]:
    """PyTorch's fused kernel, where the torch extra is installed; with as many threads as XLA has."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        return {}
    scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention

    def convert(array):  # PyTorch wants heads before positions
        return torch.from_numpy(array.swapaxes(1, 2).copy()).requires_grad_()

    def forward(q, k, v):
        with torch.no_grad():
            return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).numpy()

    def both(q, k, v):
        loss = scaled_dot_product_attention(q, k, v, is_causal=causal).square().sum()
        return [gradient.numpy() for gradient in torch.autograd.grad(loss, (q, k, v))]

    return {"torch": (convert, forward, both)}
