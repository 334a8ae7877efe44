"""Prunes on eight CPU devices and prints what became of shardings and results, as JSON.

A program of its own, since the number of devices is fixed when JAX starts.
"""

import contextlib
import functools
import json
import math
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import COLLECTIVES, largest_difference, use_eight_devices
from reference import damped
from tiny import pruned_by, tokens, write_tiny

from prox24 import basis, calibrate, is_sparse, prox, proximal_gradient, prune_params, refine
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.training_state import states
from prox24._checkpoints.writer import write_checkpoint
from prox24._core.pattern import Pattern
from prox24._core.placement import AXIS, apart, common_mesh, everywhere, in_parts, placed
from prox24._jobs import forward, partition
from prox24._jobs.forward import (
    embed_windows,
    embedding_weights,
    layer_linears,
    layer_tensor,
    layer_weights,
    load_model,
)
from prox24._jobs.memory import Setup, _needed, layer_memory
from prox24._jobs.native import native_runner
from prox24._jobs.observe import observe_layer
from prox24._jobs.training import train_checkpoint
from prox24._models import stacks
from prox24._pruning import grams
from prox24._pruning.grams import add_in_turn, empty_columns, empty_gram, over_devices
from prox24._pruning.loop import prune_stages
from prox24._pruning.recipe import DenseTargets, Recipe
from prox24._solvers.admm import ADMM
from prox24._solvers.problem import LayerProblem
from prox24._solvers.proximal import ProximalGradient
from prox24._solvers.refit import ConjugateGradients, GradientSteps
from prox24._solvers.scores import Wanda
from prox24._solvers.solve import solve, solve_program
from prox24._solvers.sparsegpt import SparseGPT
from prox24._solvers.swaps import Swaps
from prox24.basis import Part
from prox24.errors import Prox24Error
from prox24.optax import check, proximal
from prox24.refine import BlockRefinement, ModelRefinement
from prox24.refine import _training as training

use_eight_devices()

ROWS, WIDTH = 512, 32
"""So many rows that `ProximalGradient` goes on with some of them."""
REFIT = ConjugateGradients(tolerance=0.0)
"""Which never stops at a small gain, since rounding may put it to either side of a tolerance."""
SOLVERS = {
    "wanda, swaps": (Wanda(), Swaps(1, REFIT)),
    "sparsegpt": (SparseGPT(), None),
    "prox": (ProximalGradient(), None),
    "admm, cg": (ADMM(), REFIT),
    "projection, gradient": (ADMM(penalty=None), GradientSteps(steps=10)),
}
EXPLICIT = "admm, cg"
"""The solver that runs with explicit axes too. One function makes them automatic for all."""
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")


