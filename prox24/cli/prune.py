"""`prox24 prune`: a checkpoint in, a sparse one out, and a report."""

import argparse
import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24 import torchax
from prox24.checkpoints.checkpoint import DTYPES, Checkpoint
from prox24.checkpoints.manifest import write_manifest
from prox24.checkpoints.tensors import TensorSource
from prox24.checkpoints.unfinished import (
    Unfinished,
    Written,
    check_unchanged,
    opened_by_another,
    sha256,
    source_files,
    unfinished_folder,
)
from prox24.checkpoints.writer import OUTPUTS, check_destination, check_tensor, fill_folder
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
from prox24.core.pattern import PatternLike, Unstructured
from prox24.devices import common_mesh
from prox24.errors import DiskError, Prox24Error
from prox24.forward import all_linears, load_model
from prox24.pipeline import LinearReport, PrunedTensor, prune, refined_tensors
from prox24.plan import Method, fitting_micro_batch
from prox24.processes import agree, connected, is_first, meet
from prox24.refine import BlockRefinement, Outcome
from prox24.solvers.problem import DEFAULT_PULL, Status
from prox24.solvers.solve import (
    REFITS,
    SOLVERS,
    Refit,
    Solver,
    check_shares_columns,
    check_supported,
)

DECISIVE = (
    "method",
    "refit",
    "pattern",
    "damping",
    "samples",
    "sequence_length",
    "dtype",
    "shard_size",
    "shard_grams",
)
"""Arguments that decide the result, apart from the source and the calibration text."""
PROX24_METHODS = ("prox", "admm")
"""The others are baselines."""


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out, with other processes or alone; the exit code."""
    place = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.distributed:
        with connected(*place):
            return _run(arguments)
    if place != (None, None, None):
        raise Prox24Error("--coordinator, --num-processes and --process-id are for --distributed")
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    inputs = (arguments.source, arguments.calibration)
    check_destination(arguments.destination, inputs, arguments.overwrite)
    check_report(arguments.report, inputs, arguments.destination)
    if arguments.refine == "none":
        others = {
            "--refine-rate": arguments.refine_rate is not None,
            "--refine-passes": arguments.refine_passes is not None,
            "--refine-step-tokens": arguments.refine_step_tokens is not None,
            "--refine-linears-only": arguments.refine_linears_only,
            "--refine-compute-dtype": arguments.refine_compute_dtype != "float32",
        }
        _check_not_given(others, "--refine block")
    solver, refit = choose_supported(arguments)
    pull = choose_pull(arguments.method, arguments.targets, arguments.pull)
    checkpoint, native = torchax.open_any(arguments.source)
    if not native:
        others = {
            "--targets dense": arguments.targets == "dense",
            "--pull": arguments.pull is not None,
            "--memory": arguments.memory is not None,
            "--activations disk": arguments.activations == "disk",
            "--distributed": arguments.distributed,
            "--shard-grams": arguments.shard_grams,
            "--refine block": arguments.refine == "block",
        }
        _check_not_given(others, "models with a forward pass of prox24's own")
        pull = None  # No dense model runs alongside.
    files = source_files(checkpoint.path)
    windows = calibration_windows(
        checkpoint, arguments.calibration, arguments.samples, arguments.sequence_length
    )
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    refinement = None
    if arguments.refine == "block":
        refinement = BlockRefinement(
            arguments.refine_rate or BlockRefinement.rate,
            arguments.refine_passes or BlockRefinement.passes,
            step_tokens=arguments.refine_step_tokens or BlockRefinement.step_tokens,
            linears_only=arguments.refine_linears_only,
            compute_dtype=arguments.refine_compute_dtype,
        )
        if jax.process_count() > 1:
            raise Prox24Error("--refine is for a single process")
        windows = shuffled(windows)
    micro_batch, mesh = None, common_mesh(len(windows)) if native else None
    devices = 1 if mesh is None else mesh.size
    check_shared(arguments.shard_grams, devices)
    if arguments.memory is not None:
        method = Method(
            solver,
            refit,
            arguments.pattern,
            dtype,
            dense_targets=pull is not None,
            refinement=refinement,
            shard_grams=arguments.shard_grams,
        )
        micro_batch = fitting_micro_batch(
            load_model(checkpoint), windows.shape, method, arguments.memory, devices
        )
    job = {
        "arguments": {name: plain(vars(arguments)[name]) for name in DECISIVE},
        "solver": _settings(solver),
        "refit": _settings(refit),
        "pull": pull,
        "refinement": _settings(refinement),
        "micro_batch": micro_batch,
        "calibration": {"tokens": windows.size, "sha256": sha256(windows)},
        "source": files,
        "versions": versions(),
        "devices": [jax.devices()[0].device_kind, devices],
        "processes": jax.process_count(),
    }
    agree(
        [job, arguments.activations],
        Prox24Error("the processes differ in arguments, packages, devices or source files"),
    )
    with common_folder(arguments.destination, job, arguments.overwrite) as unfinished:
        if not unfinished.entries:  # else the run before has looked
            _check_tensors(checkpoint, arguments)
        if refinement is not None:
            unfinished = _whole_layers(unfinished, checkpoint, refinement)
        figures = [entry["figures"] for entry in unfinished.entries.values() if "figures" in entry]
        resumed = len(figures)
        activations = unfinished.folder.with_name("activations") / str(jax.process_index())
        linears = prune_with_progress(
            checkpoint,
            windows,
            solver,
            refit,
            title=arguments.method,
            pattern=arguments.pattern,
            damping=arguments.damping,
            pull=pull,
            dtype=dtype,
            finished=unfinished.finished,
            micro_batch=micro_batch,
            mesh=mesh,
            shard_grams=arguments.shard_grams,
            refinement=refinement,
            activations=activations if arguments.activations == "disk" else None,
            quiet=arguments.quiet or not is_first(),
            native=native,
        )
        reports: list[LinearReport | None] = []
        written = set(unfinished.entries)

        def record(tensor: Written) -> None:
            report, also = reports.pop(), {}
            written.add(tensor.name)
            if report is not None:
                figures.append({key: plain(value) for key, value in _figures(report).items()})
                also = {"figures": figures[-1]}
            unfinished.record(tensor, also)

        with contextlib.closing(linears):  # which ends its progress bar before an error is printed
            if is_first():
                digests = fill_folder(
                    checkpoint,
                    unfinished,
                    tensors_of(linears, reports),
                    dtype=arguments.dtype,
                    max_shard_bytes=arguments.shard_size,
                    note=model_card_section(arguments, refit, pull, windows),
                    on_replaced=record,
                )
            else:
                collections.deque(linears, maxlen=0)
        check_unchanged(checkpoint.path, files)
        meet("nothing has changed")  # for any of them
        if is_first():
            pruned = {figure["name"] for figure in figures}
            refined = written - pruned
            write_manifest(unfinished.folder, job, digests, figures, refined)
    if not is_first():
        return 0
    seconds = time.perf_counter() - began
    report = {
        "arguments": {key: plain(value) for key, value in vars(arguments).items() if key != "run"},
        "solver": _settings(solver),
        "refit": _settings(refit),
        "pull": pull,
        "refinement": _settings(refinement),
        "versions": versions(),
        "calibration_tokens": windows.size,
        "resumed_linears": resumed,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "remark": OUTPUTS["safetensors"](checkpoint).remark,
        "linears": figures,
    }
    with reporting(arguments.report, report):
        if arguments.json:
            print_json(report)
        elif not arguments.quiet:
            _print_summary(arguments.destination, report)
    return 0


def _check_not_given(options: Mapping[str, bool], purpose: str) -> None:
    """Raises Prox24Error that names the first option that was given, and what it is for."""
    for option, given in options.items():
        if given:
            raise Prox24Error(f"{option} is for {purpose}")


def _check_tensors(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """Reads every tensor once, before hours are spent on some of them."""
    quiet = arguments.quiet or not is_first()
    with progress_bar("check", len(checkpoint.tensors), quiet) as advance:
        for name in checkpoint.tensors:
            check_tensor(checkpoint, name, arguments.dtype)
            advance(name, None)


@contextlib.contextmanager
def common_folder(
    destination: Path, job: Mapping[str, Any], overwrite: bool
) -> Iterator[Unfinished]:
    """`unfinished_folder` of the first process, in which the others see what is finished.

    Raises:
      CheckpointError: see `unfinished_folder`, or the others do not see it.
    """
    # Not an error of the input, which would end the job.
    differ = DiskError(f"the processes do not find the same files beside {destination}")
    if is_first():
        with unfinished_folder(destination, job, overwrite=overwrite) as unfinished:
            meet("opened")
            agree(list(unfinished.entries), differ)
            yield unfinished
    else:
        meet("opened")
        unfinished = opened_by_another(destination)
        agree(list(unfinished.entries), differ)
        yield unfinished
    meet("in place")


def choose(method: str, refit: str | None = None) -> tuple[Solver, Refit | None]:
    """The solver and the refit of a method by name.

    Without a choice, prox and admm are followed by conjugate gradients, and the baselines by
    nothing, which is how their papers define them.
    """
    refit = refit or ("cg" if method in PROX24_METHODS else "none")
    return SOLVERS[method](), None if refit == "none" else REFITS[refit]()


def choose_pull(method: str, targets: str | None = None, pull: float | None = None) -> float | None:
    """The pull of dense targets; None where linears reproduce their own outputs.

    Without a choice, linears pruned by prox and admm have dense targets, and those pruned by the
    baselines have not, which is how their papers define them.

    Raises:
      Prox24Error: there is a pull, but no dense targets.
    """
    if targets is None:
        targets = "dense" if method in PROX24_METHODS else "pruned"
    if targets == "dense":
        return pull or DEFAULT_PULL
    if pull is not None:
        raise Prox24Error("--pull is for --targets dense")
    return None


def choose_supported(arguments: argparse.Namespace) -> tuple[Solver, Refit | None]:
    """The solver and the refit that a command was given.

    Raises:
      Prox24Error: they do not support the pattern, or do not share the columns of Grams.
    """
    solver, refit = choose(arguments.method, arguments.refit)
    try:
        check_supported(solver, refit, arguments.pattern)
        if arguments.shard_grams:
            check_shares_columns(solver, refit)
    except ValueError as error:
        raise Prox24Error(str(error)) from error
    return solver, refit


def check_shared(shard_grams: bool, devices: int) -> None:
    """Raises Prox24Error where one device is to share Grams."""
    if shard_grams and devices == 1:
        raise Prox24Error("--shard-grams is for several devices, and there is one to be used")


def model_card_section(
    arguments: argparse.Namespace,
    refit: Refit | None,
    pull: float | None,
    windows: NDArray[np.int32],
) -> str:
    """Markdown that tells a model's users how it was pruned."""
    text = arguments.calibration.name if arguments.calibration else "speeches.txt of prox24"
    return f"""## Pruning

The linears of the layers were pruned by prox24 {versions()["prox24"]}:

- pattern: {arguments.pattern}, along the input axis
- method: {arguments.method}
- refit: {"none" if refit is None else type(refit).__name__}
- targets: {"pruned" if pull is None else f"dense, pull {pull:g}"}
- refined: {arguments.refine}{", linears only" if arguments.refine_linears_only else ""}
- calibration: {windows.shape[0]} windows of {windows.shape[1]} tokens from {text}
"""


