"""Runs the operator on eight CPU devices and prints what became of shardings, as JSON.

A program of its own, since the number of devices is fixed when JAX starts.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import prox24

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
ROWS, WIDTH = 16, 64
FUNCTIONS = {
    "prox": lambda y, lam: prox24.prox(y, 0.5),
    "prox along rows": lambda y, lam: prox24.prox(y, 0.5, axis=0),
    "prox 1:4": lambda y, lam: prox24.prox(y, 0.5, (1, 4)),
    "prox 2:8": lambda y, lam: prox24.prox(y, 0.5, (2, 8)),
    "prox, lam per row": prox24.prox,
    "top_mask": lambda y, lam: prox24.top_mask(y),
    "gradient": jax.grad(lambda y, lam: jnp.sum(prox24.prox(y, lam))),
}


def reports(kind, y, lam):
    """One report for each function and sharding, in a mesh of axes of a kind."""
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind, kind))
    for spec in (P("rows", None), P(None, "columns"), P("rows", "columns"), P("columns", "rows")):
        sharding = NamedSharding(mesh, spec)
        with jax.set_mesh(mesh):
            arguments = jax.device_put(y, sharding), jax.device_put(lam, P(spec[0], None))
            for name, function in FUNCTIONS.items():
                jitted = jax.jit(function)
                result = jitted(*arguments)
                program = jitted.lower(*arguments).compile().as_text()
                yield {
                    "function": name,
                    "axes": kind.name,
                    "spec": str(spec),
                    "kept": result.sharding.is_equivalent_to(sharding, 2),
                    "collectives": [name for name in COLLECTIVES if name in program],
                    "error": difference(result, function(y, lam)),
                }


def shard_map_report(y, lam):
    """The operator inside of shard_map."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    specs = P("rows", None)
    jitted = jax.jit(
        jax.shard_map(prox24.prox, mesh=mesh, in_specs=(specs, specs), out_specs=specs)
    )
    arguments = [jax.device_put(x, NamedSharding(mesh, specs)) for x in (y, lam)]
    result = jitted(*arguments)
    program = jitted.lower(*arguments).compile().as_text()
    return {
        "function": "prox in shard_map",
        "axes": "Manual",
        "spec": str(specs),
        "kept": result.sharding.is_equivalent_to(arguments[0].sharding, 2),
        "collectives": [name for name in COLLECTIVES if name in program],
        "error": difference(result, prox24.prox(y, lam)),
    }


def difference(result, expected):
    """Largest difference of two arrays, relative to the largest entry."""
    result, expected = np.asarray(result, np.float32), np.asarray(expected, np.float32)
    return float(np.abs(result - expected).max() / np.abs(expected).max())


def main():
    """Prints the list of reports."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    lam = jnp.asarray(rng.uniform(0.1, 1, (ROWS, 1)), jnp.float32)
    found = [shard_map_report(y, lam)]
    for kind in (AxisType.Auto, AxisType.Explicit):
        found += reports(kind, y, lam)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
