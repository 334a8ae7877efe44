"""The cache of compiled programs: kept, bounded, of one processor, and never in the way."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from prox24._cli import compiled

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, where JAX has none yet."""
    before = {name: jax.config.values[name] for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # In place of pyproject.toml's filters.
        yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled_anew():
    """Compiles a program; equal ones are not in memory any more."""
    jax.clear_caches()
    return jax.jit(lambda x: jnp.sin(x) * 3)(np.arange(5, dtype=np.float32))


def programs(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}


def test_a_program_is_read_the_second_time(cache):
    compiled.keep_programs()
    first = compiled_anew()
    written = programs(cache)
    assert written
    np.testing.assert_array_equal(compiled_anew(), first)
    assert programs(cache) == written


def test_a_damaged_entry_costs_a_compilation_and_no_line(cache, capfd):
    compiled.keep_programs()
    first = compiled_anew()
    for path in programs(cache):
        path.write_bytes(b"damaged")
    np.testing.assert_array_equal(compiled_anew(), first)
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_is_full_costs_no_line(cache, capfd):
    resource = pytest.importorskip("resource")
    compiled.keep_programs()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))  # bytes of a file
    try:
        first = compiled_anew()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    np.testing.assert_array_equal(compiled_anew(), first)
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_written_is_not_used(cache, monkeypatch):
    cache.parent.joinpath("cache").write_text("a file where the folder would be")
    compiled.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    monkeypatch.delenv("PROX24_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError()))
    compiled.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.parametrize("who", ["environment", "jax"])
def test_the_user_decides(cache, monkeypatch, who):
    if who == "environment":
        monkeypatch.setenv(compiled.OFF, "1")
    else:
        jax.config.update("jax_compilation_cache_dir", str(cache.parent))
    before = jax.config.values["jax_compilation_cache_dir"]
    compiled.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == before
    assert not cache.exists()


def test_each_processor_has_its_folder_and_the_latest_stay(cache, monkeypatch):
    for number in range(compiled.MOST_FOLDERS + 2):
        monkeypatch.setattr(compiled, "_processor", lambda number=number: f"processor {number}")
        jax.config.update("jax_compilation_cache_dir", None)
        compiled.keep_programs()
        folder = jax.config.values["jax_compilation_cache_dir"]
        os.utime(folder, (number, number))
    assert len(list(cache.iterdir())) == compiled.MOST_FOLDERS
    assert os.path.isdir(folder)
