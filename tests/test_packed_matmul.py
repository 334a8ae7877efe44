"""Products with packed weights against float64, the choice of an implementation, the caches."""

import dataclasses
import functools
import itertools
import json
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from tiny import write_tiny

from prox24.cli import tune
from prox24.cli.main import main
from prox24.packed import (
    Packed24,
    cpu,
    matmul,
    native,
    pack,
    packed_or_dense,
    table,
    tpu,
    tuning,
    unpack,
)
from prox24.packed.cache import cache_folder
from prox24.packed.implementation import Case
from prox24.packed.registry import FALLBACK, IMPLEMENTATIONS
from prox24.packed.table import Measurement
from prox24.packed.tuning import measure, random_packed

SHAPES = [(1, 1, 32), (2, 4, 96), (7, 13, 160), (cpu.LARGEST_BATCH, 5, 64)]
LARGE = (3, 1030, 1024)
"""Enough for several threads, and rows that neither four nor the threads divide."""
HAS_COMPILER = any(shutil.which(name) for name in native.CPU.compilers)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this module's own, in which the kernel is built once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROX24_CACHE", str(folder))
        yield folder


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder without tables; the kernel, which is loaded already, stays."""
    if HAS_COMPILER:
        assert native.is_ready(native.CPU)
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path))
    jax.clear_caches()
    return tmp_path


def operands(batch, outputs, inputs, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    w = random_packed(rng, outputs, inputs, dtype)
    return jnp.asarray(rng.normal(size=(batch, inputs)), dtype), w


def assert_product(found, x, w):
    """That of float64, to the rounding of sums in float32 and of the result."""
    x, dense = np.asarray(x, np.float64), np.asarray(unpack(w), np.float64)
    eps = max(float(jnp.finfo(found.dtype).eps), 0)
    sums = min(1.2e-7, eps)
    exact, size = x @ dense.T, np.abs(x) @ np.abs(dense).T
    bound = 0.51 * eps * np.abs(exact) + np.sqrt(x.shape[-1]) * sums * size
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= bound)


# Implementations


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 7, 68), (5, 9, 1024)])
def test_unpacking_multiplies_as_float64_does(shape, dtype):
    x, w = operands(*shape, dtype)
    found = matmul(x, w)
    assert found.dtype == dtype
    assert_product(found, x, w)


@pytest.mark.parametrize("dtype", tpu.DTYPES)
@pytest.mark.parametrize("shape", [(1, 128, 512), (5, 256, 1536), (64, 128, 1024)])
def test_the_kernel_for_tpus_multiplies_as_float64_does(shape, dtype):
    x, w = operands(*shape, dtype=dtype)
    assert tpu.serves(Case("tpu", dtype, *w.shape, len(x)))
    assert_product(tpu.run(x, w.values, w.codes, interpret=True), x, w)


def test_the_kernel_for_tpus_takes_any_number_of_leading_axes():
    x, w = operands(6, 128, 512)
    found = tpu.run(x.reshape(2, 3, 512), w.values, w.codes, interpret=True)
    assert_product(found.reshape(6, 128), x, w)


@pytest.mark.parametrize(
    "change",
    [
        {"platform": "cpu"},
        {"dtype": "float16"},
        {"outputs": 192},
        {"outputs": 0},
        {"inputs": 640},
        {"inputs": 28672},
        {"batch": 65},
    ],
    ids=str,
)
def test_the_kernel_for_tpus_refuses_what_it_cannot_do(change):
    case = Case("tpu", "float32", 128, 512, 1)
    assert tpu.serves(case)
    assert not tpu.serves(case._replace(**change))


@needs_compiler
@pytest.mark.parametrize("instructions", cpu.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_the_kernel_multiplies_as_float64_does(shape, dtype, instructions):
    x, w = operands(*shape, dtype)
    assert cpu.serves(Case("cpu", dtype, *w.shape, len(x)))
    found = cpu.run(x, w.values, w.codes, instructions)
    assert found.dtype == dtype
    assert_product(found, x, w)


@needs_compiler
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=20)
@pytest.mark.parametrize("instructions", cpu.INSTRUCTIONS)
def test_the_kernel_agrees_with_float64_on_any_codes_and_values(instructions, seed, scale):
    x, w = operands(2, 5, 64, seed=seed)
    w = dataclasses.replace(w, values=w.values * jnp.float32(scale))
    assert native.is_ready(native.CPU)
    assert_product(run_kernel(x, w.values, w.codes, instructions), x, w)


run_kernel = jax.jit(cpu.run, static_argnames="instructions")


@needs_compiler
@pytest.mark.parametrize("instructions", cpu.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype, instructions):
    x, w = operands(1, 6, 64, dtype)
    w = dataclasses.replace(w, values=w.values.at[2, 3].set(jnp.nan).at[4, 5].set(jnp.inf))
    assert native.is_ready(native.CPU)
    found = np.asarray(run_kernel(x, w.values, w.codes, instructions), np.float32)[0]
    assert np.isnan(found[2])
    assert np.isinf(found[4])
    assert np.isfinite(found[[0, 1, 3, 5]]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"platform": "tpu"},
        {"dtype": "float16"},
        {"dtype": "float64"},
        {"inputs": 68},
        {"batch": 0},
        {"batch": cpu.LARGEST_BATCH + 1},
        {"outputs": 0},
    ],
)
def test_the_kernel_says_what_it_does_not_serve(change):
    assert not cpu.serves(Case("cpu", "float32", 8, 64, 1)._replace(**change))


@needs_compiler
def test_the_kernel_refuses_arrays_that_do_not_fit():
    x, w = operands(1, 6, 64)
    assert native.is_ready(native.CPU)
    with pytest.raises(Exception, match="do not fit"):
        run_kernel(x, w.values[:, :-16], w.codes, cpu.INSTRUCTIONS[-1]).block_until_ready()


# The product as a function


def test_leading_axes_of_x_are_kept():
    x, w = operands(6, 5, 64)
    for shape in ((64,), (2, 3, 64), (0, 64)):
        part = x.ravel()[: np.prod(shape)].reshape(shape)
        found = matmul(part, w)
        assert found.shape == (*shape[:-1], 5)
        assert_product(found.reshape(-1, 5), part.reshape(-1, 64), w)


def test_a_flax_kernel_is_summed_over_its_first_axis():
    x, w = operands(3, 5, 64)
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

    gradient = jax.grad(loss, argnums=(0, 1))
    of_x, of_values = (jax.jit(gradient) if compiled else gradient)(x, w.values)
    dense = unpack(w)
    expected_x, expected = jax.grad(dense_loss, argnums=(0, 1))(x, dense)
    np.testing.assert_allclose(of_x, expected_x, rtol=0, atol=1e-12)
    full = unpack(dataclasses.replace(w, values=of_values))
    np.testing.assert_allclose(full, np.where(np.asarray(dense) != 0, expected, 0), atol=1e-12)


def test_second_derivatives_are_those_of_the_dense_product():
    x, w = operands(1, 3, 32, "float64")

    def along(loss):
        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(x)

    found = along(lambda x: jnp.sum(jnp.sin(matmul(x, w))))
    expected = along(lambda x: dense_loss(x, unpack(w)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_gradients_of_16_bit_weights_have_their_dtype():
    x, w = operands(3, 5, 64, "bfloat16")

    def loss(x, values):
        return jnp.sum(matmul(x, dataclasses.replace(w, values=values)))

    of_x, of_values = jax.grad(loss, argnums=(0, 1))(x, w.values)
    assert of_x.dtype == of_values.dtype == jnp.bfloat16


def test_products_are_mapped_over_vectors_weights_and_both():
    x, w = operands(4, 5, 64)
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), w, operands(4, 5, 64, seed=1)[1])
    expected = matmul(x, w)
    np.testing.assert_array_equal(jax.vmap(matmul, (0, None))(x, w), expected)
    # Of another shape, whose sums XLA may take in another order.
    mapped = jax.vmap(matmul, (1, None))(x.reshape(2, 2, 64), w)
    assert_product(jnp.swapaxes(mapped, 0, 1).reshape(4, 5), x, w)
    each = [matmul(x, jax.tree.map(lambda array, i=i: array[i], stack)) for i in range(2)]
    np.testing.assert_allclose(jax.vmap(matmul, (None, 0))(x, stack), each, atol=1e-5)
    pairs = jax.vmap(matmul)(jnp.stack([x, x]), stack)
    np.testing.assert_allclose(pairs, each, atol=1e-5)
    _, scanned = jax.lax.scan(lambda x, layer: (x, matmul(x, layer)), x, stack)
    np.testing.assert_allclose(scanned, each, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, w: (x[:, :-4], w), "does not end in the 64 inputs"),
        (lambda x, w: (x[0, 0], w), "does not end in"),
        (lambda x, w: (x.astype(jnp.bfloat16), w), "x is bfloat16 and w is float32"),
        (lambda x, w: (x, jax.tree.map(lambda a: a[None], w)), "two axes"),
        (lambda x, w: (x, jax.tree.map(lambda a: a[0], w)), "two axes"),
        *(
            (lambda x, w, change=change: (x, dataclasses.replace(w, **change(w))), "do not fit")
            for change in (
                lambda w: {"codes": w.codes[:, :1]},
                lambda w: {"codes": w.codes[:1]},
                lambda w: {"codes": w.codes.astype(jnp.int32)},
                lambda w: {"values": w.values[:, :-1]},
                lambda w: {"values": w.values[:, :-2]},
            )
        ),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        matmul(*change(*operands(2, 5, 64)))


# The table


CASE = Case("cpu", "float32", 8, 64, 1)


def measured(batch, dense=1.5, **seconds):
    return Measurement(CASE._replace(batch=batch), seconds, dense)


@pytest.fixture
def serving(monkeypatch):
    """Any case is served by the kernel, whether there is one or not."""
    served = IMPLEMENTATIONS["cpu"]._replace(serves=lambda case: case.batch <= 64)
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", served)


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        *((1, "cpu"), (2, "cpu"), (4, "cpu")),  # measured, or between two that agree
        *((5, FALLBACK), (8, FALLBACK), (9, FALLBACK)),  # between two that do not
        *((32, "cpu"), (64, "cpu"), (65, FALLBACK), (0, FALLBACK)),  # outside
    ],
)
def test_an_implementation_runs_only_where_it_was_measured_to_be_faster(
    tables, serving, batch, name
):
    table.write([measured(b, unpack=2.0, cpu=1.0) for b in (1, 4, 32, 64)])
    table.write([measured(8, unpack=1.0, cpu=2.0)])
    assert table.choose(CASE._replace(batch=batch)) == name


@pytest.mark.parametrize(
    "other", [{"dtype": "bfloat16"}, {"outputs": 9}, {"inputs": 96}, {"platform": "tpu"}]
)
def test_measurements_are_of_one_platform_dtype_and_shape(tables, serving, other):
    table.write([measured(1, unpack=2.0, cpu=1.0)])
    assert table.choose(CASE) == "cpu"
    assert table.choose(CASE._replace(**other)) == FALLBACK


def test_a_tie_and_a_case_that_is_not_served_are_the_fallbacks(tables, serving):
    table.write([measured(1, cpu=1.0, unpack=1.0), measured(100, unpack=2.0, cpu=1.0)])
    assert table.choose(CASE) == FALLBACK
    assert table.choose(CASE._replace(batch=100)) == FALLBACK


def test_a_case_that_is_measured_again_replaces_the_earlier_one(tables, serving):
    table.write([measured(1, unpack=2.0, cpu=1.0), measured(2, unpack=2.0, cpu=1.0)])
    table.write([measured(1, unpack=1.0, cpu=2.0)])
    assert [table.choose(CASE._replace(batch=b)) for b in (1, 2)] == [FALLBACK, "cpu"]


@pytest.mark.parametrize("field", ["device", "number of processors", "jaxlib", "sources"])
def test_a_stale_table_is_not_used_and_one_line_says_so(tables, serving, caplog, field):
    table.write([measured(1, unpack=2.0, cpu=1.0)])
    path = table.table_path("cpu")
    stored = json.loads(path.read_text())
    stored["made_for"][field] = "another"
    path.write_text(json.dumps(stored))
    with caplog.at_level(logging.WARNING, "prox24.packed"):
        assert [table.choose(CASE) for _ in range(2)] == [FALLBACK] * 2
    (message,) = caplog.messages
    assert f"another {field}" in message
    assert "prox24 tune" in message
    table.write([measured(1, unpack=2.0, cpu=1.0)])
    assert table.choose(CASE) == "cpu"


def test_a_table_of_another_number_of_processors_is_not_used(tables, serving, monkeypatch):
    table.write([measured(1, unpack=2.0, cpu=1.0)])
    assert table.choose(CASE) == "cpu"
    table._read.cache_clear()
    monkeypatch.setattr(table, "available_processors", lambda: 99)
    assert table.choose(CASE) == FALLBACK


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"made_for": {}}', "\x00", '{"made_for": 3}'])
def test_a_damaged_table_is_not_used_and_one_line_says_so(tables, caplog, text):
    table.table_path("cpu").write_text(text)
    with caplog.at_level(logging.WARNING, "prox24.packed"):
        assert table.choose(CASE) == FALLBACK
    (message,) = caplog.messages
    assert "no table of measurements" in message


def entry(**changes):
    seconds = {"unpack": 2.0, "cpu": 1.0}
    return {**CASE._asdict(), "seconds": seconds, "dense": 1.5, **changes}


@pytest.mark.parametrize(
    "damaged",
    [
        *({"seconds": {}}, {"seconds": {"cpu": 1.0}}, {"seconds": 3}, {"batch": "1"}),
        *({"dense": 0.0}, {"dense": None}, {"dense": 10**400}, {"dtype": ["float32"]}),
        *(
            {"seconds": {"unpack": 1.0, **more}}
            for more in ({"other": 0.5}, {"cpu": None}, {"cpu": "1 s"}, {"cpu": 0.0}, {"cpu": -1.0})
        ),
    ],
    ids=str,
)
def test_a_table_with_a_damaged_measurement_is_not_used(tables, serving, caplog, damaged):
    table.write([measured(1, unpack=2.0, cpu=1.0)])
    path = table.table_path("cpu")
    stored = json.loads(path.read_text())
    assert stored["measurements"] == [entry()]
    stored["measurements"].append(entry(outputs=16, **damaged))
    path.write_text(json.dumps(stored))
    table._read.cache_clear()
    with caplog.at_level(logging.WARNING, "prox24.packed"):
        assert [table.choose(CASE) for _ in range(2)] == [FALLBACK] * 2
    (message,) = caplog.messages
    assert "no table of measurements" in message


@pytest.mark.parametrize(
    ("dense", "batches", "packed"),
    [
        (1.5, [1], True),
        (0.981, [1], True),
        (0.979, [1], False),
        (1.5, [1, 4], True),
        (1.5, [1, 8], False),  # where the fallback was measured to be the fastest, and slower
        (1.5, [1, 2], False),  # not measured
    ],
)
def test_a_weight_stays_packed_where_that_was_measured_to_keep_up(
    tables, serving, dense, batches, packed
):
    table.write([measured(batch, dense, unpack=2.0, cpu=1.0) for batch in (1, 4)])
    table.write([measured(8, dense, unpack=2.0, cpu=3.0)])
    _, w = operands(1, 8, 64)
    found = packed_or_dense(w, batches)
    assert isinstance(found, Packed24) == packed
    assert (found.shape, found.dtype) == (w.shape, w.dtype)
    if not packed:
        np.testing.assert_array_equal(found, unpack(w))


def test_a_weight_that_nothing_is_multiplied_with_is_refused():
    with pytest.raises(ValueError, match="the number of vectors of one product"):
        packed_or_dense(operands(1, 8, 64)[1], [])


def test_a_table_for_what_is_not_here_is_not_used(tables, caplog):
    table.table_path("tpu").write_text('{"made_for": {}, "measurements": []}')
    with caplog.at_level(logging.WARNING, "prox24.packed"):
        assert table.choose(CASE._replace(platform="tpu")) == FALLBACK
    assert "matmul-tpu.json is no table" in caplog.messages[0]


def test_without_a_home_folder_products_are_as_right(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PROX24_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    jax.clear_caches()
    x, w = operands(1, 8, 64)
    assert_product(jax.jit(matmul)(x, w), x, w)
    assert not native._load.__wrapped__(native.CPU)
    assert main(["tune", "--shapes", "8x36", "--quiet"]) == 2
    assert "there is no home folder; set PROX24_CACHE" in capsys.readouterr().err


@pytest.mark.parametrize("value", [".", ""])
def test_a_kernel_is_loaded_from_a_cache_of_any_name(monkeypatch, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROX24_CACHE", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == (tmp_path if value else tmp_path / "xdg" / "prox24")


@pytest.mark.parametrize(
    "options",
    [
        ["--shapes", "4611686018427387904x4"],
        ["--shapes", "8x64", "--batches", "9223372036854775807"],
    ],
)
def test_sizes_that_no_array_has_are_refused(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", *options])
    assert "is not" in capsys.readouterr().err


def test_what_another_process_measured_meanwhile_is_kept(tables, serving):
    table.write([measured(1, unpack=2.0, cpu=1.0)])
    assert table.choose(CASE) == "cpu"
    path = table.table_path("cpu")
    stored = json.loads(path.read_text())
    stored["measurements"].append(entry(batch=2))
    path.write_text(json.dumps(stored))
    table.write([measured(4, unpack=2.0, cpu=1.0)])
    assert [table.choose(CASE._replace(batch=b)) for b in (1, 2, 4)] == ["cpu"] * 3


def test_what_is_exported_has_no_kernel_of_this_process(tables, serving):
    table.write([measured(batch, unpack=2.0, cpu=1.0) for batch in (1, 64)])
    jax.clear_caches()
    x, w = operands(4, 8, 64)
    for rows in (4, export.symbolic_shape("rows")[0]):
        exported = export.export(jax.jit(matmul))(jax.ShapeDtypeStruct((rows, 64), x.dtype), w)
        assert native.CPU.target not in exported.mlir_module()
        assert_product(exported.call(x, w), x, w)


@needs_compiler
def test_the_product_runs_what_the_table_says(tables):
    x, w = operands(1, 8, 64)

    def lowered():
        return jax.jit(matmul).lower(x, w).as_text()

    assert native.CPU.target not in lowered()
    table.write([measured(1, unpack=2.0, cpu=1.0)])
    jax.clear_caches()
    assert native.CPU.target in lowered()
    assert_product(matmul(x, w), x, w)
    gradient = jax.grad(lambda x: jnp.sum(matmul(x, w)))(x)
    np.testing.assert_allclose(gradient[0], jnp.sum(unpack(w), axis=0), atol=1e-5)
    # The rows of x that are mapped over make the batch.
    table.write([measured(2, unpack=2.0, cpu=1.0)])
    mapped = jax.jit(jax.vmap(functools.partial(matmul, w=w)))
    assert native.CPU.target in mapped.lower(jnp.stack([x[0], x[0]])).as_text()
    assert native.CPU.target not in jax.jit(matmul).lower(jnp.stack([x[0]] * 3), w).as_text()


# The kernel's cache


@needs_compiler
def test_the_kernel_is_built_once_and_for_one_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path))
    built = []

    def compile_nothing(command):
        if "-o" in command:
            built.append(command[-1])
            with open(command[-1], "w") as file:
                file.write(native.processor())
        return "compiler 1.0"

    monkeypatch.setattr(native, "_output", compile_nothing)
    paths = []
    for processor in ("one", "two", "one", "two"):
        monkeypatch.setattr(native, "processor", lambda processor=processor: processor)
        paths.append(native._built(native.CPU))
        assert paths[-1].read_text() == processor
    assert len(built) == 2
    assert paths[:2] == paths[2:]
    assert paths[0] != paths[1]
    # Nothing is left of the building.
    assert sorted(tmp_path.iterdir()) == sorted(paths[:2])


def test_another_compiler_or_jaxlib_or_source_is_another_file(monkeypatch, tmp_path):
    paths = {native.CPU.path("1.0"), native.CPU.path("2.0")}
    with monkeypatch.context() as patch:
        patch.setattr(native.jaxlib.version, "__version__", "0.0")
        paths.add(native.CPU.path("1.0"))
    source = tmp_path / "other.cc"
    source.write_text("//")
    paths.add(native.CPU._replace(source=source).path("1.0"))
    assert len(paths) == 4


def not_ready(caplog, library=native.CPU):
    """What is_ready says, asked anew, when there is no kernel."""
    with caplog.at_level(logging.WARNING, "prox24.packed"):
        assert not native._load.__wrapped__(library)
    (message,) = caplog.messages
    assert "\n" not in message
    return message


def test_without_a_compiler_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert "install one of g++" in not_ready(caplog)


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing_and_is_one_line(
    monkeypatch, caplog, tmp_path
):
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "broken.cc"
    source.write_text("#error no\n")
    assert "failed: " in not_ready(caplog, native.CPU._replace(source=source))
    assert list((tmp_path / "cache").iterdir()) == []


@needs_compiler
def test_a_cache_that_is_no_library_is_one_line(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path))
    compiler = next(found for name in native.CPU.compilers if (found := shutil.which(name)))
    path = native.CPU.path(native._output([compiler, "--version"]))
    path.write_text("no library")
    assert f"delete {path}, which cannot be loaded" in not_ready(caplog)


@needs_compiler
def test_threads_that_ask_first_together_build_one_kernel(monkeypatch, tmp_path):
    loaded = []

    def slowly(library):
        time.sleep(0.1)
        loaded.append(True)
        return True

    monkeypatch.setattr(native, "_load", functools.cache(slowly))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: native.is_ready(native.CPU), range(4)))
    assert len(loaded) == 1


# The command


def test_tune_measures_shapes_and_writes_the_table(tables, capsys):
    arguments = ["--shapes", "8x64,4x36", "--batches", "1,2", "--dtype", "bfloat16"]
    assert main(["tune", *arguments, "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    read = table.read("cpu")
    assert report["table"] == str(table.table_path("cpu"))
    assert [(m["outputs"], m["inputs"], m["batch"]) for m in report["measurements"]] == [
        *((8, 64, 1), (8, 64, 2), (4, 36, 1), (4, 36, 2))
    ]
    assert {m.case for m in read} == {
        Case(*(entry[field] for field in Case._fields)) for entry in report["measurements"]
    }
    for entry in read:
        served = {FALLBACK} | ({"cpu"} if HAS_COMPILER and entry.case.inputs % 32 == 0 else set())
        assert set(entry.seconds) == served
        assert entry.dense > 0
        assert table.choose(entry.case) == entry.fastest


def test_what_tune_has_measured_is_kept_when_it_is_ended(tables, monkeypatch):
    arguments = ["tune", "--shapes", "8x64,4x36", "--batches", "1", "--quiet"]
    measure = tune.measure

    def ended(case):
        if case.inputs == 36:
            raise KeyboardInterrupt
        return measure(case)

    monkeypatch.setattr(tune, "measure", ended)
    assert main(arguments) == 130
    assert [measured.case.inputs for measured in table.read("cpu")] == [64]


def wrong_in_an_entry(x, values, codes):
    found = IMPLEMENTATIONS[FALLBACK].run(x, values, codes)
    return found.at[0, jnp.argmin(jnp.abs(found[0]))].add(0.5)


def not_compiled(x, values, codes):
    raise NotImplementedError("no such layout")


@pytest.mark.parametrize(
    ("run", "words"), [(wrong_in_an_entry, "differs by"), (not_compiled, "no such layout")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_implementation_that_multiplies_wrongly_is_not_measured(
    tables, monkeypatch, caplog, run, words, dtype
):
    case = CASE._replace(dtype=dtype, inputs=2048)
    broken = IMPLEMENTATIONS["cpu"]._replace(run=run, serves=lambda case: True)
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", broken)
    with caplog.at_level(logging.WARNING, "prox24.packed"):
        assert set(measure(case, 1).seconds) == {FALLBACK}
    assert words in caplog.text
    right = broken._replace(run=IMPLEMENTATIONS[FALLBACK].run)
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", right)
    assert set(measure(case, 1).seconds) == {FALLBACK, "cpu"}


@needs_compiler
def test_an_implementation_that_fails_while_it_runs_is_not_measured(tables, monkeypatch, caplog):
    def cut(x, values, codes):
        return cpu.run(x, values[:, :-16], codes, cpu.INSTRUCTIONS[-1])

    broken = IMPLEMENTATIONS["cpu"]._replace(run=cut, serves=lambda case: True)
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", broken)
    with caplog.at_level(logging.WARNING, "prox24.packed"):
        assert set(measure(CASE, 1).seconds) == {FALLBACK}
    assert "do not fit" in caplog.text


def test_a_product_has_its_share_of_the_time_of_a_program(tables, monkeypatch):
    monkeypatch.setattr(tuning, "calls_of", lambda platform: 4)
    monkeypatch.setattr(tuning.time, "perf_counter", itertools.count().__next__)
    measured = measure(CASE, 1)
    assert {measured.dense, *measured.seconds.values()} == {0.25}


@pytest.mark.optimized
def test_a_program_of_several_products_makes_every_one():
    x, w = operands(2, 8, 64)
    run = IMPLEMENTATIONS[FALLBACK].run
    expected = x
    for _ in range(4):
        expected = expected.at[:, 0].set(run(expected, w.values, w.codes)[:, 0])
    found = tuning.repeated(run, 5)(x, w.values, w.codes)
    np.testing.assert_allclose(found, run(expected, w.values, w.codes), rtol=1e-5, atol=1e-5)
    # The weight is unpacked in the loop, each time: it comes in packed.
    text = tuning.repeated(run, 5).lower(x, w.values, w.codes).compile().as_text()
    (loop,) = (line for line in text.splitlines() if " while(" in line)
    assert "u32[8,2]" in loop
    assert "f32[8,64]" not in loop
    # And multiplied as a whole, though a column is all that is used.
    assert text.count("f32[2,8]{1,0} dot(") == 2


def test_tune_measures_the_linears_of_a_checkpoint(tables, capsys, tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    assert main(["tune", str(tmp_path / "model"), "--batches", "1"]) == 0
    printed = capsys.readouterr().out
    shapes = {(m.case.outputs, m.case.inputs) for m in table.read("cpu")}
    assert len(shapes) > 1
    assert {m.case.dtype for m in table.read("cpu")} == {"bfloat16"}  # the model's
    assert all(f"{outputs}x{inputs}" in printed for outputs, inputs in shapes)


@pytest.mark.parametrize(
    "arguments", [["--shapes", "8"], ["--shapes", "8x6"], ["--batches", "0"], []]
)
def test_tune_refuses_what_it_cannot_measure_in_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *arguments])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (arguments or ["--shapes"])[0] in last
