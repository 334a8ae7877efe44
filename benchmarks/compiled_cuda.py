"""Compiles the programs of prox24 for absent chips, and counts their kernels.

    make test-cuda
    .venv-cuda/bin/python benchmarks/compiled_cuda.py --output docs/figures
    .venv-cuda/bin/python benchmarks/compiled_cuda.py --chips h100 --programs prox "prox, bfloat16"
    pip install 'jax[tpu]' && python benchmarks/compiled_cuda.py --chips v5e --output docs/figures

The chips are NVIDIA GPUs and one TPU. A line of the file takes the place of the line with the same
chip and program.

Nothing is run. XLA cannot time alternatives without the GPU, so products are calls of cuBLAS. A row
is one call of a program. Its loops are multiplied out. A loop that ends by a condition takes its
usual number of turns.

launches     kernels and library calls
MB           bytes of operands and results of every kernel; of a slice, the bytes of the slice
least        MB of the arguments, read once, and of the results, written once
temporary    MB of XLA's buffers
ms           an estimate: the sum over the kernels of their longest time
products     the part of the estimate that the operations of products take
precision    of the products; float32 at HIGHEST is not TF32

"three TF32" are products in three passes, the recipe's products="tf32x3".

The times of a kernel are its bytes over the bandwidth, the operations of its products over their
rate, its instructions over the issue rate, and 2.5 microseconds for a launch. No estimate was
compared with a chip.

On a TPU, launches are the instructions on arrays. Arrays in the chip's own memory add no MB. In
place of instructions are the cycles that libtpu estimates for a kernel. It has no estimate for
transfers, kernels of Pallas and some others. The cost of a launch is unknown and left out.

`--check FILE` compares with the rows of an earlier run. The exit code is 1 if launches or MB of a
program have grown by more than a tenth, or if its products have another precision. `make test-cuda`
checks against docs/figures/compiled-cuda.csv.
"""

import base64
import collections
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tpu_compiler
from jax import Array
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import prox24
from prox24 import packed
from prox24._core.precision import products
from prox24._jobs.forward import layer_function, run_layer
from prox24._jobs.observe import observe_layer
from prox24._models import spec
from prox24._models.families import config_from_hf
from prox24._pruning.grams import GramSum
from prox24._solvers.damping import inverse
from prox24._solvers.problem import LayerProblem, corrected_weight
from prox24._solvers.solve import solve_program
from prox24.optax import proximal
from prox24.packed import Packed24

SPECS = Path(__file__).parent / "gpus"


class Machine(NamedTuple):
    """Rates a second: bytes, operations of products by their precision, instructions."""

    platform: str
    bandwidth: float
    products: Mapping[str, float]
    issued: float
    launch: float = 0.0  # seconds
    look: float = 0.0  # seconds of the host's look at the condition of a loop
    architecture: str = ""


def gpu(
    architecture: str, bandwidth: float, float32: float, tf32: float, bfloat16: float, issued: float
) -> Machine:
    rates = {"f32 HIGHEST": float32, "f32 TF32": tf32, "bf16": bfloat16}
    return Machine("cuda", bandwidth, rates, issued, 2.5e-6, 10e-6, architecture)


MACHINES = {
    "h100": gpu("sm_90a", 3.35e12, 60e12, 400e12, 800e12, 132 * 128 * 1.755e9),
    "a100": gpu("sm_80", 2.04e12, 18e12, 140e12, 280e12, 108 * 128 * 1.41e9),
    # https://cloud.google.com/tpu/docs/v5e. At HIGHEST a float32 array is three in bfloat16, and
    # two of them make six products. The clock follows from four units of 128 x 128.
    "v5e": Machine(
        "tpu",
        819e9,
        {"f32 HIGHEST": 197e12 / 6, "f32 x bf16 HIGHEST": 197e12 / 3, "bf16": 197e12},
        197e12 / (4 * 2 * 128**2),
    ),
}
GPUS = [name for name, machine in MACHINES.items() if machine.platform == "cuda"]


