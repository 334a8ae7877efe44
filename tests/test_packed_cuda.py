"""The kernel for GPUs, which none has run: its layouts on a CPU, its machine code, its lowering."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_packed_matmul import assert_product

from prox24.packed import cuda, matmul, native, table, unpack
from prox24.packed.implementation import Case, default_platform
from prox24.packed.table import Measurement
from prox24.packed.tuning import random_packed

COMPILER = next(filter(None, map(shutil.which, native.CPU.compilers)), None)
NVCC = next(filter(None, map(shutil.which, native.CUDA.compilers)), None)
DISASSEMBLER = shutil.which("nvdisasm") and shutil.which("cuobjdump")
KERNELS = 2 * 4
"""Of an architecture: each dtype and tile."""
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CASE = Case("cuda", "bfloat16", 32, 128, 4)


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_what_lanes_hold_makes_the_product(tmp_path):
    library = tmp_path / "emulate.so"
    source = Path(__file__).with_name("emulate_mma.cc")
    folder = native.CUDA.source.parent
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{folder}", source]
    subprocess.run([*command, "-o", library], check=True)
    emulate = ctypes.CDLL(str(library)).emulate
    rng = np.random.default_rng(0)
    w = random_packed(rng, 48, 192, "float32")
    x = rng.standard_normal((8, 192), np.float32)
    found = np.full((8, 48), np.nan)
    arrays = [np.ascontiguousarray(array) for array in (x, w.values, w.codes)]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, found)]
    emulate(*pointers, ctypes.c_int64(48), ctypes.c_int64(192))
    expected = x.astype(np.float64) @ np.asarray(unpack(w), np.float64).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


class Compiled(NamedTuple):
    """The library, for how many architectures it is, and what the compiler said."""

    library: Path
    architectures: int
    said: str


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if NVCC is None:
        pytest.skip("there is no nvcc")
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    codes = {number: f"sm_{number.replace('.', '')}" for number in ARCHITECTURES}
    architectures = [number for number, code in codes.items() if code in known.stdout.split()]
    library = tmp_path_factory.mktemp("cuda") / "kernel.so"
    command = native.CUDA.command(NVCC, library, architectures)
    done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True, check=True)
    return Compiled(library, len(architectures), done.stdout + done.stderr)


@pytest.mark.slow
def test_it_compiles_for_every_architecture_without_spilled_registers(compiled):
    kernels = re.findall(r"(\d+) bytes spill stores", compiled.said)
    assert len(kernels) == compiled.architectures * KERNELS
    assert set(kernels) == {"0"}


@pytest.mark.slow
@pytest.mark.skipif(DISASSEMBLER is None, reason="there are no cuobjdump and nvdisasm")
def test_its_machine_code_multiplies_sparse_matrices(compiled):
    command = [DISASSEMBLER, "-sass", compiled.library]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert code.count("HMMA.SP") >= compiled.architectures * KERNELS * 2


@pytest.mark.skipif(default_platform() != "cuda", reason="there is no GPU")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("batch", [1, 8, 9, 17, 33, 64])
@pytest.mark.parametrize("shape", [(16, 64), (48, 192), (64, 4096)])
def test_a_gpu_multiplies_as_float64_does(shape, batch, dtype):
    w = random_packed(np.random.default_rng(0), *shape, dtype)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((batch, shape[1])), dtype)
    assert cuda.serves(Case("cuda", dtype, *shape, batch))
    assert_product(cuda.run(x, w.values, w.codes), x, w)


@pytest.mark.parametrize(
    "change",
    [
        {"platform": "cpu"},
        {"dtype": "float32"},
        {"inputs": 96},
        {"outputs": 24},
        {"outputs": 0},
        {"batch": 0},
        {"batch": 65},
    ],
    ids=str,
)
def test_it_says_what_it_does_not_serve(monkeypatch, change):
    monkeypatch.setattr(native, "is_ready", lambda library: library is native.CUDA)
    assert cuda.serves(CASE)
    assert not cuda.serves(CASE._replace(**change))


@pytest.mark.parametrize(
    ("name", "library"), [("cuda", native.CUDA), ("cusparselt", native.CUSPARSELT)]
)
def test_a_program_for_gpus_calls_it_where_it_was_measured_to_be_faster(monkeypatch, name, library):
    monkeypatch.setattr(native, "is_ready", lambda asked: asked is library)
    case = CASE._replace(batch=8)
    w = random_packed(np.random.default_rng(0), case.outputs, case.inputs, case.dtype)
    x = jnp.ones((case.batch, case.inputs), case.dtype)

    def lowered(*measured):
        monkeypatch.setattr(table, "read", lambda platform: measured)
        jax.clear_caches()
        return jax.jit(matmul).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()

    assert library.target not in lowered()
    assert library.target in lowered(Measurement(case, {"unpack": 2.0, name: 1.0}, 3.0))
    assert library.target not in lowered(Measurement(case, {"unpack": 1.0, name: 2.0}, 3.0))