def collectives(text):
    """The collectives of an optimized program, by loop: `(shape, operation)`, outside by "".

    Also those of loops that are in other loops, together.
    """
    computations, current = {}, None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(head[1], [])
        elif current is not None:
            current.append(line)

    def called(lines):
        for line in lines:
            yield from CALLED.findall(line)
            for branches in BRANCHES.findall(line):
                yield from (name.strip(" %") for name in branches.split(","))

    loops = re.findall(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", text)
    loop_of = {name: body for condition, body in loops for name in (condition, body)}
    found, inner = {body: [] for _, body in loops}, []

    def visit(name, loop, depth):
        lines = computations.get(name, [])
        own = [match.groups() for match in map(COLLECTIVE.search, lines) if match]
        found.setdefault(loop, []).extend(own)
        inner.extend(own if depth > 1 else [])
        for other in called(lines):
            visit(other, loop_of.get(other, loop), depth + (other in loop_of))

    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    visit(entry, "", 0)
    return found, inner


def same_blocks(mask, expected):
    """The fraction of blocks with one mask."""
    return float((np.asarray(mask) == np.asarray(expected)).reshape(-1, 4).all(axis=1).mean())


def as_share(values, expected, given):
    """The largest difference, over how far a training moved what was given at most."""
    return float(np.abs(values - expected).max() / np.abs(expected - given).max())


def relative_difference(values, expected):
    """The largest, as a share of the largest entry, in rows that have one mask."""
    values, expected = np.asarray(values), np.asarray(expected)
    same = ((values != 0) == (expected != 0)).all(axis=1)
    return float(np.abs(values - expected)[same].max() / np.abs(expected).max())


def lowered(problem, methods):
    return solve_program.lower(problem, *methods, jnp.float32(0.01), Pattern(2, 4))


def compared(program, problem, methods, sharding, expected):
    """What a program finds, against one device."""
    pruned, mask, _, figures, _ = program(problem, *methods, jnp.float32(0.01))
    return {
        "width": problem.gram.shape[1],
        "condition": float(np.linalg.cond(damped(problem.gram, 0.01))),
        "kept": pruned.sharding == mask.sharding == sharding,
        "sparse": bool(is_sparse(np.asarray(pruned))),
        "same_blocks": same_blocks(mask, expected.mask),
        "weights": relative_difference(pruned, expected.weight),
        "loss": float(figures.relative_loss) / expected.statistics.relative_loss - 1,
    }


def solver_reports():
    """One report for each kind of axis and each solver."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    inputs = rng.normal(size=(128, WIDTH)) @ (np.eye(WIDTH) + 0.3 * rng.normal(size=(WIDTH, WIDTH)))
    gram = (inputs.T @ inputs).astype(np.float32)
    for name, methods in SOLVERS.items():
        expected = solve(jnp.asarray(weight), jnp.asarray(gram), *methods)
        for kind in (AxisType.Auto, AxisType.Explicit):
            if kind is AxisType.Explicit and name != EXPLICIT:
                continue
            mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
            rows, everywhere = (NamedSharding(mesh, P(*axes)) for axes in (("rows", None), ()))
            placed = jax.device_put(weight, rows), jax.device_put(gram, everywhere)
            problem = LayerProblem(*placed)
            program = lowered(problem, methods).compile()
            found, inner = collectives(program.as_text())
            yield compared(program, problem, methods, rows, expected) | {
                "solver": name,
                "axes": kind.name,
                "outside": found.pop("", []),
                "loops": list(found.values()),
                "inner": inner,
            }


def mapped_reports():
    """Whether each solver finds inside of `shard_map` what it finds outside of it."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(8, 4, 16)), jnp.float32)
    inputs = rng.normal(size=(8, 64, 16))
    grams = jnp.asarray(np.swapaxes(inputs, 1, 2) @ inputs, jnp.float32)
    mesh = jax.make_mesh((8,), ("experts",), axis_types=(AxisType.Auto,))
    for name, methods in SOLVERS.items():

        def masks(weight, gram, methods=methods):
            return solve(weight, gram, *methods).mask

        specs = {"in_specs": P("experts"), "out_specs": P("experts")}
        mapped = jax.shard_map(jax.vmap(masks), mesh=mesh, **specs)(weights, grams)
        same = same_blocks(mapped, jax.vmap(masks)(weights, grams))
        yield {"mapped": name, "same_blocks": same}

    def shared(weight, grams):
        return jax.vmap(lambda gram: solve(weight, gram, SparseGPT(), None).mask)(grams)

    varying = {"in_specs": (P(), P("experts")), "out_specs": P("experts")}
    mapped = jax.shard_map(shared, mesh=mesh, **varying)(weights[0], grams)
    same = same_blocks(mapped, shared(weights[0], grams))
    yield {"mapped": "sparsegpt, one weight", "same_blocks": same}

    def descended(weight):
        def fun(x):
            return jnp.sum(jnp.square(x - weight)) / 2

        def blocks(x, lam, scaling):
            return prox(x, lam * scaling)

        start = jnp.zeros(weight.shape, weight.dtype)  # the same on all devices
        return proximal_gradient(fun, start, blocks, 1.0).params != 0

    mapped = jax.jit(jax.shard_map(jax.vmap(descended), mesh=mesh, **specs))(weights)
    same = same_blocks(mapped, jax.jit(jax.vmap(descended))(weights))
    yield {"mapped": "proximal_gradient", "same_blocks": same}


def calibrated_reports():
    """The errors of Grams with explicit axes: devices share features, or the first axis of x."""
    mesh = jax.make_mesh((8,), ("any",), axis_types=(AxisType.Explicit,))
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(16, 16)).astype(np.float32) for _ in range(2)]
    x = rng.normal(size=(8, 4, 16)).astype(np.float32)
    shared = P("any")

    def features(params, x):
        hidden = x @ params["a"]
        return jnp.matmul(hidden, params["b"], out_sharding=P())

    def first_axis(params, x):
        return x @ params["a"] @ params["b"]

    automatic = jax.sharding.auto_axes(first_axis, out_sharding=shared)
    hidden = x.astype(np.float64) @ kernels[0]
    exact = np.einsum("bti,btj->ij", hidden, hidden)
    for case, apply, of_a, of_x in (
        ("features", features, P(None, "any"), P()),
        ("first axis", first_axis, P(), shared),
        ("auto_axes", automatic, P(), shared),
    ):
        with jax.set_mesh(mesh):
            specs = {"a": of_a, "b": P(*reversed(of_a))}
            params = dict(zip(specs, map(jax.device_put, kernels, specs.values()), strict=True))
            batches = [jax.device_put(x, of_x)]
            found = calibrate(apply, params, batches)
            # The second group starts from values that the first one leaves.
            pruned = prune_params(apply, params, batches, order="sequential").params
        zeros = [float(np.mean(np.asarray(leaf) == 0)) for leaf in pruned.values()]
        error = largest_difference(found.grams["b"].gram[0], exact)
        yield {"calibrated": case, "error": error, "zeros": zeros}
    # The Gram of b has a mesh, and b has none.
    alone = dict(zip("ab", kernels, strict=True))
    params = alone | {"a": jax.device_put(alone["a"], NamedSharding(mesh, P(None, "any")))}
    for order in ("one-shot", "sequential"):
        found, expected = (
            prune_params(first_axis, tree, [x], order=order).params for tree in (params, alone)
        )
        yield {"without_mesh": [same_blocks(found[k] != 0, expected[k] != 0) for k in alone]}


