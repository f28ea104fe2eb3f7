"""Who may import whom."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGES = ("core", "nnx_impl", "equinox_impl", "seq2seq", "bench", "conformance")
FORBIDDEN = {
    "core": {"flax", "equinox", "optax", "orbax", "nnx_impl", "equinox_impl", "seq2seq", "bench", "tests"},
    "nnx_impl": {"equinox", "orbax", "equinox_impl", "seq2seq", "bench", "tests"},
    "equinox_impl": {"flax", "orbax", "nnx_impl", "seq2seq", "bench", "tests"},
    "seq2seq": {"flax", "equinox", "nnx_impl", "equinox_impl", "bench", "tests"},
    "bench": {"tests"},
    "conformance": {"core", "nnx_impl", "equinox_impl", "seq2seq", "bench", "tests"},  # its subjects aside
}
ALLOWED_IN_CORE = {"core", "jax", "jaxtyping", "numpy", "safetensors", *sys.stdlib_module_names}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    for path in sorted((ROOT / package).glob("*.py")):
        found = imported(path)
        assert not found & FORBIDDEN[package], f"{path.name} imports {sorted(found & FORBIDDEN[package])}"
        if package == "core":
            assert found <= ALLOWED_IN_CORE, f"{path.name} imports {sorted(found - ALLOWED_IN_CORE)}"


@pytest.mark.parametrize(
    ("package", "other"), [("nnx_impl", "equinox"), ("equinox_impl", "flax"), ("core", "flax"), ("core", "equinox")]
)
def test_a_frontend_works_where_the_other_framework_is_missing(package, other):
    code = f"import sys; sys.modules[{other!r}] = None; import {package}"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names
