"""A failure as a few lines of Python to paste into an issue."""

import base64
import re
import zlib

import numpy as np

from conformance.law import Call, Verdict

MANY = 400
"""Numbers above which an array is written compressed."""
NAMES = {
    "attention": ("q", "k", "v"),
    "norm": ("x", "scale", "bias"),
    "loss": ("logits", "labels", "weights"),
    "beam search": ("table", "first"),
    "sampling": ("logits",),
}


def snippet(target: str, verdict: Verdict) -> str:
    """Code that makes the calls of the smallest failing case again, and prints what they give or raise."""
    failure = verdict.failure
    if failure is None:
        raise ValueError(f"the law {verdict.law.name!r} did not fail")
    module, _, name = target.partition(":")
    head = [
        f"# law: {verdict.law.name}",
        *(f"# {line}" for line in failure.message.splitlines()),
        "import numpy as np",
        f"import {module} as target",
        "",
        f"adapter = target.{name}",
    ]
    calls = failure.calls if len(failure.calls) <= 3 else (failure.calls[0], failure.calls[-1])
    if not calls or not all(map(_is_plain, calls)):
        law = f"named({verdict.law.name!r}).check(adapter, {failure.case!r})  # raises what stands above"
        return "\n".join([*head[:-3], "from conformance.laws import named", *head[-3:], law, ""])
    body = _Body(NAMES.get(verdict.law.kind.kind, ("x", "y", "z")))
    lines = [body.call(call) for call in calls]
    if any(array.dtype == np.float64 for array in body.arrays) and "jax" in verdict.law.kind.flags:
        head.insert(-2, "import jax")
        head.insert(-1, 'jax.config.update("jax_enable_x64", True)')
    if any(array.dtype.name == "bfloat16" for array in body.arrays):
        head.insert(-3, "import ml_dtypes")
    text = "\n".join([*body.lines, *lines])
    if re.search(r"\b(nan|inf)\b", text):
        head.insert(-3, "from numpy import inf, nan")
    if "zlib" in text:
        head[-4:-4] = ["import base64", "import zlib", ""]
    return "\n".join([*head, *body.lines, *lines, ""])


def _is_plain(call: Call) -> bool:
    return call.method != "load" and all(isinstance(x, np.ndarray | np.generic) for x in call.arrays)


class _Body:
    """The arrays of all calls, each under one name."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.arrays, self.lines, self.taken = names, [], [], []

    def call(self, call: Call) -> str:
        names = ("cotangent", *self.names) if call.method == "pull_back" else self.names
        arguments = [self.name(x, names[i] if i < len(names) else "more") for i, x in enumerate(call.arrays)]
        for option, x in call.options.items():
            shown = self.name(x, option) if isinstance(x, np.ndarray) else _scalar(x)
            arguments.append(f"{option}={shown}")
        method = f".{call.method}" if call.method else ""
        printed = f"print(adapter{method}({', '.join(arguments)}))"
        if not isinstance(call.result, Exception):
            return printed
        return f"try:\n    {printed}\nexcept Exception as error:\n    print(type(error).__name__, error)"

    def name(self, x, wish: str) -> str:
        if not isinstance(x, np.ndarray):
            return _scalar(x)
        for array, name in zip(self.arrays, self.taken, strict=True):
            if array.dtype == x.dtype and array.shape == x.shape and array.tobytes() == x.tobytes():
                return name
        name = wish if wish not in self.taken else f"{wish}{len(self.taken)}"
        self.arrays.append(x)
        self.taken.append(name)
        self.lines.append(f"{name} = {literal(x)}")
        return name


def _scalar(x) -> str:
    return f"np.{x.dtype}({x})" if isinstance(x, np.generic) else repr(x)


def literal(x: np.ndarray) -> str:
    """An expression that gives the array in every bit, but for the payload of NaN."""
    dtype = "ml_dtypes.bfloat16" if x.dtype.name == "bfloat16" else f"np.{x.dtype}" if x.dtype != bool else "bool"
    if x.size == 0:
        return f"np.zeros({x.shape}, {dtype})"
    if x.size <= MANY:
        wide = x.astype(np.float32) if x.dtype.name == "bfloat16" else x
        shown = np.array2string(wide, separator=", ", threshold=MANY + 1, floatmode="unique", max_line_width=100)
        return f"np.array({shown}, {dtype})"
    packed = base64.b85encode(zlib.compress(np.ascontiguousarray(x).tobytes(), 9)).decode()
    return f'np.frombuffer(zlib.decompress(base64.b85decode("{packed}")), {dtype}).reshape{x.shape}'
