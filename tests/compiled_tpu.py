"""Compiles the kernels ahead of time for v5e and v6e and prints what became of it, as JSON.

A program of its own, since libtpu is loaded once and reads the environment when it is.
"""

import json
import os

# These keep libtpu from asking for the machine's.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from programs import collectives_of

import prox24
from prox24.packed._kernels import tpu as packed_tpu

SHAPE = (512, 1024)
PATTERNS = ((2, 4), (1, 4), (2, 8), (1, 2))


def kernels_of(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


def report(function, sharding, expected, dtype=jnp.float32):
    """How many kernels and which collectives a program has, and whether it keeps the sharding."""
    y = jax.ShapeDtypeStruct(SHAPE, dtype, sharding=sharding)
    compiled = jax.jit(function).lower(y).compile()
    return {
        "sharding": str(sharding),
        "expected": expected,
        "kernels": kernels_of(compiled),
        "collectives": collectives_of(compiled),
        "kept": compiled.output_shardings.is_equivalent_to(sharding, len(SHAPE)),
    }


def reports(devices):
    """One report for each pattern and dtype on one device, and for each sharding on four."""

    def prox(y):
        return prox24.prox(y, 0.3)

    one = SingleDeviceSharding(devices[0])
    for pattern in PATTERNS:
        yield report(lambda y, pattern=pattern: prox24.prox(y, 0.3, pattern), one, 1)
    yield report(prox, one, 1, jnp.bfloat16)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(np.array(devices).reshape(2, 2), ("x", "y"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            for spec in (P("x", None), P(None, "y"), P(None, None)):
                yield report(prox, NamedSharding(mesh, spec), 0)
    mesh = Mesh(np.array(devices).reshape(2, 2), ("x", "y"))
    spec = P("x", "y")
    mapped = jax.shard_map(prox, mesh=mesh, in_specs=spec, out_specs=spec)
    yield report(mapped, NamedSharding(mesh, spec), 1)


def products(devices):
    """The packed product on one device, and for rows of the weight on four."""
    inputs, outputs = 1024, 512
    mesh = Mesh(np.array(devices), ("x",))
    split, whole = P("x"), P()
    mapped = jax.shard_map(
        packed_tpu.run, mesh=mesh, in_specs=(whole, split, split), out_specs=P(None, "x")
    )
    one = SingleDeviceSharding(devices[0])
    for function, of_x, of_weight in (
        (packed_tpu.run, one, one),
        (mapped, NamedSharding(mesh, whole), NamedSharding(mesh, split)),
    ):
        for dtype in ("float32", "bfloat16"):
            compiled = (
                jax.jit(function)
                .lower(
                    jax.ShapeDtypeStruct((3, inputs), dtype, sharding=of_x),
                    jax.ShapeDtypeStruct((outputs, inputs // 2), dtype, sharding=of_weight),
                    jax.ShapeDtypeStruct((outputs, inputs // 32), "uint32", sharding=of_weight),
                )
                .compile()
            )
            yield {"kernels": kernels_of(compiled), "collectives": collectives_of(compiled)}


def main():
    """Prints the lists of reports."""
    found = {"prox": [], "matmul": []}
    for chip in ("v5e", "v6e"):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
        found["prox"] += reports(topology.devices)
        found["matmul"] += products(topology.devices)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
