"""Strict numerics, typed signatures and Hypothesis profiles for the whole suite."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs are the same, but LLVM leaves them as XLA wrote them. XLA writes them by its older emitters, in half the
# time, and in one thread: two workers have no more cores. A flag that a later XLA does not know would end the process.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    quickly = "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quickly}".strip()

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

import tests.typecheck  # noqa: F401  the hook below finds it by name

ROOT = Path(__file__).parent.parent

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/jax")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a quarter is what another test compiled

gc.set_threshold(50_000, 20, 20)  # traces make many objects and little garbage: looking for it took a sixth of the time

# every signature in the three packages is checked at run time: shapes, axes and dtypes
jaxtyping.install_import_hook(["core", "nnx_impl", "equinox_impl"], "tests.typecheck.checked")

_SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
# 20 examples in ci as in dev, to stay below 15 minutes on two cores; for more there is nightly, by `make nightly`
settings.register_profile("dev", max_examples=20, **_SLOW_IS_FINE)
settings.register_profile(
    "ci", parent=settings.get_profile("ci"), max_examples=20, derandomize=True, database=None, **_SLOW_IS_FINE
)
settings.register_profile(  # from Hypothesis's own default: that of CI=1 draws the same each night and keeps nothing
    "nightly", parent=settings.get_profile("default"), max_examples=1000, print_blob=True, **_SLOW_IS_FINE
)
settings.register_profile("mutation", max_examples=8, derandomize=True, database=None, **_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


OPTIMISED = {f"tests.test_{name}" for name in ("attention", "attention_oracle", "losses", "vocabulary")}
"""Whose subject is rounding: optimised by LLVM. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles all as users do."""


@pytest.fixture(scope="module", autouse=True)
def _programs(request):
    """A compiled program takes some 24 memory maps, of which Linux gives a process 65530: then XLA crashes."""
    quickly = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and request.module.__name__ not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", quickly)
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
