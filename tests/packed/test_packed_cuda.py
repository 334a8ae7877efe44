"""The kernels for GPUs, which none has run: on a CPU by emulation, and their machine code."""

import ctypes
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close
from test_packed_product import assert_product, needs_compiler, operands, problem

from prox24.packed import matmul, unpack
from prox24.packed._kernels import cuda, cusparselt, native

HERE = Path(__file__).parent
COMPILER = next(filter(None, map(shutil.which, native.CPP_COMPILERS)), None)
NVCC = next(filter(None, map(shutil.which, cuda.LIBRARY.compilers)), None)
DISASSEMBLER = shutil.which("nvdisasm") and shutil.which("cuobjdump")
CUDA_HEADERS = "/usr/local/cuda/include"
KERNELS = 2 * 4
"""Of an architecture: each dtype and tile."""
ARCHITECTURES = ("8.0", "9.0", "12.0")
"""The oldest, the newest, and one between them. nvcc takes eight seconds for each."""
ALLOC_FAILED, INVALID_VALUE, NOT_SUPPORTED = 2, 3, 10
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def compiled_for_tests(source, output, *flags):
    command = [COMPILER, *native.CPP_FLAGS, f"-I{native.FOLDER}", *flags]
    subprocess.run([*command, source, "-o", output], check=True)
    return ctypes.CDLL(str(output))


def addresses(*arrays):
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


# The kernel on sparse tensor cores


@needs_compiler
def test_what_lanes_hold_makes_the_product(tmp_path):
    library = compiled_for_tests(HERE / "emulate_mma.cc", tmp_path / "emulate.so")
    x, w = operands(8, 48, 192, "float32")
    found = np.full((8, 48), np.nan)
    pointers = addresses(*map(np.asarray, (x, w.values, w.codes)), found)
    library.emulate(*pointers, ctypes.c_int64(48), ctypes.c_int64(192))
    expected = np.asarray(x, np.float64) @ np.asarray(unpack(w), np.float64).T
    assert_close(found, expected, 192)  # terms of a sum


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_it_compiles_for_sparse_tensor_cores_without_spilled_registers(tmp_path):
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    targets = [n for n in ARCHITECTURES if f"sm_{n.replace('.', '')}" in known.stdout.split()]
    library = tmp_path / "kernel.so"
    command = cuda.LIBRARY._replace(flags=lambda: cuda.flags_for(targets)).command(NVCC, library)
    done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True, check=True)
    spilled = re.findall(r"(\d+) bytes spill stores", done.stdout + done.stderr)
    assert spilled == ["0"] * len(targets) * KERNELS
    if DISASSEMBLER is None:
        pytest.skip("there are no cuobjdump and nvdisasm")
    command = [DISASSEMBLER, "-sass", library]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert code.count("HMMA.SP") >= len(targets) * KERNELS * 2


@needs_gpu
@dtypes
@pytest.mark.parametrize("shape", [(16, 64), (48, 192), (64, 4096)])
def test_a_gpu_multiplies_as_float64_does(shape, dtype):
    for batch in (1, 8, 9, 17, 33, 64):
        x, w = operands(batch, *shape, dtype)
        assert_product(matmul(x, w, implementation="cuda"), x, w)


# cuSPARSELt


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Products by cusparselt.cc with a library of the same interface, in the host's memory."""
    path, folder = tmp_path_factory.mktemp("cusparselt") / "emulate.so", HERE / "cusparselt"
    includes = f"-I{folder}", f"-I{jax.ffi.include_dir()}"
    library = compiled_for_tests(folder / "emulate.cc", path, *includes)

    def run(x, weight, device=0, without_memory=False):
        """The status, the product, and how often the library and plans were begun so far."""
        found, used = np.zeros((len(x), len(weight)), x.dtype), (ctypes.c_int * 2)()
        sizes = map(ctypes.c_int64, (*weight.shape, len(x)))
        pointers = addresses(x, weight, found)
        status = library.emulate(device, *pointers, *sizes, without_memory, used)
        return status, found, np.array(used)

    run.library = library
    return run


@needs_compiler
@pytest.mark.parametrize("shape", [(8, 16, 16), (24, 16, 64), (16, 48, 32)])
def test_its_descriptors_make_the_product(stand_in, shape):
    x, w = operands(*shape, "bfloat16")
    status, found, _ = stand_in(np.asarray(x), np.asarray(unpack(w)))
    assert status == 0
    assert_product(found, x, w)
    assert hasattr(stand_in.library, cusparselt.LIBRARY.target)  # which XLA will call


@needs_compiler
def test_a_case_has_one_plan_and_a_device_one_handle(stand_in):
    weight, begun = np.zeros((32, 64), jnp.bfloat16), []
    for batch, device in ((128, 1), (128, 1), (8, 1), (128, 2)):
        status, _, used = stand_in(np.ones((batch, 64), weight.dtype), weight, device=device)
        assert status == 0
        begun.append(used - begun[0] if begun else used)
    assert np.array_equal(begun[1:], [[0, 0], [0, 1], [1, 2]])


@needs_compiler
def test_what_it_cannot_do_is_a_status_and_is_not_kept(stand_in):
    x, zeros = np.ones((8, 16), jnp.bfloat16), np.zeros((16, 16), jnp.bfloat16)
    status, _, before = stand_in(x, zeros)
    assert status == 0
    assert stand_in(x, np.ones_like(zeros))[0] == INVALID_VALUE  # four nonzeros in a block
    assert stand_in(x, zeros, without_memory=True)[0] == ALLOC_FAILED
    assert [stand_in(x[:4], zeros)[0] for _ in range(2)] == [INVALID_VALUE] * 2
    status, _, after = stand_in(x, zeros)
    assert (status, (after - before).tolist()) == (0, [0, 0])
    # A library of another release is not called.
    for release, expected in ((8, NOT_SUPPORTED), (10, 0)):
        stand_in.library.load_release(release)
        assert stand_in(x, zeros, device=7)[0] == expected


@pytest.fixture
def installed():
    try:
        folder, _ = cusparselt.installed()
    except native.NoKernelError as error:
        pytest.skip(str(error))
    if not any(Path(f, "driver_types.h").exists() for f in (f"{folder}/include", CUDA_HEADERS)):
        pytest.skip("there are no headers of CUDA")


@needs_compiler
def test_it_is_compiled_against_the_library(installed, tmp_path):
    library = tmp_path / "kernel.so"
    subprocess.run(cusparselt.LIBRARY.command(COMPILER, library), check=True)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "libcusparseLt.so" in needed.stdout
    assert hasattr(ctypes.CDLL(str(library)), cusparselt.LIBRARY.target)


@needs_gpu
@dtypes
@pytest.mark.parametrize("shape", [(8, 16, 16), (24, 48, 192), (4096, 512, 1024)])
def test_a_gpu_multiplies_by_cusparselt_as_float64_does(installed, shape, dtype):
    x, w = operands(*shape, dtype)
    assert_product(matmul(x, w, implementation="cusparselt"), x, w)


@needs_compiler
@pytest.mark.parametrize("release", [None, "0.8.1"])
def test_without_the_library_one_line_says_so(monkeypatch, caplog, tmp_path, release):
    def found(name):
        if release is None:
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=release, locate_file=lambda name: tmp_path / name)

    monkeypatch.setattr(metadata, "distribution", found)
    said = "not installed" if release is None else "of release 0.8.1"
    message = problem(caplog, cusparselt.LIBRARY)
    assert f"nvidia-cusparselt-cu13 is {said}: pip install 'nvidia-cusparselt-cu13" in message
