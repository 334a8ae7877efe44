"""Products with packed weights against float64, the choice of an implementation, native kernels."""

import dataclasses
import functools
import itertools
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from reference import assert_close, eps_of
from test_packed import random_24

from prox24.packed import matmul, pack, unpack
from prox24.packed._choice import AUTO, IMPLEMENTATIONS, UNPACK, Case, choose
from prox24.packed._kernels import cpu, native, tpu, xla

HAS_COMPILER = any(shutil.which(name) for name in native.CPP_COMPILERS)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")


def operands(batch, outputs, inputs, dtype="float32", seed=0):
    x = np.random.default_rng(seed).normal(size=(batch, inputs))
    return jnp.asarray(x, dtype), pack(random_24((outputs, inputs), dtype=dtype, seed=seed))


@pytest.fixture
def any_kernel(monkeypatch):
    """Every kernel could be built."""
    monkeypatch.setattr(native, "problem", lambda library: None)


def assert_product(found, x, w):
    """The product in float64, to the rounding of sums in float32 and of the result."""
    assert found.dtype == w.dtype
    x, dense = np.asarray(x, np.float64), np.asarray(unpack(w), np.float64)
    eps = eps_of(found.dtype)
    sums = min(eps_of("float32"), eps)
    exact, size = x @ dense.T, np.abs(x) @ np.abs(dense).T
    bound = 0.51 * eps * np.abs(exact) + np.sqrt(x.shape[-1]) * sums * size
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= bound)


# Implementations


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_unpacking_multiplies_as_float64_does(dtype):
    x, w = operands(5, 7, 68, dtype)
    assert_product(matmul(x, w, implementation="unpack"), x, w)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 128, 512), "float32"), ((5, 256, 1536), "bfloat16"), ((64, 128, 1024), "float32")],
)
def test_the_kernel_for_tpus_multiplies_as_float64_does(shape, dtype):
    x, w = operands(*shape, dtype=dtype)
    assert IMPLEMENTATIONS["tpu"].problem(Case("tpu", dtype, *w.shape, len(x))) is None
    found = tpu.run(x.reshape(1, *x.shape), w.values, w.codes, interpret=True)
    assert_product(found[0], x, w)


# Fewer rows than a group, rows that neither four nor the threads divide, and the largest batch.
@needs_compiler
@pytest.mark.parametrize("instructions", cpu.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 32), (7, 13, 160), (64, 5, 64), (3, 1030, 1024)])
def test_the_kernel_for_cpus_multiplies_as_float64_does(shape, dtype, instructions):
    x, w = operands(*shape, dtype)
    assert IMPLEMENTATIONS["cpu"].problem(Case("cpu", dtype, *w.shape, len(x))) is None
    assert_product(cpu.run(x, w.values, w.codes, instructions), x, w)


run_kernel = jax.jit(cpu.run, static_argnames="instructions")


@needs_compiler
@pytest.mark.parametrize("instructions", cpu.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_in_its_row(dtype, instructions):
    x, w = operands(1, 6, 64, dtype)
    values = w.values.at[2, 3].set(jnp.nan).at[4, 5].set(jnp.inf)
    assert native.problem(cpu.LIBRARY) is None
    found = np.asarray(run_kernel(x, values, w.codes, instructions), np.float32)[0]
    assert np.isnan(found).tolist() == [False, False, True, False, False, False]
    assert np.isinf(found).tolist() == [False, False, False, False, True, False]


@needs_compiler
def test_the_kernel_for_cpus_refuses_arrays_that_do_not_fit():
    x, w = operands(1, 6, 64)
    assert native.problem(cpu.LIBRARY) is None
    with pytest.raises(Exception, match="do not fit"):
        run_kernel(x, w.values[:, :-16], w.codes, cpu.INSTRUCTIONS[-1]).block_until_ready()


# The choice


CASES = {
    "cpu": Case("cpu", "float32", 8, 64, 1),
    "cuda": Case("cuda", "bfloat16", 32, 128, 64),
    "cusparselt": Case("cuda", "bfloat16", 32, 64, 128),
    "tpu": Case("tpu", "float32", 128, 512, 1),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("cpu", c) for c in ({"platform": "tpu"}, {"dtype": "float16"}, {"inputs": 68})),
        *(("cpu", c) for c in ({"outputs": 0}, {"batch": 0}, {"batch": 65})),
        *(("cuda", c) for c in ({"dtype": "float32"}, {"inputs": 96}, {"outputs": 24})),
        ("cusparselt", {"batch": 12}),
        *(("tpu", c) for c in ({"outputs": 192}, {"inputs": 640}, {"inputs": 28672})),
    ],
    ids=str,
)
def test_an_implementation_that_is_named_refuses_what_it_cannot_compute(any_kernel, name, change):
    assert choose(name, CASES[name]) is IMPLEMENTATIONS[name].run
    with pytest.raises(ValueError, match=rf"'{name}' cannot compute Case\(.*: it takes \w+ and"):
        choose(name, CASES[name]._replace(**change))