class Program(NamedTuple):
    """A jitted function, its arguments as shapes, the turns of loops that end by a condition."""

    function: Any
    arguments: tuple[Any, ...]
    turns: tuple[int, ...] = ()
    static: Mapping[str, Any] = MappingProxyType({})
    products: str = "float32"  # of a recipe
    devices: int = 1  # They share the rows of the first argument's first array.


def float32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bfloat16(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def slope(y: Array, lam: Array, cotangent: Array) -> Array:
    return jax.vjp(lambda y: prox24.prox(y, lam), y)[1](cotangent)[0]


def of_prox() -> dict[str, Program]:
    n = 4096
    x, lam, planes = float32(n, n), float32(), tuple(float32(n, n // 4) for _ in range(4))
    prox = jax.jit(prox24.prox, static_argnames=("axis", "pattern"))
    pairs = {"pattern": prox24.Pattern(2, 4, unit=2)}
    return {
        "prox": Program(prox, (x, lam)),
        "prox, bfloat16": Program(prox, (bfloat16(n, n), lam)),
        "prox, axis 0": Program(prox, (x, lam), static={"axis": 0}),
        "prox, pairs": Program(prox, (x, lam), static=pairs),
        "prox, gradient": Program(jax.jit(slope), (x, lam, x)),
        "planes.prox": Program(jax.jit(prox24.planes.prox), (planes, lam)),
        "top_mask": Program(jax.jit(prox24.top_mask), (x,)),
    }


def of_optax() -> dict[str, Program]:
    def step_of(optimizer: Any, dtype: Callable[..., Any]) -> Program:
        params = {f"layer{i}": {"kernel": dtype(4096, 4096)} for i in range(2)}

        def step(gradients: Any, state: Any, params: Any) -> Any:
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(optimizer.init, params)
        return Program(jax.jit(step, donate_argnums=(1, 2)), (params, state, params))

    last = proximal(prox24.Exponential(1e-3, 1.05))
    return {
        "adam, 2 x (4096, 4096)": step_of(optax.adam(1e-3), float32),
        "proximal, 2 x (4096, 4096)": step_of(last, float32),
        "proximal, bfloat16": step_of(last, bfloat16),
        "adam + proximal": step_of(optax.chain(optax.adam(1e-3), last), float32),
    }


# Turns of a solver's loops: attempts at the first inverse, values of rho, attempts and steps for
# each value, steps of the refit.
USUAL = (1, 5, 1, 4, 8)


def solving(
    rows: int, width: int, solver: Any, refit: Any = None, turns: tuple[int, ...] = ()
) -> Program:
    problem = LayerProblem(float32(rows, width), float32(width, width))
    static = {"pattern": prox24.Pattern(2, 4)}
    return Program(solve_program, (problem, solver, refit, float32()), turns, static)


def of_solvers() -> dict[str, Program]:
    wanda, refit = prox24.Wanda(), prox24.ConjugateGradients()
    found = {
        f"inverse, {width}": Program(jax.jit(inverse), (float32(width, width),))
        for width in (4096, 14336)
    }
    return found | {
        "SparseGPT, (4096, 4096)": solving(4096, 4096, prox24.SparseGPT(), None, (1,)),
        "Wanda, (4096, 4096)": solving(4096, 4096, wanda),
        "conjugate gradients": solving(4096, 4096, wanda, refit, (20,)),
    }


def of_model(config: Mapping[str, Any], prefix: str = "") -> dict[str, Program]:
    """The linears and a layer of a Llama, on a window of 2,048 tokens, its weights in bfloat16."""
    recipe, found = prox24.Recipe(), dict[str, Program]()
    for shape in common.llama_linears(config):
        width = shape[1]
        found[f"{prefix}default, {shape}"] = solving(*shape, recipe.solver, recipe.refit, USUAL)
        correcting = (float32(*shape), float32(width, width), float32(width, width), float32())
        found[f"{prefix}correction, {shape}"] = Program(corrected_weight, correcting, (1,))
    layer = config_from_hf(dict(config)).layers[0]
    weights = {name: bfloat16(*shape) for name, shape in spec.layer_shapes(layer).items()}
    hidden, count = float32(1, 2048, layer.hidden), jax.ShapeDtypeStruct((), jnp.int32)
    narrow = dict.fromkeys(("attention_input", "attention_output", "mlp_input"), layer.hidden)
    widths = narrow | {"mlp_activation": config["intermediate_size"]}
    sums = {name: GramSum(float32(w, w), float32(w, w), count) for name, w in widths.items()}
    fast = jax.jit(layer_function(layer, None, "bfloat16"))

    def loss(weights: Any, hidden: Array, target: Array) -> Array:
        output = layer_function(layer, None, "float32")(weights, hidden)
        return jnp.mean(jnp.square(output - target))

    layers = {
        "layer": Program(run_layer, (layer, weights, hidden)),
        "layer, bfloat16": Program(fast, (weights, hidden)),
        "layer and Grams": Program(observe_layer, (layer, weights, hidden, None, sums, {})),
        "layer, dense too, and Grams": Program(
            observe_layer, (layer, weights, hidden, hidden, sums, sums)
        ),
        "layer, gradient": Program(jax.jit(jax.grad(loss)), (weights, hidden, hidden)),
    }
    return found | {prefix + name: program for name, program in layers.items()}


def of_packed() -> dict[str, Program]:
    """Products in bfloat16 with a weight (4096, 4096), dense and packed."""
    weight = Packed24(bfloat16(4096, 2048), jax.ShapeDtypeStruct((4096, 128), jnp.uint32))

    dense = jax.jit(lambda x, weight: x @ weight.T), bfloat16(4096, 4096)
    ways = {"dense": dense, "packed": (jax.jit(packed.matmul), weight)}
    return {
        f"{name} product, batch {batch}": Program(function, (bfloat16(batch, 4096), w))
        for batch in (1, 512)
        for name, (function, w) in ways.items()
    }


def every_program() -> dict[str, Program]:
    """Some also with float32 products in three TF32 passes, and some on one of eight devices."""
    found, costly = of_prox() | of_optax(), of_solvers() | of_model(common.LLAMAS["8B"])
    found |= costly
    for name, program in costly.items():
        if name.startswith(("inverse", "default", "layer and", "layer, dense")):
            found[f"{name}, three TF32"] = program._replace(products="tf32x3")
    found |= of_packed()
    for name in ("prox", "default, (4096, 4096)"):
        found[f"{name}, 8 devices"] = found[name]._replace(devices=8)
    return found


# What XLA wrote


SIZES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
SIZES |= {"u16": 2, "s16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\](?:\{{[^{{}}]*\}})?")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
FREE |= {"opt-barrier", "partition-id", "replica-id"}


class Instruction(NamedTuple):
    """A line of a computation of HLO. The operand of a constant is its value."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool

    def called(self, key: str) -> str | None:
        found = re.search(rf"{key}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)


Computation = dict[str, Instruction]
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)((?:, .*)?)$")


def parsed(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the first to run."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head.group(2)
            computations[name] = {}
            entry = name if head.group(1) else entry
        elif found := LINE.match(re.sub(r"/\*[^*]*\*/", "", line)):
            root, own, shape, opcode, inside, attributes = found.groups()
            operands = re.findall(r"%([\w.\-]+(?:#\d+)?)", inside)
            operands = [inside] if opcode == "constant" else operands
            each = Instruction(own, shape, opcode, operands, attributes, bool(root))
            computations[name][own] = each
    return computations, entry


def bytes_of(shape: str) -> int:
    """Bytes of the arrays in the main memory. A TPU's layouts name other memory, such as S(1)."""
    return sum(
        SIZES[found.group(1)] * math.prod(sizes_of(found.group()))
        for found in ARRAY.finditer(shape)
        if "S(" not in found.group()
    )


def size_of(shape: str) -> int:
    """The bytes of arrays in any memory."""
    return bytes_of(shape.replace("S(", ""))


def shape_of(computation: Computation, operand: str) -> str:
    """Newer releases write an entry of a tuple as %tuple#1."""
    name, _, place = operand.partition("#")
    shape = computation[name].shape if name in computation else ""
    return [found.group() for found in ARRAY.finditer(shape)][int(place)] if place else shape


def sizes_of(shape: str) -> list[int]:
    found = ARRAY.search(shape)
    return [int(n) for n in found.group(2).split(",") if n] if found else []


def fusion_bytes(computation: Computation) -> int:
    """Bytes that a fusion reads and writes. A sliced operand counts by its slices."""
    users = collections.defaultdict(list)
    for each in computation.values():
        for place, operand in enumerate(each.operands):
            users[operand.partition("#")[0]].append((each, place))

    def read(name: str, whole: int) -> int:
        total = 0
        for user, place in users[name]:
            if user.opcode == "bitcast":
                total += read(user.name, whole)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += size_of(user.shape)
            elif not (user.opcode == "dynamic-update-slice" and place == 0):
                return whole
        return min(total, whole)

    def written(name: str) -> int:
        each = computation[name]
        if each.opcode in ("bitcast", "tuple"):
            return sum(map(written, each.operands))
        if each.opcode == "dynamic-update-slice":
            return min(bytes_of(shape_of(computation, each.operands[1])), bytes_of(each.shape))
        return bytes_of(each.shape)

    inputs = (each for each in computation.values() if each.opcode == "parameter")
    root = next(each.name for each in computation.values() if each.root)
    return sum(read(each.name, bytes_of(each.shape)) for each in inputs) + written(root)


def named(attributes: str) -> str:
    """The function that a custom call runs, or nothing."""
    found = re.search(r'custom_call_target="([^"]*)"', attributes)
    return found.group(1) if found else ""


def is_free(each: Instruction, computation: Computation) -> bool:
    """Whether nothing is launched. A TPU computes single numbers beside its work on arrays."""
    shapes = [each.shape, *(shape_of(computation, operand) for operand in each.operands)]
    scalar = ":T(" in each.shape and all(math.prod(sizes_of(shape)) == 1 for shape in shapes)
    free = each.opcode in FREE or each.opcode.endswith("-done")
    return free or scalar or named(each.attributes) == "ConcatBitcast"


@dataclasses.dataclass
class Kernel:
    """A launch: its name, its number of times, and its work."""

    name: str
    times: int
    moved: int
    operations: float = 0.0
    precision: str = ""


def product_of_tpu(each: Instruction, computation: Computation) -> tuple[float, str]:
    """The operations of a product of libtpu, and its precision.

    It is a convolution, or the second product of an attention in a kernel that libtpu brings along.
    (b, m, k) times (b, k, n) is (b, m, n). Digits in labels are axes along which a window moves.
    They are axes of b if all three arrays have them.
    """
    shapes = [*(shape_of(computation, operand) for operand in each.operands[:2]), each.shape]
    said = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    labels = said.groups() if said else ("0bf", "0io", "0bf")
    x, y, xy = (
        dict(zip(label, sizes_of(shape), strict=True))
        for label, shape in zip(labels, shapes, strict=True)
    )
    products = math.prod(n for axis, n in x.items() if axis.isdigit() and n == y[axis] == xy[axis])
    elements = math.prod(math.prod(array.values()) for array in (x, y, xy))
    body = re.search(r'"body":"([^"]*)"', each.attributes)
    full = "operand_precision={highest,highest}" in each.attributes or (
        body and b"contract_precision<fp32>" in base64.b64decode(body.group(1))
    )
    # A mask is multiplied in bfloat16.
    found = {kind for shape in shapes[:2] for kind, _ in ARRAY.findall(shape)}
    kinds = sorted({"bf16" if kind == "pred" else kind for kind in found}, reverse=True)
    precision = "" if kinds == ["bf16"] else " HIGHEST" if full else " DEFAULT"
    return 2.0 * math.sqrt(elements / products), " x ".join(kinds) + precision


def product(each: Instruction, computation: Computation) -> tuple[float, str]:
    """The operations of a product of cuBLAS, and its precision."""
    left = shape_of(computation, each.operands[0])
    summed = re.search(
        r'lhs_contracting_(?:dimensions":\[|dims=\{)([\d," ]*)[\]}]', each.attributes
    )
    axes = [int(n) for n in re.findall(r"\d+", summed.group(1))] if summed else []
    operations = 2.0 * math.prod(sizes_of(each.shape))
    operations *= math.prod(sizes_of(left)[axis] for axis in axes)
    said = re.search(r'operand_precision(?:":\[|=\{)([\w," ]*)[\]}]', each.attributes)
    precision = said.group(1).replace('"', "").upper() if said else "DEFAULT,DEFAULT"
    kind = ARRAY.search(left)
    assert kind is not None
    if SIZES[kind.group(1)] < 4:
        return operations, kind.group(1)
    tf32 = '"algorithm":"ALG_DOT_TF32_TF32_F32"' in each.attributes
    return operations, f"{kind.group(1)} {'TF32' if tf32 else precision.split(',')[0]}"


class Walk:
    """The kernels of a program, and the host's looks at conditions."""

    def __init__(self, text: str, turns: tuple[int, ...]) -> None:
        self.computations, entry = parsed(text)
        self.turns, self.looks = list(turns), 0
        self.kernels: list[Kernel] = []
        self._visit(entry, 1)
        if self.turns:
            raise ValueError(f"the program has fewer loops that end by a condition: {self.turns}")

    def _visit(self, name: str | None, times: int) -> None:
        assert name is not None
        computation = self.computations[name]
        for each in computation.values():
            if each.opcode == "while":
                known = self._known_turns(each)
                turns = self.turns.pop(0) if known is None else known
                self._visit(each.called("body"), times * turns)
                if known is None:
                    self.looks += times * (turns + 1)
                    self._visit(each.called("condition"), times * (turns + 1))
            elif each.opcode == "conditional":
                branches = re.search(r"branch_computations=\{%?([\w.\-]+)", each.attributes)
                first = branches.group(1) if branches else each.called("true_computation")
                self._visit(first, times)
            elif each.opcode in ("call", "async-start"):
                self._visit(each.called("to_apply") or each.called("calls"), times)
            elif not is_free(each, computation):
                self.kernels.append(self._kernel(each, computation, times))

    def _known_turns(self, loop: Instruction) -> int | None:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known.group(1))
        # libtpu does not write it. Its counters begin at zero.
        condition = self.computations[str(loop.called("condition"))]
        root = next(each for each in condition.values() if each.root)
        limit = condition.get(root.operands[-1]) if root.operands else None
        counted = root.opcode == "compare" and "direction=LT" in root.attributes
        return int(limit.operands[0]) if counted and limit and limit.opcode == "constant" else None

    def _kernel(self, each: Instruction, computation: Computation, times: int) -> Kernel:
        shapes = [shape_of(computation, operand) for operand in each.operands]
        kernel = Kernel(each.name, times, bytes_of(each.shape) + sum(map(bytes_of, shapes)))
        if each.opcode.startswith("fusion"):
            fused = self.computations[str(each.called("calls"))]
            kernel.moved = fusion_bytes(fused)
            for inner in fused.values():
                if inner.opcode == "convolution":
                    kernel.operations, kernel.precision = product_of_tpu(inner, fused)
        elif each.opcode in ("dynamic-slice", "slice"):
            kernel.moved = bytes_of(each.shape) + min(size_of(each.shape), bytes_of(shapes[0]))
        elif each.opcode in ("copy-start", "slice-start"):
            # From one memory of a TPU to the other.
            kernel.moved = min(
                size_of(found.group()) for found in [*ARRAY.finditer(each.shape)][:2]
            )
        elif each.opcode == "convolution" or each.name.startswith("online-softmax"):
            kernel.operations, kernel.precision = product_of_tpu(each, computation)
        elif "matmul" in (target := named(each.attributes)):
            kernel.operations, kernel.precision = product(each, computation)
        elif "riangularSolve" in target:
            kernel.operations = sizes_of(shapes[0])[-1] * math.prod(sizes_of(shapes[1]))
        elif "potrf" in target:
            kernel.operations = sizes_of(shapes[0])[-1] ** 3 / 3
        return kernel


# Output of NVIDIA's assembler


def tool(name: str) -> str:
    spec = importlib.util.find_spec("nvidia")
    for base in spec.submodule_search_locations if spec else ():
        for path in Path(base).glob(f"cu*/bin/{name}"):
            return str(path)
    sys.exit(
        f"{name} is missing: run make .venv-cuda/test.stamp, and this by .venv-cuda/bin/python"
    )


FEW_THREADS = 2**15
"""Kernels of fewer take no longer than a launch, whatever their instructions."""


def instructions(folder: Path, architecture: str) -> dict[str, int]:
    """Instructions times threads of each large kernel, by the name of its operation."""
    (sequence,), (metadata,) = (
        [*folder.glob(f"*thunk_{kind}.txt")] for kind in ("sequence", "metadata")
    )
    launched = {
        int(number): (name, math.prod(map(int, f"{grid},{block}".split(","))))
        for number, name, grid, block in re.findall(
            r"(\d+): kCustomKernel .*\] (\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]",
            sequence.read_text(),
        )
    }
    large = {name for name, threads in launched.values() if threads >= FEW_THREADS}
    counts = {}
    for ptx in (path for path in folder.glob("*.ptx") if path.stat().st_size):
        if large.isdisjoint(re.findall(r"\.entry (\w+)", ptx.read_text())):
            continue
        cubin = folder / "kernels.cubin"
        command = [tool("ptxas"), f"-arch={architecture}", ptx, "-o", cubin]
        subprocess.run(command, check=True, capture_output=True)
        listing = subprocess.check_output([tool("nvdisasm"), cubin], text=True)
        for part in re.split(r"\n//-+ \.text\.", listing)[1:]:
            found = re.findall(
                r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z]\w*)", part, re.M
            )
            counts[part.split()[0]] = sum(name != "NOP" for name in found)
    pairs = re.findall(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)', metadata.read_text())
    return {
        operation: counts.get(name, 0) * threads
        for operation, number in pairs
        for name, threads in [launched.get(int(number), ("", 0))]
    }


