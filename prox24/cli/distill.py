"""`prox24 distill`: trains what is kept of a pruned model on what the dense model predicts."""

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.checkpoints.manifest import write_manifest
from prox24.checkpoints.training_state import states
from prox24.checkpoints.unfinished import (
    check_unchanged,
    sha256,
    source_files,
    unfinished_folder,
)
from prox24.checkpoints.writer import OUTPUTS, check_destination, check_outside, fill_folder
from prox24.cli.output import (
    check_report,
    peak_memory_bytes,
    plain,
    print_json,
    print_table,
    progress_bar,
    reporting,
    versions,
)
from prox24.cli.windows import calibration_windows, shuffled
from prox24.core.masks import mean_sparsity
from prox24.core.placement import common_mesh
from prox24.jobs.distill import ModelRefinement, distill
from prox24.jobs.forward import all_linears, load_model
from prox24.refine import Training
from prox24.refine.training import Resume


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    began = time.perf_counter()
    inputs = (arguments.dense, arguments.pruned, arguments.text)
    check_destination(arguments.destination, inputs, arguments.overwrite)
    if arguments.state is not None:
        check_outside(arguments.destination, arguments.state)
    check_report(arguments.report, inputs, arguments.destination)
    dense, pruned = open_checkpoint(arguments.dense), open_checkpoint(arguments.pruned)
    refinement = ModelRefinement(
        rate=arguments.rate,
        passes=arguments.passes,
        step_windows=arguments.step_windows,
        micro_batches=arguments.micro_batches,
        warmup=arguments.warmup,
        cross_entropy=arguments.cross_entropy,
        measurements=arguments.measurements,
        compute_dtype=arguments.compute_dtype,
    )
    mesh = common_mesh(refinement.micro_batch, arguments.tensor_parallel)
    windows = shuffled(
        calibration_windows(dense, arguments.text, arguments.samples, arguments.sequence_length)
    )
    models = {"dense": dense, "pruned": pruned}
    files = {role: source_files(model.path) for role, model in models.items()}
    job = {
        "command": "distill",
        "refinement": dataclasses.asdict(refinement),
        "text": {"tokens": windows.size, "sha256": sha256(windows)},
        "dense": files["dense"],
        "source": files["pruned"],
        "versions": versions(),
        "devices": [jax.devices()[0].device_kind, *([1] if mesh is None else mesh.devices.shape)],
    }
    linears = {linear.tensor for linear in all_linears(load_model(pruned).config)}
    figures: list[dict[str, Any]] = []
    trained: set[str] = set()

    def watched(tensors: Iterable[tuple[str, NDArray[Any]]]) -> Iterator[tuple[str, NDArray[Any]]]:
        for name, values in tensors:
            trained.add(name)
            if name in linears:
                figures.append({"name": name, "sparsity": float(mean_sparsity(values))})
            yield name, values

    # Opened before hours are spent.
    with unfinished_folder(arguments.destination, overwrite=arguments.overwrite) as unfinished:
        with _training(arguments, job, refinement, len(windows)) as (resume, on_measured):
            distilled = distill(
                dense,
                pruned,
                windows,
                refinement,
                mesh=mesh,
                resume=resume,
                on_measured=on_measured,
            )
        tensors, note = watched(distilled.tensors), _model_card(windows, refinement)
        digests = fill_folder(pruned, unfinished, tensors, note=note)
        for role, model in models.items():
            check_unchanged(model.path, files[role])
        write_manifest(unfinished.folder, job, digests, figures, trained - linears)
    refined = distilled.refined
    report = {
        "arguments": {k: plain(v) for k, v in vars(arguments).items() if k != "run"},
        "outcome": refined.outcome.value,
        "losses": plain(refined.losses),
        "steps": refined.steps,
        "resumed_steps": refined.resumed_steps,
        "tokens": distilled.tokens,
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
        "remark": OUTPUTS["safetensors"](pruned).remark,
    }
    rows = [
        ["outcome", refined.outcome.value],
        ["loss on held-out windows", f"{refined.losses[0]:.4f} to {min(refined.losses):.4f}"],
        ["steps", str(refined.steps)],
        ["tokens", str(distilled.tokens)],
        ["seconds", f"{report['seconds']:.0f}"],
        ["peak memory", f"{report['peak_memory_bytes'] / 1e9:.2f} GB"],
    ]
    if refined.resumed_steps:
        rows.append(["done by the run before", f"{refined.resumed_steps} steps"])
    with reporting(arguments.report, report):
        if arguments.json:
            print_json(report)
        elif not arguments.quiet:
            print_table(["written", str(arguments.destination)], rows)
            print(report["remark"])
    return 0


@contextlib.contextmanager
def _training(
    arguments: argparse.Namespace, job: Mapping[str, Any], refinement: ModelRefinement, windows: int
) -> Iterator[tuple[Resume, Callable[[Training], None]]]:
    """Where the training begins, and what is done at each measurement: progress, and the state."""
    steps = refinement.steps(windows // refinement.step_windows)
    measurements = math.ceil(steps / refinement.measured_every(steps))
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress_bar("distill", measurements, arguments.quiet))
        saved = None
        if arguments.state is not None:
            saved = stack.enter_context(states(arguments.state, job))

        def on_measured(state: Training) -> None:
            advance(f"step {state.steps} of {steps}", state.losses[-1])
            if saved is not None:
                saved.save(state)

        def resume(begun: Training) -> Training:
            state = begun if saved is None else saved.resume(begun)
            for loss in state.losses[1:]:
                advance(f"step {state.steps} of {steps}", loss)
            return state

        yield resume, on_measured


def _model_card(windows: NDArray[np.int32], refinement: ModelRefinement) -> str:
    return f"""## Distillation

prox24 {versions()["prox24"]} trained the weights that pruning kept, in {refinement.passes} passes
over {windows.shape[0]} windows of {windows.shape[1]} tokens. Some were held out to choose the best
weights. Adam had rates up to {refinement.rate}. A share of {refinement.cross_entropy} of the loss
is the text's own next tokens, the rest the dense model's predictions.
"""
