"""The memory that attention takes beside its inputs, by length: `python -m bench memory`.

XLA's own account of the compiled program, `memory_analysis()`: temporary buffers and the output. Nothing is run, so
nothing else on the machine can be seen in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from bench.speed import KINDS, jax_contenders

LENGTHS = (256, 1024, 4096)


class Memory(NamedTuple):
    """Bytes of one program."""

    length: int
    implementation: str
    kind: str
    bytes: int


def attention_memory(lengths: Sequence[int] = LENGTHS) -> list[Memory]:
    """Of causal attention, B=4, N=8, H=64, float32, forward and with its gradient."""
    found = []
    for length in lengths:
        inputs = [jax.ShapeDtypeStruct((4, length, 8, 64), jnp.float32)] * 3
        for name, (_, *programs) in jax_contenders(length).items():
            for kind, program in zip(KINDS, programs, strict=True):
                account = jax.jit(program).lower(*inputs).compile().memory_analysis()
                if account is None:
                    raise RuntimeError(
                        f"XLA must account for memory, got nothing on {jax.default_backend()}; use a CPU"
                    )
                taken = account.temp_size_in_bytes + account.output_size_in_bytes
                found.append(Memory(length, name, kind, taken))
    return found


def tables(found: Sequence[Memory]) -> list[Table]:
    """Implementations by length, in MiB."""
    lengths, made = sorted({one.length for one in found}), []
    for kind in KINDS:
        table = Table("MiB", *(f"T = {length}" for length in lengths), title=f"memory of attention, {kind}")
        for name in dict.fromkeys(one.implementation for one in found):
            row = {one.length: one.bytes for one in found if (one.implementation, one.kind) == (name, kind)}
            table.add_row(name, *(f"{row[length] / 2**20:,.1f}" for length in lengths))
        made.append(table)
    return made
