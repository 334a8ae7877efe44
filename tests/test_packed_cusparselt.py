"""cuSPARSELt, which no GPU has run: on a CPU, by a library with its interface."""

import ctypes
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_packed_matmul import assert_product, needs_compiler, not_ready

from prox24.packed import cusparselt, native, unpack
from prox24.packed.implementation import Case, default_platform
from prox24.packed.tuning import random_packed

CASE = Case("cuda", "bfloat16", 32, 64, 128)
COMPILER = next(filter(None, map(shutil.which, native.CUSPARSELT.compilers)), None)
CUDA_HEADERS = "/usr/local/cuda/include"
ALLOC_FAILED, INVALID_VALUE, NOT_SUPPORTED = 2, 3, 10


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    path = tmp_path_factory.mktemp("cusparselt") / "emulate.so"
    folder = Path(__file__).with_name("cusparselt")
    includes = [f"-I{folder}", f"-I{native.FOLDER}", f"-I{jax.ffi.include_dir()}"]
    command = [COMPILER, *native.CUSPARSELT.flags, "-fvisibility=default", *includes]
    subprocess.run([*command, folder / "emulate.cc", "-o", path], check=True)
    library = ctypes.CDLL(str(path))

    def run(x, weight, device=0, without_memory=False):
        """The status, the product, and the library's and the plans' beginnings so far."""
        found, used = np.zeros((len(x), len(weight)), x.dtype), (ctypes.c_int * 2)()
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, weight, found)]
        sizes = map(ctypes.c_int64, (*weight.shape, len(x)))
        bfloat16 = x.dtype == jnp.bfloat16
        status = library.emulate(device, bfloat16, *pointers, *sizes, without_memory, used)
        return status, found, np.array(used)

    run.library = library
    return run


def operands(case):
    w = random_packed(np.random.default_rng(0), case.outputs, case.inputs, case.dtype)
    x = np.random.default_rng(1).standard_normal((case.batch, case.inputs), np.float32)
    return jnp.asarray(x, case.dtype), w


@needs_compiler
@pytest.mark.parametrize("dtype", cusparselt.DTYPES)
@pytest.mark.parametrize("shape", [(16, 16, 8), (16, 64, 24), (48, 32, 16)])
def test_its_descriptors_make_the_product(emulate, shape, dtype):
    x, w = operands(Case("cuda", dtype, *shape))
    status, found, _ = emulate(np.asarray(x), np.asarray(unpack(w)))
    assert status == 0
    assert_product(found, x, w)


@needs_compiler
def test_a_plan_serves_a_case_and_a_handle_a_device(emulate):
    def begun(case, device):
        x, w = operands(case)
        status, _, used = emulate(np.asarray(x), np.asarray(unpack(w)), device=device)
        assert status == 0
        return used

    first = begun(CASE, 1)
    assert (begun(CASE, 1) - first).tolist() == [0, 0]
    assert (begun(CASE._replace(batch=8), 1) - first).tolist() == [0, 1]
    assert (begun(CASE._replace(dtype="float16"), 1) - first).tolist() == [0, 2]
    assert (begun(CASE, 2) - first).tolist() == [1, 3]


@needs_compiler
def test_what_it_cannot_do_is_a_status_and_is_not_kept(emulate):
    x, zeros = np.ones((8, 16), np.float16), np.zeros((16, 16), np.float16)
    status, _, before = emulate(x, zeros)
    assert status == 0
    assert emulate(x, np.ones_like(zeros))[0] == INVALID_VALUE  # four nonzeros in a block
    assert emulate(x, zeros, without_memory=True)[0] == ALLOC_FAILED
    for _ in range(2):
        assert emulate(x[:4], zeros)[0] == INVALID_VALUE
    status, _, after = emulate(x, zeros)
    assert (status, (after - before).tolist()) == (0, [0, 0])


@needs_compiler
def test_a_library_of_another_release_is_not_called(emulate):
    x, zeros = np.ones((8, 16), np.float16), np.zeros((16, 16), np.float16)
    emulate.library.load_release(8)
    assert emulate(x, zeros, device=7)[0] == NOT_SUPPORTED
    emulate.library.load_release(10)
    assert emulate(x, zeros, device=7)[0] == 0


@needs_compiler
def test_its_function_is_to_be_found(emulate, tmp_path):
    folder = Path(__file__).with_name("cusparselt")
    library = native.CUSPARSELT._replace(machine_flags=lambda machine: [f"-I{folder}"])
    subprocess.run(library.command(COMPILER, tmp_path / "kernel.so", []), check=True)
    assert hasattr(ctypes.CDLL(str(tmp_path / "kernel.so")), library.target)


@pytest.fixture
def installed():
    try:
        folder, _ = native._cusparselt()
    except native.NoKernelError as error:
        pytest.skip(str(error))
    if not any(Path(f, "driver_types.h").exists() for f in (f"{folder}/include", CUDA_HEADERS)):
        pytest.skip("there are no headers of CUDA")


@needs_compiler
def test_it_is_compiled_against_the_library(installed, tmp_path):
    library = tmp_path / "kernel.so"
    command = native.CUSPARSELT.command(COMPILER, library, native.CUSPARSELT.machine())
    subprocess.run(command, check=True)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "libcusparseLt.so" in needed.stdout
    assert hasattr(ctypes.CDLL(str(library)), native.CUSPARSELT.target)


@pytest.mark.skipif(default_platform() != "cuda", reason="there is no GPU")
@pytest.mark.parametrize("dtype", cusparselt.DTYPES)
@pytest.mark.parametrize("shape", [(16, 16, 8), (48, 192, 24), (512, 1024, 4096)])
def test_a_gpu_multiplies_as_float64_does(installed, shape, dtype):
    case = Case("cuda", dtype, *shape)
    x, w = operands(case)
    assert cusparselt.serves(case)
    assert_product(jax.jit(cusparselt.run)(x, w.values, w.codes), x, w)


@pytest.mark.parametrize(
    "change",
    [
        {"platform": "cpu"},
        {"dtype": "float32"},
        {"inputs": 72},
        {"outputs": 24},
        {"batch": 12},
        {"outputs": 0},
        {"inputs": 0},
        {"batch": 0},
    ],
    ids=str,
)
def test_it_says_what_it_does_not_serve(monkeypatch, change):
    monkeypatch.setattr(native, "is_ready", lambda library: library is native.CUSPARSELT)
    assert cusparselt.serves(CASE)
    assert not cusparselt.serves(CASE._replace(**change))


@needs_compiler
@pytest.mark.parametrize("release", [None, "0.8.1"])
def test_without_the_library_one_line_says_so(monkeypatch, caplog, tmp_path, release):
    def found(name):
        if release is None:
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=release, locate_file=lambda name: tmp_path / name)

    monkeypatch.setattr(native.importlib.metadata, "distribution", found)
    said = "not installed" if release is None else "of release 0.8.1"
    message = not_ready(caplog, native.CUSPARSELT)
    assert f"nvidia-cusparselt-cu13 is {said}: pip install 'prox24[cusparselt]'" in message
