"""`prox24 plan`: what pruning a model would take on this machine or another."""

import argparse
import contextlib
from typing import Any

from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.checkpoints.tensors import byte_count
from prox24.cli.output import print_json, print_table
from prox24.cli.prune import check_shared, choose_pull, choose_supported
from prox24.errors import Prox24Error
from prox24.forward import batch_size, load_model
from prox24.plan import (
    Method,
    distinct_layers,
    fitting_micro_batch,
    layer_memory,
    operations,
    product_rate,
    solver_cost,
)


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    solver, refit = choose_supported(arguments)
    checkpoint = open_checkpoint(arguments.source)
    model = load_model(checkpoint)
    method = Method(
        solver,
        refit,
        arguments.pattern,
        dense_targets=choose_pull(arguments.method, arguments.targets) is not None,
        shard_grams=arguments.shard_grams,
    )
    samples, length, budget = arguments.samples, arguments.sequence_length, arguments.memory
    # As many as divide the windows, as `prune` uses.
    devices = max(n for n in range(1, min(arguments.devices, samples) + 1) if samples % n == 0)
    check_shared(arguments.shard_grams, devices)
    size = batch_size(samples // devices, length)
    memories = [
        layer_memory(model, index, (size, length), method, devices)
        for index in distinct_layers(model)
    ]
    gather = max(memory.gather for memory in memories)
    fitting = None
    if budget is not None:
        with contextlib.suppress(Prox24Error):
            fitting = fitting_micro_batch(model, (samples, length), method, budget, devices)
    heaviest = max(memories, key=lambda memory: memory.solve)
    peak = max(gather, heaviest.solve)
    rate = arguments.rate or product_rate()
    cost = solver_cost(method)
    counted = operations(model, samples * length, cost, method.streams)
    seconds = counted.seconds(rate, devices, arguments.shard_grams)
    hours = {part: taken / 3600 for part, taken in seconds.items()}
    longest = max(hours, key=hours.__getitem__)
    tensors = checkpoint.tensors.values()
    stored = sum(map(byte_count, tensors))
    activations = 4 * method.streams * samples * length * model.config.hidden
    plan: dict[str, Any] = {
        "model": str(arguments.source),
        "devices": devices,
        "shard_grams": arguments.shard_grams,
        "micro_batch_windows": size,
        "checkpoint_bytes": stored,
        "activation_bytes": activations,
        "layer_weight_bytes": max(memory.weights for memory in memories),
        "layer_gram_bytes": max(memory.grams for memory in memories),
        "gather_bytes": gather,
        "solve_bytes": heaviest.solve,
        "widest_linear": heaviest.widest,
        "peak_bytes": peak,
        "memory_bytes": budget,
        "fits": None if budget is None else fitting is not None,
        "fitting_micro_batch_windows": None if fitting is None else fitting // devices,
        "operations": counted._asdict(),
        "operations_per_second": rate,
        "rate_measured": arguments.rate is None,
        "solver_products": cost._asdict(),
        "hours": hours,
        "limit": longest,
    }
    if arguments.json:
        print_json(plan)
        return 0
    rows = [
        ["checkpoint, read twice and written once", _gigabytes(stored)],
        ["hidden states, on the host", _gigabytes(activations)],
        ["a layer's weights", _gigabytes(plan["layer_weight_bytes"])],
        ["a layer's Grams", _gigabytes(plan["layer_gram_bytes"])],
        [f"peak on a device, gathering {size} x {length} tokens", _gigabytes(gather)],
        [f"peak on a device, solving {heaviest.widest}", _gigabytes(heaviest.solve)],
        *[[f"operations: {name}", f"{count:.3g}"] for name, count in counted._asdict().items()],
        [
            f"operations per second and device, {'given' if arguments.rate else 'measured'}",
            f"{rate:.3g}",
        ],
        ["solver, in products of a weight with its Gram", f"{cost.steps:.0f}"],
        ["its factors and inverses of a Gram, in products of two", f"{cost.factor:.0f}"],
        *[[f"hours: {name}", f"{count:.3g}"] for name, count in hours.items()],
        ["hours in all, without reading and writing", f"{sum(hours.values()):.3g}"],
        ["what takes most of the time", longest],
    ]
    if budget is not None:
        said = "no" if fitting is None else f"yes, {fitting // devices} x {length} tokens at once"
        rows.append([f"fits into {_gigabytes(budget)}", said])
    title = f"plan for {devices} device{'s' * (devices > 1)}"
    if arguments.shard_grams:
        title += ", Grams shared"
    print_table([title, str(arguments.source)], rows)
    return 0


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB"