def gpu_devices(name: str) -> Sequence[Any]:
    text = (SPECS / f"{name}.txtpb").read_text(encoding="utf-8")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=text, topology="1x1x8"
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        sys.exit(f"no compiler for CUDA ({error}): run make .venv-cuda/test.stamp")
    return topology.devices


def compiled_for_gpu(lowered: Any, machine: Machine) -> tuple[Any, dict[str, int]]:
    """The program, and `instructions` of its kernels."""
    with tempfile.TemporaryDirectory() as name:
        options: dict[str, Any] = {"xla_dump_to": name, "xla_dump_hlo_as_text": True}
        options |= {"xla_gpu_enable_triton_gemm": False}
        if jax.__version_info__ >= (0, 11):  # Older ones write PTX without being asked.
            options["xla_dump_emitter_re"] = ".*"
        compiled = lowered.compile(compiler_options=options)
        return compiled, instructions(Path(name), machine.architecture)


def compiled_for_tpu(lowered: Any, machine: Machine) -> tuple[Any, dict[str, int]]:
    """The program, and the cycles of its kernels."""
    compiled = lowered.compile()
    cycles = re.findall(r'%([\w.\-]+) = .*"estimated_cycles":"(\d+)"', compiled.as_text())
    return compiled, {name: int(number) for name, number in cycles}


