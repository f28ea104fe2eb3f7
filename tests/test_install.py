"""Each frontend installs and works in a clean environment that has only its own framework."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

WORKS = """
import importlib.util, jax, jax.numpy as jnp
assert importlib.util.find_spec("{other}") is None and importlib.util.find_spec("tests") is None
from {package} import TransformerConfig, generate, init_transformer
config = TransformerConfig(source_vocab_size=9, target_vocab_size=9, d_model=8, num_heads=2, d_ff=8,
                           num_encoder_layers=1, num_decoder_layers=1)
print(generate(init_transformer(config, seed=0), jnp.array([[3, 4, 5]]), max_length=4).shape)
"""


@pytest.mark.install
@pytest.mark.parametrize(
    ("extra", "package", "other"), [("nnx", "nnx_impl", "equinox"), ("equinox", "equinox_impl", "flax")]
)
def test_a_frontend_installs_without_the_other_framework(extra, package, other, tmp_path):
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    copy = tmp_path / "source"  # a build leaves folders behind
    subprocess.run(["git", "clone", "--quiet", ROOT, copy], check=True)
    versions = ["--constraint", ROOT / "requirements.lock"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *versions, f"{copy}[{extra}]"], check=True)
    code = WORKS.format(package=package, other=other)
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 4)\n", done.stderr
