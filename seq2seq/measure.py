"""What one frontend costs, measured in a process of its own: `python -m seq2seq.measure nnx CONFIG.json`."""

import ast
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import token
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from core.config import TransformerConfig
from seq2seq.batches import Pair, batch
from seq2seq.frontends import frontend
from seq2seq.optimizer import make_optimizer
from seq2seq.options import TrainingOptions

_NOT_CODE = {token.COMMENT, token.NL, token.NEWLINE, token.INDENT, token.DEDENT, token.ENDMARKER, token.ENCODING}


def measure_alone(name: str, config: TransformerConfig) -> dict[str, float]:
    """`measure` in a fresh process, so that memory and start-up are this frontend's alone."""
    command = [sys.executable, "-m", "seq2seq.measure", name, config.to_json()]
    # the programs are equal: a compilation cache would spare the second frontend what the first one paid for
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    here = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(name: str, config: TransformerConfig) -> dict[str, float]:
    """Seconds to build the model and to compile its train step; host overhead of a step; peak memory."""
    options, package = TrainingOptions(), frontend(name)
    built, model = timed(lambda: package.init_transformer(config, seed=0))
    trainer = package.Trainer(model, make_optimizer(options), label_smoothing=options.label_smoothing)
    data = _batch(config, rows=256, length=8)
    first, _ = timed(trainer.train, data)
    later = statistics.median(timed(trainer.train, data)[0] for _ in range(5))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    return {
        "build_s": built,
        "compile_s": first - later,
        "peak_memory_mib": peak,
        "host_overhead_ms": _host_overhead(package, config, options),
    }


def _host_overhead(package: Any, config: TransformerConfig, options: TrainingOptions) -> float:
    """Milliseconds that a step of the frontend adds to the same step as a raw compiled function.

    On a model with the same leaves but tiny arrays, so that what is left is the host's work.
    """
    width = 2 * config.num_heads
    tiny = config.replace(d_model=width, d_ff=4, source_vocab_size=8, target_vocab_size=8, num_kv_heads=None)
    tx, data = make_optimizer(options), _batch(tiny, rows=1, length=2)
    weights = package.to_weights(package.init_transformer(tiny, seed=0))
    trainer = package.Trainer(package.from_weights(tiny, weights), tx)
    state = jax.tree.map(jnp.copy, trainer.optimizer_state())
    key, n = jax.random.key(0), jnp.uint32(0)
    step = jax.jit(package.functional_step(tiny, tx), donate_argnums=(0, 1))
    raw = step.lower(weights, state, data, key, n).compile()
    framework_times, raw_times = [], []
    jax.block_until_ready(trainer.train(data))
    for _ in range(60):
        framework_times.append(timed(trainer.train, data)[0])
        taken, (weights, state, _) = timed(raw, weights, state, data, key, n)
        raw_times.append(taken)
    framework_ms, raw_ms = (1000 * statistics.median(times) for times in (framework_times, raw_times))
    return framework_ms - raw_ms


def lines_of_code(package: Any) -> int:
    """Lines of a package that hold code: no comments, docstrings or blank lines."""
    number = 0
    for path in sorted(Path(package.__file__).parent.glob("*.py")):
        text = path.read_text()
        docstrings = {
            line
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        spans = (
            range(word.start[0], word.end[0] + 1)
            for word in tokenize.generate_tokens(io.StringIO(text).readline)
            if word.type not in _NOT_CODE
        )
        number += len({line for span in spans for line in span} - docstrings)
    return number


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds until the result is there, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


def _batch(config: TransformerConfig, *, rows: int, length: int) -> Any:
    symbols = range(3, min(config.vocab_size("source"), config.vocab_size("target")))
    row = tuple(symbols[i % len(symbols)] for i in range(length - 1))
    return batch([Pair(row, row)] * rows, length, rows)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], TransformerConfig.from_json(sys.argv[2]))))