COMPILERS = {
    "cuda": (gpu_devices, compiled_for_gpu),
    "tpu": (tpu_compiler.devices, compiled_for_tpu),
}


class Chip:
    """A chip to compile for."""

    def __init__(self, name: str) -> None:
        self.machine = MACHINES[name]
        devices, self.compiled = COMPILERS[self.machine.platform]
        self.devices = devices(name)

    def placed(self, program: Program) -> tuple[Any, ...]:
        """The arguments with shardings."""
        mesh = Mesh(np.array(self.devices[: program.devices]), "d")
        rows, copies = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("d",), ()))
        if program.devices == 1:
            rows = copies = SingleDeviceSharding(self.devices[0])
        shardings = itertools.chain([rows], itertools.repeat(copies))

        def place(leaf: Any) -> Any:
            array = isinstance(leaf, jax.ShapeDtypeStruct)
            return leaf.update(sharding=next(shardings)) if array else leaf

        return jax.tree.map(place, program.arguments)

    def count(self, program: Program) -> dict[str, Any]:
        """The columns of a line, see above."""
        arguments = self.placed(program)
        with products(program.products):
            lowered = program.function.lower(*arguments, **program.static)
        compiled, issued = self.compiled(lowered, self.machine)
        walk, memory = Walk(compiled.as_text(), program.turns), compiled.memory_analysis()
        least = memory.argument_size_in_bytes + memory.output_size_in_bytes
        times = [(each, self.seconds(each, issued.get(each.name, 0))) for each in walk.kernels]
        multiplying = sum(each.times * self.rate(each) for each in walk.kernels)
        looking = walk.looks * self.machine.look
        precisions = {each.precision for each in walk.kernels if each.precision}
        return {
            "launches": sum(each.times for each in walk.kernels),
            "MB": sum(each.times * each.moved for each in walk.kernels) / 1e6,
            "least": least / 1e6,
            "temporary": memory.temp_size_in_bytes / 1e6,
            "ms": 1e3 * (sum(e.times * seconds for e, seconds in times) + looking),
            "products": 1e3 * multiplying,
            "precision": " ".join(sorted(precisions)),
        }

    def rate(self, kernel: Kernel) -> float:
        """Seconds of the operations of a product."""
        rates = self.machine.products
        return kernel.operations / rates.get(kernel.precision, rates["f32 HIGHEST"])

    def seconds(self, kernel: Kernel, issued: int) -> float:
        moved, issuing = kernel.moved / self.machine.bandwidth, issued / self.machine.issued
        return max(self.machine.launch, moved, self.rate(kernel), issuing)


