"""Strict JAX modes and a deterministic hypothesis profile for every test."""

import gc
import os
import tracemalloc
from importlib.metadata import version

# Two test processes keep two cores busy. Threads of BLAS and PyTorch would wait for each other, and
# take ten times as long for a factorization. NumPy reads these names when it is imported.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

# Many modules and the programs that they start compile the same programs of the same tiny models.
os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    # Otherwise the key of a program would depend on the folder's path.
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    # One process may read a program that another is writing. It then compiles the program itself.
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache",
}

import jax
import pytest
from hypothesis import settings

# They also compile faster without threads of their own. The older code generator, which jaxlib 0.10
# still has, takes half the time where programs may be slow.
XLA_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
QUICK = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
if QUICK and version("jaxlib").startswith("0.10."):
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS])

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

# Programs and traces stay in memory, so each collection of garbage takes longer than the last.
gc.set_threshold(50_000, 20, 50)

settings.register_profile("prox24", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("prox24")


def pytest_ignore_collect(collection_path, config):
    """Skips the files without tests of `-m optimized`, since their imports take time."""
    if config.option.markexpr.startswith("optimized") and collection_path.suffix == ".py":
        return "optimized" not in collection_path.read_text() or None
    return None


# A process takes one file after the other. Long files come first, so that no process waits for
# the other at the end.
LONG_FILES = ("own_models", "examples", "benchmarks", "sharding", "solvers", "prune_params", "prox")


def pytest_collection_modifyitems(items):
    """Puts the tests of `LONG_FILES` first."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG_FILES)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The processes of a run share compiled programs and kernels: many are equal.

    JAX's own variable names a folder that several runs share.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    os.environ["PROX24_CACHE"] = str(folder / "kernels")


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """A long session does not keep the programs of every module."""
    yield
    jax.clear_caches()


@pytest.fixture
def little_memory():
    """Fails a test that takes more than a MiB at any time."""
    tracemalloc.start(1)
    before, _ = tracemalloc.get_traced_memory()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 2**20


@pytest.fixture
def standard_promotion():
    """JAX's own modes: Flax, Equinox and the optimizers of optax mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
