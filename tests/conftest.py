"""Strict numerics, typed signatures and Hypothesis profiles for the whole suite."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# the programs are the same, but each compiled by one thread: two workers have no more cores than that
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1".strip()

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

import tests.typecheck  # noqa: F401  the hook below finds it by name

ROOT = Path(__file__).parent.parent

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/jax")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a quarter is what another test compiled

# every signature in the three packages is checked at run time: shapes, axes and dtypes
jaxtyping.install_import_hook(["core", "nnx_impl", "equinox_impl"], "tests.typecheck.checked")

_SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=20, **_SLOW_IS_FINE)
settings.register_profile(
    "ci", parent=settings.get_profile("ci"), max_examples=20, derandomize=True, database=None, **_SLOW_IS_FINE
)
settings.register_profile("nightly", max_examples=1000, print_blob=True, **_SLOW_IS_FINE)
settings.register_profile("mutation", max_examples=8, derandomize=True, database=None, **_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go():
    """A compiled program takes some 24 memory maps, of which Linux gives a process 65530: then XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def untyped():
    """Signatures unchecked, so that bad input reaches the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