def compare(rows: common.Rows, earlier: common.Rows) -> Iterator[str]:
    """Sentences about the figures that became worse."""
    before = {(row["chip"], row["program"]): row for row in earlier}
    for row in rows:
        name, old = f"{row['program']} on {row['chip']}", before.get((row["chip"], row["program"]))
        if old is None:
            yield f"{name}: there is no earlier line"
            continue
        for column in ("launches", "MB"):
            if float(row[column]) > 1.1 * float(old[column]):
                yield f"{name}: {column} {float(old[column]):.0f} -> {float(row[column]):.0f}"
        if row["precision"] != old["precision"]:
            yield f"{name}: products were {old['precision']}, are {row['precision']}"


def main() -> None:
    of_models = {
        name: every_program() if name == "8B" else of_model(config, f"{name}: ")
        for name, config in common.LLAMAS.items()
    }
    programs = {name: own for model in of_models.values() for name, own in model.items()}
    parser = common.parser_of(__doc__)
    parser.add_argument("--chips", nargs="+", choices=MACHINES, default=GPUS)
    parser.add_argument("--models", nargs="+", choices=of_models, default=["8B"])
    parser.add_argument("--programs", nargs="+", choices=programs, help="default: all of --models")
    parser.add_argument("--check", type=Path, metavar="FILE")
    common.add_output(parser)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.chips:
        chip = Chip(name)
        for program in arguments.programs or itertools.chain(*map(of_models.get, arguments.models)):
            if programs[program].products == "tf32x3" and "f32 TF32" not in chip.machine.products:
                continue
            key = {"chip": name, "program": program}
            print(f"{name}: {program}", file=sys.stderr, flush=True)
            rows.append({k: str(v) for k, v in (key | chip.count(programs[program])).items()})
    numbers = ("launches", "MB", "least", "temporary", "ms", "products")
    common.show(
        (*rows[0], "MB / least"),
        [
            [row["chip"], row["program"]]
            + [f"{float(row[title]):,.{0 if title == 'launches' else 2}f}" for title in numbers]
            + [row["precision"], f"{float(row['MB']) / float(row['least']):.2f}"]
            for row in rows
        ],
    )
    if arguments.check:
        worse = list(compare(rows, common.read_rows(arguments.check, list(rows[0]))))
        print("\n".join(worse) or "nothing has become worse")
        sys.exit(bool(worse))
    path = arguments.output / "compiled-cuda.csv"
    lines = [*common.read_rows(path, list(rows[0])), *rows]
    common.write_rows(path, [*{(row["chip"], row["program"]): row for row in lines}.values()])


if __name__ == "__main__":
    main()