def prune_with_progress(
    checkpoint: Checkpoint,
    windows: NDArray[np.int32],
    solver: Solver,
    refit: Refit | None,
    *,
    title: str,
    pattern: PatternLike | Unstructured,
    damping: float,
    quiet: bool,
    pull: float | None = None,
    dtype: np.dtype[Any] | None = None,
    finished: Mapping[str, TensorSource] = MappingProxyType({}),
    micro_batch: int | None = None,
    activations: Path | None = None,
    mesh: Mesh | None = None,
    shard_grams: bool = False,
    refinement: BlockRefinement | None = None,
    native: bool = True,
) -> Generator[PrunedTensor]:
    """`prox24.pipeline.prune`, or that of `prox24.torchax`, with a progress bar."""
    total, done = None, len(finished)
    if native:
        linears = {linear.tensor for linear in all_linears(load_model(checkpoint).config)}
        # What a refinement trains besides is finished as well, and not counted.
        total, done = len(linears), len(linears & finished.keys())
    own = functools.partial(
        prune,
        pull=pull,
        micro_batch=micro_batch,
        activations=activations,
        mesh=mesh,
        shard_grams=shard_grams,
        refinement=refinement,
    )
    run_layers = own if native else torchax.prune
    with progress_bar(title, total, quiet, done) as advance:
        for tensor in run_layers(
            checkpoint,
            windows,
            solver,
            refit,
            pattern=pattern,
            damping=damping,
            dtype=dtype,
            finished=finished,
        ):
            yield tensor
            if tensor.report is not None:
                advance(tensor.name, tensor.report.statistics.relative_loss)


