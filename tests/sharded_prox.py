"""Runs the operator on eight CPU devices and prints what became of shardings, as JSON.

A program of its own, since the number of devices is fixed when JAX starts.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import collectives_of, largest_difference, use_eight_devices

import prox24
from prox24.optax import proximal

use_eight_devices()

ROWS, WIDTH = 16, 64


def landing(y, lam):
    """The update of one of three equal leaves."""
    transform, params = proximal(0.5), {"w1": y, "w2": 2 * y, "w3": 3 * y}
    return transform.update(params, transform.init(params), params)[0]["w2"]


def turned(y, other):
    """The updates of two leaves of one shape, which may have different shardings."""
    transform, params = proximal(0.5), {"query": y, "out": other}
    return transform.update(params, transform.init(params), params)[0]


BOTH = P("rows", "columns")
SHARDINGS = (P(None, "columns"), BOTH)
EVERYWHERE = ("prox", "prox along rows")
"""On every sharding; the others where both axes are sharded, which is the hardest to keep."""
FUNCTIONS = {
    "prox": lambda y, lam: prox24.prox(y, 0.5),
    "prox along rows": lambda y, lam: prox24.prox(y, 0.5, axis=0),
    "prox 1:4": lambda y, lam: prox24.prox(y, 0.5, (1, 4)),
    "prox, lam per row": prox24.prox,
    "optax, equal leaves": landing,
    "top_mask": lambda y, lam: prox24.top_mask(y),
    "gradient": jax.grad(lambda y, lam: jnp.sum(prox24.prox(y, lam))),
}


def report(function, axes, arguments, expected):
    """What became of the sharding of the first argument, which the result is to have too."""
    program = jax.jit(function).lower(*arguments).compile()
    result, sharding = program(*arguments), arguments[0].sharding
    return {
        "axes": axes,
        "spec": str(sharding.spec),
        "kept": result.sharding.is_equivalent_to(sharding, 2),
        "collectives": collectives_of(program),
        "error": largest_difference(result, expected),
    }


def reports(y, lam):
    """One report for each kind of mesh, sharding and function, and one inside of shard_map."""
    expected = {name: jax.jit(function)(y, lam) for name, function in FUNCTIONS.items()}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind, kind))
        for spec in SHARDINGS:
            placed = [
                jax.device_put(x, NamedSharding(mesh, s))
                for x, s in ((y, spec), (lam, P(spec[0], None)))
            ]
            with jax.set_mesh(mesh):
                for name, function in FUNCTIONS.items():
                    if name in EVERYWHERE or spec == BOTH:
                        outcome = report(function, kind.name, placed, expected[name])
                        yield {"function": name, **outcome}
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=2 * (AxisType.Auto,))
    placed = [jax.device_put(y, NamedSharding(mesh, spec)) for spec in (BOTH, P(*BOTH[::-1]))]
    program = jax.jit(turned).lower(*placed).compile()
    found = program(*placed)["out"]
    yield {
        "function": "optax, leaves with two shardings",
        "axes": "Auto",
        "kept": found.sharding.is_equivalent_to(placed[1].sharding, 2),
        "collectives": collectives_of(program),
        "error": largest_difference(found, turned(y, y)["out"]),
    }
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    rows = P("rows", None)
    mapped = jax.shard_map(prox24.prox, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    placed = [jax.device_put(x, NamedSharding(mesh, rows)) for x in (y, lam)]

    def landings(y, whole):
        """Of leaves with one shape on a device, of which one is whole on every device."""
        params, transform = {"a": y, "b": whole}, proximal(0.5, axis=1)
        found, _ = transform.update(params, transform.init(params), params)
        return found["a"], found["b"]

    specs = rows, P()
    unlike = jax.shard_map(landings, mesh=mesh, in_specs=specs, out_specs=specs)(y, y[: ROWS // 8])
    on_two = {name: jax.device_put(y, jax.devices()[i]) for i, name in enumerate("ab")}
    transform = proximal(0.5, axis=1)
    apart, _ = transform.update(on_two, transform.init(on_two), on_two)
    alone = landings(y, y)[0]
    yield {
        "function": "optax, leaves of other devices",
        "axes": "Manual",
        "kept": [x.devices() for x in apart.values()] == [x.devices() for x in on_two.values()],
        "collectives": [],
        "error": max(largest_difference(np.asarray(x), alone) for x in (unlike[0], apart["b"])),
    }
    yield {
        "function": "prox in shard_map",
        **report(mapped, "Manual", placed, expected["prox, lam per row"]),
    }


def tree_reports():
    """Whether masks are placed like their leaves, and what is said of blocks that are cut."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("any",), axis_types=(kind,))
        placed = NamedSharding(mesh, P("any"))
        with jax.set_mesh(mesh):
            tree = {"kernel": jnp.ones((32, 4)), "bias": jnp.ones(16)}
            params = jax.device_put(tree, placed)
            masks = prox24.mask_of(params)
            said, sparse = "", bool(prox24.is_sparse(params["bias"]))
            if kind is AxisType.Explicit:
                try:
                    prox24.prox(params["bias"], 0.5)
                except ValueError as error:
                    said = str(error)
        kept = [mask.sharding.spec[0] == "any" for mask in jax.tree.leaves(masks)]
        yield {"masks": kind.name, "placed": all(kept), "sparse": sparse, "said": said}


def main():
    """Prints the list of reports."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    lam = jnp.asarray(rng.uniform(0.1, 1, (ROWS, 1)), jnp.float32)
    print(json.dumps([*reports(y, lam), *tree_reports()]))


if __name__ == "__main__":
    main()