def descended_reports():
    """Minimisers whose explicit axes devices share, and their derivative by the penalty."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(16, 32)).astype(np.float32)

    def blocks(x, lam, scaling):
        return prox(x, lam * scaling)

    def loss(lam, target):
        def fun(x):
            return jnp.sum(jnp.square(x - target)) / 2

        found = proximal_gradient(fun, target, blocks, lam)
        return jnp.sum(jnp.square(found.params)), found

    derived = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), slope = derived(0.1, target)
    mesh = jax.make_mesh((8,), ("any",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for spec in (P("any", None), P(None, "any")):
            (_, found), own_slope = derived(0.1, jax.device_put(target, spec))
            yield {
                "descended": str(spec),
                "in_place": found.params.sharding.spec == spec,
                "error": largest_difference(found.params, expected.params),
                "slopes": [float(own_slope), float(slope)],
                "tolerance": 1e-5,
            }


def turned_reports():
    """Bases and divergences of arrays whose explicit axes devices share."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((16, 64), (24, 16))]
    inputs = [rng.normal(size=(4 * weight.shape[1], weight.shape[1])) for weight in weights]
    grams = [(x.T @ x).astype(np.float32) for x in inputs]
    places = basis.places_of(2, 8)

    def parts(spec):
        put = functools.partial(jax.device_put, device=spec)
        return [Part(put(weights[i]), put(grams[i]), i, places) for i in range(2)]

    alone = parts(None)
    turn = basis.learn(alone, steps=5)
    expected = [basis.turned(part.weight, turn, places, part.axis) for part in alone]
    logits, target = weights[0], 2 * weights[0][::-1]

    def summed(x, y):
        found = refine.divergence(x, y)
        return jnp.sum(found), found

    slope = jax.grad(summed, has_aux=True)
    predicted = slope(logits, target)
    mesh = jax.make_mesh((8,), ("any",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for spec in (P("any", None), P(None, "any")):
            shared = parts(spec)
            found = [basis.turned(part.weight, turn, places, part.axis) for part in shared]
            pair = [jax.device_put(x, spec) for x in (logits, target)]
            yield {
                "turned": str(spec),
                "in_place": all(x.sharding.spec == spec for x in found),
                "error": max(map(largest_difference, found, expected)),
                "objectives": [
                    float(basis.objective(basis.learn(given, steps=5), given))
                    for given in (shared, alone)
                ],
                "divergences": [*map(largest_difference, slope(*pair), predicted)],
                "scale": float(np.abs(target).max() / predicted[1].max()),
            }


def placed_reports():
    """Whether a pruned weight of three axes, and its updates, are placed like the weight."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(16, 8, 8)).astype(np.float32)
    x = rng.normal(size=(32, 16)).astype(np.float32)

    def queries(params, x):
        return jnp.einsum("bi,ihk->bhk", x, params["query"]["kernel"])

    def pruned(kernel):
        params = prune_params(queries, {"query": {"kernel": kernel}}, [x]).params
        return params["query"]["kernel"]

    optimizer = optax.chain(optax.sgd(0.1), proximal(1e30))
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((8,), ("any",), axis_types=(kind,))
        placed = NamedSharding(mesh, P(None, None, "any"))
        with jax.set_mesh(mesh):
            own = jax.device_put(kernel, placed)
            found = pruned(own)
            params, gradients = ({"query": {"kernel": each}} for each in (own, jnp.asarray(kernel)))
            updates, _ = optimizer.update(gradients, optimizer.init(params), params)
            landed = optax.apply_updates(params, updates)["query"]["kernel"]
            check(optax.chain(optax.sgd(0.1, 0.9), proximal(1e6)), params)
        yield {
            "on_axes": kind.name,
            "same_mask": bool(np.array_equal(found != 0, pruned(kernel) != 0)),
            "in_place": [found.sharding == placed, landed.sharding == placed],
            "zeros": float(np.mean(np.asarray(landed) == 0)),
        }


def column_reports():
    """What devices that share the columns of a Gram find, and send to one another."""
    methods = (ADMM(), REFIT)
    # Of the first width neither the blocks of an inverse nor those of 4 are whole on a device.
    for rows, width, kind in (
        (48, 520, AxisType.Explicit),
        (600, 576, AxisType.Auto),
    ):
        rng = np.random.default_rng(0)
        weight = rng.normal(size=(rows, width)).astype(np.float32)
        inputs = rng.normal(size=(2 * width, width)).astype(np.float32)
        dense = LayerProblem(jnp.asarray(weight), jnp.asarray(inputs.T @ inputs))
        expected = solve(*dense, *methods)
        mesh = jax.make_mesh((8,), ("columns",), axis_types=(kind,))
        columns = NamedSharding(mesh, P(None, "columns"))
        problem = jax.device_put(dense, columns)
        program = lowered(problem, methods).compile()
        yield compared(program, problem, methods, columns, expected) | {
            "columns": kind.name,
            "sent": sent(program),
        }

    width = 1024
    inputs = rng.normal(size=(2048, width)).astype(np.float32)
    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(AxisType.Auto,))
    x = jax.device_put(inputs.reshape(8, -1, 16, width), NamedSharding(mesh, P(AXIS)))
    y = jax.device_put(2 * x, NamedSharding(mesh, P(AXIS)))
    empty = empty_columns(width, mesh)
    program = jax.jit(functools.partial(add_in_turn, devices=8)).lower(empty, x, y).compile()
    gram = program(empty, x, y)
    exact = 2 * inputs.T.astype(np.float64) @ inputs
    yield {
        "summed": float(np.linalg.norm(gram.total - exact) / np.linalg.norm(exact)),
        "tokens": int(gram.tokens),
        "sent": sent(program),
        "columns": gram.total.sharding.shard_shape(gram.total.shape),
    }


def freed_reports():
    """The part of their Grams that devices hold when they begin to send their sums."""

    def held():
        shards = [shard.data for x in jax.live_arrays() for shard in x.addressable_shards]
        return sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())

    def noted(arrays, mesh):
        parts.append((held() - others) / own)
        return everywhere(arrays, mesh)

    mesh, others, parts = common_mesh(8), held(), []
    sums = {"input": empty_gram(256, mesh)}
    own = held() - others
    with mock.patch.object(grams, "everywhere", noted):
        over_devices(sums.pop("input"), mesh)
    yield {"freed": parts[0]}


def planned_reports(folder):
    """The memory that a plan estimates for devices that share columns, over what XLA reserves."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    write_tiny(folder.with_name("wide"), **sizes)
    model = load_model(open_checkpoint(folder.with_name("wide")))
    methods = (ADMM(), REFIT)
    setup = Setup(Recipe(*methods), devices=8, shard_grams=True)
    memory = layer_memory(model, 0, (2, 256), setup)

    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(AxisType.Auto,))
    whole, parts, columns = (NamedSharding(mesh, P(*axes)) for axes in ((), (AXIS,), (None, AXIS)))
    linears, layer = layer_linears(model.config, 0), model.config.layers[0]
    weights = jax.device_put(layer_weights(model, 0), whole)
    hidden = jax.device_put(jnp.ones((16, 256, layer.hidden)), parts)
    grams = {linear.input: empty_columns(linear.shape[1], mesh) for linear in linears}
    given = layer, weights, hidden, hidden, grams, grams
    gathering = observe_layer.lower(*given, devices=8)
    down = next(linear for linear in linears if linear.tensor == memory.widest)
    problem = LayerProblem(jax.device_put(jnp.ones(down.shape), columns), grams[down.input].total)
    solving = lowered(problem, methods)
    held = 2 * memory.weights + 2 * memory.grams - 4 * down.shape[1] ** 2 / 8
    yield {
        "planned": memory.widest,
        "gathered": [
            gram.total.is_equivalent_to(columns, 2)
            for sums in gathering.compile().output_shardings[:2]
            for gram in sums.values()
        ],
        "planned_gathering": memory.gather / _needed(gathering),
        "planned_solving": (memory.solve - held) / _needed(solving),
    }


def sent(program):
    """What collectives of matrices make, in each loop of a program."""
    return [
        [(shape, kind) for shape, kind in found if re.search(r"\[\d+,", shape)]
        for found in collectives(program.as_text())[0].values()
    ]


def model_reports(folder):
    """One report for each number of devices, against one device; and for the last, done twice."""
    forward.BATCH_TOKENS = 32  # two windows, on each device
    write_tiny(folder, intermediate_size=32)  # one shape to compile
    checkpoint, windows = open_checkpoint(folder), tokens(batch=16, length=16)

    def pruned(mesh, targets=None, refine=None, **options):
        recipe = Recipe(refit=REFIT, targets=targets, refine=refine)
        runner = native_runner(checkpoint, windows, recipe, mesh=mesh, **options)
        return pruned_by(runner, recipe)

    dense = DenseTargets(0.03)
    alone = {targets: pruned(None, targets) for targets in (None, dense)}
    for count, targets, shard_grams in ((2, dense, False), (8, dense, True), (8, None, False)):
        mesh = jax.make_mesh((count,), ("any",), devices=jax.devices()[:count])
        result, reports = pruned(mesh, targets, shard_grams=shard_grams)
        expected, expected_reports = alone[targets]
        masks, others = (
            np.concatenate([values.ravel() for values in tensors.values()]) != 0
            for tensors in (result, expected)
        )
        yield {
            "devices": count,
            "shard_grams": shard_grams,
            "width": 32,
            "condition": 32 / 0.01,  # at most: the trace over what damping adds
            "sparse": all(bool(is_sparse(values)) for values in result.values()),
            "same_blocks": same_blocks(masks, others),
            "weights": max(
                relative_difference(values, expected[name]) for name, values in result.items()
            ),
            "loss": max(
                abs(a.statistics.relative_loss / b.statistics.relative_loss - 1)
                for a, b in zip(reports, expected_reports, strict=True)
            ),
            "tokens": [a.tokens for a in reports] == [b.tokens for b in expected_reports],
        }
    pair = jax.make_mesh((2,), ("any",), devices=jax.devices()[:2])
    # Optax's optimizers mix dtypes and ranks.
    meshes, layer_function = [], forward.layer_function

    def watched(layer, mesh, compute_dtype):
        meshes.append(None if mesh is None else mesh.size)
        return layer_function(layer, mesh, compute_dtype)

    forward.layer_function = watched
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        one, two = (pruned(mesh, refine=BlockRefinement(1e-3, 1)) for mesh in (None, pair))
    forward.layer_function = layer_function
    yield {
        "shared_by": meshes,
        "refined": [reports[-1].refinement.outcome.value for _, reports in (one, two)],
        "weights": max(
            as_share(values, one[0][name], alone[None].tensors[name])
            for name, values in two[0].items()
            if name in alone[None].tensors
        ),
    }
    again, _ = pruned(mesh)
    same = [values.tobytes() == again[name].tobytes() for name, values in result.items()]
    yield {"devices": count, "again": all(same)}

    model = load_model(checkpoint, mesh)
    (hidden,) = embed_windows(model, windows)
    inputs = {linear.input: linear.shape[1] for linear in layer_linears(model.config, 0)}
    grams = {name: empty_gram(width, model.mesh) for name, width in inputs.items()}
    layer, weights = model.config.layers[0], layer_weights(model, 0)
    given = layer, weights, placed(hidden, model.mesh), None, grams, {}
    text = observe_layer.lower(*given).compile().as_text()
    yield {"gathering": [kind for kinds in collectives(text)[0].values() for kind in kinds]}
    run = jax.jit(forward.layer_function(layer, model.mesh, "float32"))
    (output,) = jax.tree.leaves(run.lower(weights, hidden).compile().output_shardings)
    yield {"own_windows": output.shard_shape(hidden.shape)[0] / len(hidden)}
    shapes = (8, 4), (44, 4)
    copies = [apart(jnp.ones(s), model.mesh).sharding.is_fully_replicated for s in shapes]
    yield {"copied": copies, "odd": common_mesh(windows=12).size}


def distillation_reports(folder):
    """What eight devices train, against one device; and the sharding of it while it is trained."""
    checkpoint, windows = open_checkpoint(folder), tokens(batch=48, length=16)
    pruned = folder.with_name("pruned")
    recipe = Recipe.wanda()
    tensors = prune_stages(native_runner(checkpoint, windows[:8], recipe), recipe)
    write_checkpoint(checkpoint, pruned, ((name, values) for name, values, _ in tensors))
    pruned, shares, steps = open_checkpoint(pruned), [], []
    step_of = training.step_program

    def watched(*arguments):
        steps.append(step_of(*arguments))
        return steps[-1]

    training.step_program = watched

    def trained(mesh, on_measured=None, resume=lambda state: state, **options):
        def look(state):
            matrices = [leaf for leaf in jax.tree.leaves(state[:3]) if leaf.ndim == 3]
            shares.append(max(part(leaf) for leaf in matrices))
            if on_measured is not None:
                on_measured(state)

        settings = ModelRefinement(rate=1e-3, step_windows=8, **options)
        # Optax's optimizers mix dtypes and ranks.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            refined, tensors = train_checkpoint(
                checkpoint, pruned, windows, settings, mesh=mesh, on_measured=look, resume=resume
            )
        return refined, dict(tensors)

    alone, expected = trained(None)
    for tensor, more in ((1, {}), (4, {"micro_batches": 2})):
        together, found = trained(common_mesh(8 // tensor, tensor), **more)
        losses = np.array(together.losses), np.array(alone.losses)
        yield {
            "compiled": steps[-1]._cache_size(),
            "distilled": together.outcome.value,
            "tensor": tensor,
            "losses": as_share(*losses, losses[1][0]),
            "weights": max(as_share(found[n], expected[n], pruned.read(n)) for n in found),
            "same_zeros": all(np.array_equal(found[n] == 0, expected[n] == 0) for n in found),
            "largest_share": shares[-1],
        }

    try:
        trained(common_mesh(1, 8))
    except Prox24Error as error:
        yield {"refused": str(error)}

    class Interrupted(Exception):
        pass

    # The last of these trainings, which is now interrupted.
    mesh, options, expected = common_mesh(2, 4), {"micro_batches": 2}, found
    for most in (2, 100):
        place = folder.with_name("state")
        with contextlib.suppress(Interrupted), states(place, {"job": "a"}) as saved:

            def save(state, saved=saved, most=most):
                saved.save(state)
                if len(state.losses) > most:
                    raise Interrupted

            _, found = trained(mesh, save, saved.resume, **options)
    yield {"went_on": all(found[n].tobytes() == expected[n].tobytes() for n in expected)}


def part(leaf):
    """Of an array, that one device has."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size


def gathering_reports(folder, variant, shared):
    """What eight devices send of the weights in a pass through all layers, and its gradient."""
    write_tiny(folder, variant)
    checkpoint = open_checkpoint(folder)
    model, ids = load_model(checkpoint), jnp.asarray(tokens(batch=8, length=16))
    outer = embedding_weights(model)

    def params(stack):
        return stacks.stacked(model.config, functools.partial(layer_tensor, model), stack)

    def loss(weights, ids, mesh):
        enter = functools.partial(partition.gathered, mesh)
        return jnp.mean(stacks.features(model.config, weights, outer, ids, enter) ** 2)

    expected = jax.grad(loss)(params(lambda name, tensors: jnp.stack(tensors)), ids, None)
    linears = {linear.shape for linear in layer_linears(model.config, 0)}
    for tensor in shared:
        mesh = common_mesh(8 // tensor, tensor)

        def stack(name, tensors, mesh=mesh):
            values = np.stack(tensors)
            return jax.device_put(values, partition.stored(mesh, name, values.shape))

        def gradient(weights, ids, mesh=mesh):
            return jax.grad(loss)(weights, in_parts(ids, mesh), mesh)

        program = jax.jit(gradient).lower(params(stack), ids).compile()
        sent = {
            tuple(map(int, shape.split(",")[-2:]))
            for found in collectives(program.as_text())[0].values()
            for result, _ in found
            for shape in re.findall(r"\[([\d,]+)\]", result)
        }
        found = program(params(stack), ids)
        differences = jax.tree.map(largest_difference, found, expected)
        yield {
            "gradients": max(jax.tree.leaves(differences)),
            "largest_share": max(part(g) for g in jax.tree.leaves(found) if g.ndim == 3),
            "variant": variant,
            "tensor": tensor,
            "whole_weights_sent": bool(sent & linears),
        }


if __name__ == "__main__":
    (folder,) = map(Path, sys.argv[1:])
    reports = [
        *solver_reports(),
        *mapped_reports(),
        *column_reports(),
        *calibrated_reports(),
        *descended_reports(),
        *turned_reports(),
        *placed_reports(),
        *freed_reports(),
        *planned_reports(folder),
        *model_reports(folder),
        *distillation_reports(folder),
        *gathering_reports(folder.with_name("llama1"), "llama1", (1, 4)),
        *gathering_reports(folder.with_name("phi3"), "phi3", (2,)),
    ]
    print(json.dumps(reports))