def test_a_kernel_runs_unasked_only_where_it_was_measured_to_be_faster(any_kernel):
    for dtype, most in (("float32", 64), ("bfloat16", 32)):
        for batch in (0, 1, most, most + 1):
            run = cpu.run if 0 < batch <= most else xla.run
            assert choose(AUTO, CASES["cpu"]._replace(dtype=dtype, batch=batch)) is run
    for case in (CASES["cpu"]._replace(inputs=68), *(CASES[n] for n in CASES if n != "cpu")):
        assert choose(AUTO, case) is xla.run


def test_a_kernel_that_cannot_be_built_is_an_error_where_it_is_named(monkeypatch):
    monkeypatch.setattr(native, "problem", lambda library: "there is no compiler")
    x, w = operands(1, 8, 64)
    assert_product(jax.jit(matmul)(x, w), x, w)
    with pytest.raises(ValueError, match=r"'cpu' cannot compute .*: there is no compiler"):
        matmul(x, w, implementation="cpu")


@needs_compiler
def test_programs_hold_the_kernel_of_their_batch():
    x, w = operands(66, 8, 64)

    def lowered(function, *arguments):
        return cpu.LIBRARY.target in jax.jit(function).lower(*arguments).as_text()

    assert lowered(matmul, x[:2], w)
    assert not lowered(matmul, x[:65], w)
    assert not lowered(functools.partial(matmul, implementation=UNPACK), x[:2], w)
    # The rows of x that are mapped over make the batch.
    mapped = jax.vmap(functools.partial(matmul, w=w))
    assert [lowered(mapped, x[:rows]) for rows in (64, 65)] == [True, False]
    gradient = jax.grad(lambda x: jnp.sum(matmul(x, w, implementation="cpu")))(x[:1])
    assert_close(gradient[0], jnp.sum(unpack(w), axis=0), 8)  # terms


@pytest.mark.parametrize("name", ["cuda", "cusparselt"])
def test_a_program_for_gpus_calls_the_kernel_that_is_named(any_kernel, name):
    for implementation in (AUTO, name):
        multiply = jax.jit(functools.partial(matmul, implementation=implementation))
        traced = multiply.trace(*operands(8, 32, 128, "bfloat16"))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        called = IMPLEMENTATIONS[name].library.target in text
        assert called == (implementation == name)


def test_what_is_exported_has_no_kernel_of_this_process():
    x, w = operands(4, 8, 64)
    for rows in (4, export.symbolic_shape("rows")[0]):
        shape = jax.ShapeDtypeStruct((rows, 64), x.dtype)
        exported = export.export(jax.jit(matmul))(shape, w)
        assert cpu.LIBRARY.target not in exported.mlir_module()
        assert_product(exported.call(x, w), x, w)
        with pytest.raises(ValueError, match="in a program of one device"):
            export.export(jax.jit(functools.partial(matmul, implementation="cpu")))(shape, w)


# The product as a function


def test_leading_axes_of_x_are_kept_and_a_flax_kernel_is_summed_over_its_first():
    x, w = operands(6, 5, 64)
    for shape in ((64,), (2, 3, 64), (0, 64)):
        part = x.ravel()[: np.prod(shape)].reshape(shape)
        found = matmul(part, w)
        assert found.shape == (*shape[:-1], 5)
        assert_product(found.reshape(-1, 5), part.reshape(-1, 64), w)
    kernel = pack(unpack(w).T, axis=0)
    assert kernel.shape == (64, 5)
    np.testing.assert_array_equal(matmul(x, kernel), matmul(x, w))


def dense_loss(x, dense):
    return jnp.sum(jnp.sin(jnp.matmul(x, dense.T, precision="highest")))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_dense_product_at_what_is_kept(compiled):
    x, w = operands(3, 5, 68, "float64")

    def loss(x, values):
        return jnp.sum(jnp.sin(matmul(x, dataclasses.replace(w, values=values))))

    gradient, dense = jax.grad(loss, argnums=(0, 1)), unpack(w)
    of_x, of_values = (jax.jit(gradient) if compiled else gradient)(x, w.values)
    expected_x, expected = jax.grad(dense_loss, argnums=(0, 1))(x, dense)
    # The sine takes a sum of 68 terms.
    assert_close(of_x, expected_x, 68)
    full = unpack(dataclasses.replace(w, values=of_values))
    assert_close(full, np.where(np.asarray(dense) != 0, expected, 0), 68)
    narrow = jax.grad(loss, argnums=(0, 1))(x.astype("bfloat16"), w.values.astype("bfloat16"))
    assert [part.dtype for part in narrow] == [jnp.bfloat16] * 2


def test_second_derivatives_are_those_of_the_dense_product():
    x, w = operands(1, 3, 32, "float64")

    def along(loss):
        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(x)

    found = along(lambda x: jnp.sum(jnp.sin(matmul(x, w))))
    expected = along(lambda x: dense_loss(x, unpack(w)))
    assert_close(found, expected, 2 * 32)  # a sum of 32 terms in each derivative


