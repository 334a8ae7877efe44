"""Packs and multiplies on eight CPU devices and prints what became of shardings, as JSON.

A program of its own, since the number of devices is fixed when JAX starts.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import collectives_of, largest_difference, use_eight_devices

import prox24
from prox24.packed import Packed24, matmul, pack, unpack
from prox24.packed._kernels import cpu

use_eight_devices()

OUTPUTS, INPUTS, BATCH = 16, 512, 2
ROWS, BOTH = P("rows", None), P("rows", "columns")


def report(name, function, placed, expected, spec=None):
    """The largest error, relative to an array, the collectives, and whether shardings are kept."""
    compiled = jax.jit(function).lower(*placed).compile()
    found = compiled(*placed)
    errors = jax.tree.map(largest_difference, found, expected)
    return {
        "name": name,
        "error": float(np.max(jax.tree.leaves(errors))),
        "collectives": collectives_of(compiled),
        "kernel": cpu.LIBRARY.target in compiled.as_text(),
        "kept": spec is None
        or all(
            leaf.sharding.is_equivalent_to(NamedSharding(leaf.sharding.mesh, spec), leaf.ndim)
            for leaf in jax.tree.leaves(found)
        ),
    }


def loss(x, w):
    return jnp.sum(jnp.sin(matmul(x, w)))


def gradients(x, values, codes, loss=loss):
    return jax.grad(lambda x, values: loss(x, Packed24(values, codes)), argnums=(0, 1))(x, values)


def reports():
    """One report for each function, kind of mesh and sharding."""
    dense = jax.random.normal(jax.random.key(0), (OUTPUTS, INPUTS))
    dense = jnp.where(prox24.top_mask(jnp.abs(dense)), dense, 0)
    w, x = pack(dense), jax.random.normal(jax.random.key(1), (BATCH, INPUTS))
    product, slopes = matmul(x, w), gradients(x, w.values, w.codes)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind, kind))
        for label, spec in (("rows", ROWS), ("rows and columns", BOTH)):

            def place(array, spec=spec, mesh=mesh):
                return jax.device_put(array, NamedSharding(mesh, spec))

            where = f"{kind.name}, {label}"
            packed = jax.tree.map(place, w)
            with jax.set_mesh(mesh):
                yield report(f"pack, {where}", jax.vmap(pack), [place(dense)], w, spec)
                yield report(f"unpack, {where}", unpack, [packed], dense, spec)
                if kind == AxisType.Explicit and label != "rows":
                    continue  # where JAX wants to be told how a sum over shards is sharded
                there = place(x, P(None, spec[1]))
                yield report(f"matmul, {where}", matmul, [there, packed], product)
                arguments = [there, packed.values, packed.codes]
                yield report(f"gradients, {where}", gradients, arguments, slopes)
    yield from mapped(x, w, product, slopes)


def mapped(x, w, product, slopes):
    """The reports inside of shard_map."""
    mesh = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
    rows, columns = P("all", None), P(None, "all")

    def summed(x, w):
        return jax.lax.psum(matmul(x, w), "all")

    def sum_of_rows(x, w):
        return jax.lax.psum(loss(x, w), "all")

    def sum_of_columns(x, w):
        return jnp.sum(jnp.sin(summed(x, w)))

    shard = functools.partial(jax.shard_map, mesh=mesh)

    def place(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    for label, of_x, of_w, out, function, total in (
        ("rows", P(), rows, columns, matmul, sum_of_rows),
        ("columns", columns, columns, P(), summed, sum_of_columns),
    ):
        packed, there = place(w, of_w), place(x, of_x)
        multiply = shard(function, in_specs=(of_x, of_w), out_specs=out)
        yield report(f"matmul, shard_map, {label}", multiply, [there, packed], product)
        yield report(
            f"gradients, shard_map, {label}",
            shard(
                functools.partial(gradients, loss=total),
                in_specs=(of_x, of_w, of_w),
                out_specs=(of_x, of_w),
            ),
            [there, packed.values, packed.codes],
            slopes,
        )
    unpacked = shard(unpack, in_specs=columns, out_specs=columns)
    yield report("unpack, shard_map, columns", unpacked, [place(w, columns)], unpack(w), columns)


if __name__ == "__main__":
    print(json.dumps(list(reports())))