def tensors_of(
    tensors: Iterable[PrunedTensor], reports: list[LinearReport | None]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and values as they come; the reports are kept, the values are not."""
    for name, values, report in tensors:
        reports.append(report)
        yield name, values


def _whole_layers(
    unfinished: Unfinished, checkpoint: Checkpoint, refinement: BlockRefinement
) -> Unfinished:
    """Without the tensors of a layer that is not all there, which is refined anew as a whole."""
    config = load_model(checkpoint).config
    layers = [
        set(refined_tensors(config, index, refinement).values())
        for index in range(len(config.layers))
    ]
    whole = {name for names in layers if names <= unfinished.entries.keys() for name in names}
    return unfinished._replace(
        entries={name: entry for name, entry in unfinished.entries.items() if name in whole},
        finished={name: tensor for name, tensor in unfinished.finished.items() if name in whole},
    )


def _print_summary(destination: Path, report: Mapping[str, Any]) -> None:
    linears, resumed = report["linears"], report["resumed_linears"]
    losses = {linear["name"]: linear["relative_loss"] or 0.0 for linear in linears}
    worst = max(losses, key=losses.__getitem__)
    rows = [
        ["written", str(destination)],
        ["linears pruned", str(len(linears))],
        ["mean relative loss", f"{np.mean(list(losses.values())):.4f}"],
        ["largest relative loss", f"{losses[worst]:.4f}  {worst}"],
        ["calibration tokens", str(report["calibration_tokens"])],
        ["seconds", f"{report['seconds']:.0f}"],
        ["peak memory", f"{report['peak_memory_bytes'] / 1e9:.2f} GB"],
    ]
    refined = [linear["block"] for linear in linears if linear["block"]]
    blocks = {tuple(block.items()): block for block in refined}  # Linears of a layer share one.
    if blocks:
        before, after = (
            np.mean([block[key] for block in blocks.values()]) for key in ("error_before", "error")
        )
        rows.append(["mean error of a layer, refined", f"{before:.4f} to {after:.4f}"])
        outcomes = [block["outcome"] for block in blocks.values()]
        if diverged := outcomes.count(Outcome.DIVERGED.value):
            rows.append(["diverged while refined", f"{diverged} layers"])
    if resumed:
        rows.append(["done by the run before", f"{resumed} linears"])
    cut = [linear for linear in linears if linear["status"] == Status.MAX_STEPS.value]
    if cut:
        rows.append(["cut to the pattern at the last step", f"{len(cut)} linears, see the report"])
    raised = [linear for linear in linears if linear["damping_raised"]]
    if raised:
        rows.append(["damping raised to make a Gram definite", f"{len(raised)} linears"])
    few = [linear for linear in linears if linear["tokens"] < linear["inputs"]]
    if few:
        rows.append(["calibrated on fewer tokens than inputs", f"{len(few)} linears"])
    dead = sum(linear["dead_features"] for linear in linears)
    if dead:
        rows.append(["input features never active", str(dead)])
    print_table(["", ""], rows)
    print(report["remark"])


def _figures(linear: LinearReport) -> dict[str, Any]:
    """A linear of the report as one flat object."""
    own = {key: value for key, value in linear._asdict().items() if key != "statistics"}
    block = linear.block and linear.block._asdict() | {"outcome": linear.block.outcome.value}
    return own | {"status": linear.status.value, "block": block} | linear.statistics._asdict()


def _settings(part: Any) -> Any:
    """A solver, a schedule or a refit as its type and its fields."""
    if not dataclasses.is_dataclass(part):
        return part
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {
        "name": type(part).__name__,
        **{name: _settings(value) for name, value in fields.items()},
    }