def test_products_are_mapped_over_vectors_weights_and_both():
    x, w = operands(4, 5, 64)
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), w, operands(4, 5, 64, seed=1)[1])
    assert_product(jax.vmap(matmul, (0, None))(x, w), x, w)
    mapped = jax.vmap(matmul, (1, None))(x.reshape(2, 2, 64), w)
    assert_product(jnp.swapaxes(mapped, 0, 1).reshape(4, 5), x, w)
    together = jax.vmap(matmul, (None, 0))(x, stack)
    pairs = jax.vmap(matmul)(jnp.stack([x, x]), stack)
    _, scanned = jax.lax.scan(lambda x, layer: (x, matmul(x, layer)), x, stack)
    for found, i in itertools.product((together, pairs, scanned), range(2)):
        assert_product(found[i], x, jax.tree.map(lambda array, i=i: array[i], stack))
    with pytest.raises(ValueError, match=r"'cpu' is for one weight .* use"):
        jax.vmap(functools.partial(matmul, implementation="cpu"), (None, 0))(x, stack)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, w: (x[:, :-4], w), "does not end in the 64 inputs"),
        (lambda x, w: (x[0, 0], w), "does not end in"),
        (lambda x, w: (x.astype(jnp.bfloat16), w), "x is bfloat16 and w is float32"),
        (lambda x, w: (x, jax.tree.map(lambda a: a[None], w)), "two axes"),
        (lambda x, w: (x, dataclasses.replace(w, codes=w.codes[:, :1])), "do not fit"),
        (lambda x, w: (x, dataclasses.replace(w, codes=w.codes.astype("int32"))), "do not fit"),
        (lambda x, w: (x, dataclasses.replace(w, values=w.values[:, :-1])), "do not fit"),
        (lambda x, w: (x, dataclasses.replace(w, values=w.values[:, :-2])), "do not fit"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        matmul(*change(*operands(2, 5, 64)))


def test_an_implementation_that_is_unknown_is_named():
    with pytest.raises(ValueError, match="'gpu' is none of auto, unpack, cpu, cuda"):
        matmul(*operands(2, 5, 64), implementation="gpu")


# Native kernels


@needs_compiler
def test_a_kernel_is_built_once_for_its_sources_flags_compiler_and_jaxlib(tmp_path, monkeypatch):
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path))
    version, commands = "1.0", []
    monkeypatch.setattr(native, "_output", lambda command: commands.append(command) or version)
    paths = {native._built(cpu.LIBRARY) for _ in range(2)}
    assert len([command for command in commands if "-o" in command]) == len(paths) == 1
    paths.add(native._built(cpu.LIBRARY._replace(flags=lambda: ["-O0"])))
    paths.add(native._built(cpu.LIBRARY._replace(sources=("cpu.cc", "fragments.h"))))
    version = "2.0"
    paths.add(native._built(cpu.LIBRARY))
    monkeypatch.setattr(native.jaxlib.version, "__version__", "0.0")
    paths.add(native._built(cpu.LIBRARY))
    assert len(paths) == 5
    assert set(tmp_path.iterdir()) == paths  # nothing is left of the building


@pytest.mark.parametrize("value", [".", ""])
def test_the_cache_folder_is_absolute_and_may_be_empty(monkeypatch, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROX24_CACHE", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_folder() == (tmp_path if value else tmp_path / "xdg" / "prox24")


def problem(caplog, library=cpu.LIBRARY):
    """Why there is no kernel, asked anew; it is logged in one line."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "prox24.packed"):
        found = native._load.__wrapped__(library)
    assert caplog.messages == [found]
    assert "\n" not in found
    return found


def test_without_a_compiler_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert "install one of g++" in problem(caplog)


@needs_compiler
def test_a_kernel_that_cannot_be_built_or_loaded_is_one_line(monkeypatch, caplog, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.delenv("PROX24_CACHE")
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setattr("pathlib.Path.home", no_home)
        assert "there is no home folder; set PROX24_CACHE" in problem(caplog)
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path))
    broken = cpu.LIBRARY._replace(flags=lambda: ["-include", "there_is_none.h"])
    assert "failed: " in problem(caplog, broken)
    assert list(tmp_path.iterdir()) == []
    compiler = next(found for name in native.CPP_COMPILERS if (found := shutil.which(name)))
    path = cpu.LIBRARY.path(native._output([compiler, "--version"]))
    path.write_text("no library")
    assert f"delete {path}, which cannot be loaded" in problem(caplog)


def test_threads_that_ask_first_together_load_one_kernel(monkeypatch):
    loaded = []

    def slowly(library):
        time.sleep(0.1)
        loaded.append(library)

    monkeypatch.setattr(native, "_load", functools.cache(slowly))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(native.problem, [cpu.LIBRARY] * 4)) == [None] * 4
    assert len(loaded) == 1
