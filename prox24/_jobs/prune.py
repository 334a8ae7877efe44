"""The job of pruning: reads a checkpoint, writes a sparse one, and returns a report."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from prox24._checkpoints.checkpoint import Checkpoint
from prox24._checkpoints.manifest import write_manifest
from prox24._checkpoints.model_card import source_card, write_card
from prox24._checkpoints.unfinished import (
    Unfinished,
    Written,
    check_unchanged,
    opened_by_another,
    source_files,
    unfinished_folder,
)
from prox24._checkpoints.writer import OUTPUTS, check_destination, check_tensor, fill_folder
from prox24._core.pattern import AnyPattern
from prox24._core.placement import common_mesh
from prox24._jobs import torchax
from prox24._jobs.forward import load_model
from prox24._jobs.memory import check_fits, checked_setup, fitting_micro_batch
from prox24._jobs.native import native_runner
from prox24._jobs.output import peak_memory_bytes, versions
from prox24._jobs.processes import agree, is_first, meet
from prox24._jobs.progress import layer_of, metric, progress_bar
from prox24._jobs.reports import PruneReport, totals
from prox24._jobs.text import (
    Text,
    Windows,
    calibration_windows,
    check_unread,
    described,
    files_of_text,
    shape_of,
)
from prox24._jobs.tokens import check_length
from prox24._jobs.torch_runner import TorchRunner
from prox24._pruning import loop
from prox24._pruning.loop import PrunedTensor
from prox24._pruning.recipe import Recipe, with_products
from prox24._pruning.report import LinearReport
from prox24._pruning.runner import Runner, check_found
from prox24._pruning.turns import ties_of
from prox24.errors import DiskError, Prox24Error, RecipeError


@with_products
def prune(
    source: str | Path,
    destination: str | Path,
    recipe: Recipe = Recipe(),
    *,
    calibration: Windows = Text(),
    memory: int | None = None,
    activations: str = "memory",
    shard_grams: bool = False,
    shard_size: int | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> PruneReport:
    """Prunes a checkpoint, layer after layer, and writes a checkpoint that `transformers` loads.

    The destination is complete or absent. After an interruption, a call with the same arguments
    continues the run. The local devices share the work; their number must divide the windows, so
    some devices may stay unused.

    Args:
      source: an HF folder, a GGUF file, or the hub's OWNER/NAME[@REVISION].
      destination: the HF folder to write.
      recipe: how the model is pruned.
      calibration: the text for the Grams; or token ids, shape (windows, length). With a refinement,
        the windows of a text are shuffled, and the last windows are held out.
      memory: bytes of a device; the largest micro-batch that fits is used. None uses micro-batches
        of about 2,048 tokens on each device.
      activations: the place of hidden states between layers, "memory" or "disk". With "disk", a
        resumed run does not run the finished layers again.
      shard_grams: devices share the columns of Grams and weights instead of the rows of weights.
        Use it if a device cannot hold several Grams.
      shard_size: bytes of the largest file; None keeps the source's files.
      overwrite: replaces a model at the destination.
      quiet: shows no progress bar.

    Returns:
      A `PruneReport`; printed, it is a table.

    Raises:
      CheckpointError: the source cannot be read, or the destination cannot be written.
      CalibrationError: the text is too short, or activations are not finite.
      RecipeError: the recipe does not fit the model or the device, or JSON cannot hold it.
      SolverError: a linear has no finite solution. The message names the tensor.
      UnsupportedModelError: the model has no forward pass here, and torchax cannot run it.
      Prox24Error: another argument is out of range, or is not for such a model.

    Example:
      Prunes with the default recipe and prints the summary::

        report = prox24.prune("HuggingFaceTB/SmolLM2-135M", "smol-2of4")
        print(report)
    """
    seconds, lap = _stopwatch()
    if activations not in ("memory", "disk"):
        raise Prox24Error(f"activations {activations!r} is neither 'memory' nor 'disk'")
    source, destination = Path(source), Path(destination)
    check_destination(destination, [source, *files_of_text(calibration)], overwrite)
    check_unread(destination, calibration)
    recipe.check_supported()
    recipe.to_dict()  # Raises an error early: the manifest needs the dict.
    checkpoint = torchax.open_any(source)
    model = None if checkpoint.decoder is None else load_model(checkpoint)
    # All this comes before the model may have to write the text.
    if model is not None:
        check_fits(model, recipe, shard_grams)
    else:
        options = {
            "memory": memory is not None,
            "activations": activations == "disk",
            "shard_grams": shard_grams,
            "distributed": jax.process_count() > 1,
            "refine": recipe.refine is not None,
        }
        for option, given in options.items():
            if given:
                raise Prox24Error(f"{option} is for models with a forward pass of prox24's own")
    card = source_card(source, checkpoint)
    if recipe.dtype is None:
        recipe = dataclasses.replace(recipe, dtype=checkpoint.pruned_dtype)
    files = source_files(checkpoint.path)
    if recipe.refine is not None and jax.process_count() > 1:
        raise RecipeError("refine is for a single process")

    def placed(shape: tuple[int, int]) -> tuple[Mesh | None, int | None]:
        """The devices and the windows of a micro-batch."""
        if model is None:
            return None, None
        mesh = common_mesh(shape[0])
        devices = 1 if mesh is None else mesh.size
        setup = checked_setup(model, recipe, devices, shard_grams)
        if recipe.refine is not None:
            recipe.refine.step_windows(*shape, devices)  # Raises its errors early.
        if memory is None:
            return mesh, None
        return mesh, fitting_micro_batch(model, shape, setup, memory)

    place = None
    if isinstance(calibration, Text) and calibration.written:
        check_length(checkpoint, calibration.sequence_length)
        place = placed(shape_of(calibration))
    quiet, refines = quiet or not is_first(), recipe.refine is not None
    windows = calibration_windows(checkpoint, calibration, held_out=refines, quiet=quiet)
    text = described(calibration, windows, published=True)
    text["text"].encode()  # Raises an error early: the model card and the summary need the name.
    mesh, micro_batch = place or placed(windows.shape)
    if model is None:
        # Its errors come before the folder of an interrupted run is opened, and lose nothing.
        torch_runner = TorchRunner(checkpoint, windows)
        stages = range(torch_runner.stages)
        check_found([x.tensor for i in stages for x in torch_runner.linears(i)], recipe)
    job = {
        "recipe": recipe.to_dict(),
        "calibration": text,
        "micro_batch": micro_batch,
        "shard_grams": shard_grams,
        "shard_size": shard_size,
        "source": files,
        "versions": versions(*(("torch", "torchax") if model is None else ())),
        "devices": [jax.devices()[0].device_kind, 1 if mesh is None else mesh.size],
        "processes": jax.process_count(),
    }
    agree(
        [job, activations],
        Prox24Error("the processes differ in arguments, packages, devices or source files"),
    )
    with _common_folder(destination, job, overwrite) as unfinished:
        states = unfinished.folder.with_name("activations") / str(jax.process_index())
        if model is not None:
            runner: Runner[Any] = native_runner(
                checkpoint,
                windows,
                recipe,
                micro_batch=micro_batch,
                activations=states if activations == "disk" else None,
                mesh=mesh,
                shard_grams=shard_grams,
            )
        else:
            runner = torch_runner
        chosen = loop.check(runner, recipe)
        if not unfinished.entries:  # otherwise the earlier run has checked them
            _check_tensors(checkpoint, recipe.dtype, quiet)
        dense, effect = loop.most_lossy(runner.in_memory(), recipe)
        pruned = {tensor: own for tensor, own in chosen.items() if tensor not in dense}
        unfinished = _whole_layers(unfinished, runner, recipe, pruned)
        stages = range(runner.stages)
        turned_layers = sum(bool(ties_of(runner, index, recipe, pruned)) for index in stages)
        finished = pruned.keys() & unfinished.finished.keys()
        entries, written = unfinished.entries, set(unfinished.entries)
        figures = [entry["figures"] for entry in entries.values() if "figures" in entry]
        lap("check")

        with progress_bar("prune", pruned, quiet, done=finished) as advance:

            def note(file: Written | None, tensor: PrunedTensor) -> None:
                own = [report.figures() for report in tensor.reports]
                if file is not None:
                    unfinished.record(file, {"figures": own[0]} if own else {})
                written.add(tensor.name)
                figures.extend(own)
                for each in own:
                    metric("linear", each)
                if tensor.reports:
                    losses = [report.statistics.relative_loss for report in tensor.reports]
                    advance(tensor.name, sum(losses) / len(losses))

            def on_step(stage: int, steps: int, step: int, loss: float) -> None:
                layer = layer_of(runner.linears(stage)[0].tensor)
                metric("step", {"layer": layer, "step": step, "steps": steps, "loss": loss})

            tensors = loop.prune_stages(
                runner,
                recipe,
                finished=unfinished.finished,
                dense=dense,
                lap=lap,
                on_step=on_step,
            )
            if is_first():
                stored = fill_folder(
                    checkpoint,
                    unfinished,
                    tensors,
                    dtype=recipe.dtype,
                    max_shard_bytes=shard_size,
                    on_replaced=note,
                )
            else:
                for tensor in tensors:
                    note(None, tensor)
        reports = [LinearReport.of_figures(figure) for figure in figures]
        check_unchanged(checkpoint.path, files)
        meet("nothing has changed")  # on any process
        if is_first():
            refined = written - {figure["name"] for figure in figures}
            write_manifest(unfinished.folder, job, stored, figures, refined)
            section = _card_section(recipe, text, reports)
            tags = ["sparse", *map(str, recipe.patterns)]
            write_card(unfinished.folder, card, tags, section)
    lap("write")
    return PruneReport(
        source=str(source),
        destination=str(destination),
        recipe=recipe,
        calibration=described(calibration, windows),
        linears=reports,
        kept_dense=dense,
        kept_dense_effect=effect,
        turned_layers=turned_layers,
        resumed_linears=len(finished),
        seconds=sum(seconds.values()),
        stages=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        versions=versions(),
        remark=OUTPUTS["safetensors"](checkpoint).remark,
    )


def _check_tensors(checkpoint: Checkpoint, dtype: str | None, quiet: bool) -> None:
    """Reads and checks every tensor once, before the long work on them."""
    with progress_bar("check", checkpoint.tensors, quiet, log=False) as advance:
        for name in checkpoint.tensors:
            check_tensor(checkpoint, name, dtype)
            advance(name, None)


@contextlib.contextmanager
def _common_folder(
    destination: Path, job: Mapping[str, Any], overwrite: bool
) -> Iterator[Unfinished]:
    """The `unfinished_folder` of the first process; the others read its finished tensors."""
    with contextlib.ExitStack() as stack:
        if is_first():
            folder = unfinished_folder(destination, job, overwrite=overwrite)
            unfinished = stack.enter_context(folder)
        meet("opened")
        if not is_first():
            unfinished = opened_by_another(destination)
        # A DiskError keeps the finished work; an error of the input would end the job.
        differ = DiskError(f"the processes do not find the same files beside {destination}")
        agree(list(unfinished.entries), differ)
        yield unfinished
    meet("in place")


def _whole_layers(
    unfinished: Unfinished, runner: Runner[Any], recipe: Recipe, chosen: Mapping[str, AnyPattern]
) -> Unfinished:
    """Drops finished tensors if others that must be pruned together with them are missing."""
    stages = range(runner.stages)
    together = [loop.pruned_together(runner, index, recipe, chosen) for index in stages]
    there = unfinished.entries.keys()
    partial = {name for names in together if not names <= there for name in names}
    return unfinished._replace(
        entries={name: entry for name, entry in unfinished.entries.items() if name not in partial},
        finished={name: x for name, x in unfinished.finished.items() if name not in partial},
    )


def _stopwatch() -> tuple[dict[str, float], Callable[[str], None]]:
    """Seconds by part, and a function that adds the time since its last call to one part."""
    seconds, last = dict[str, float](), time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[part] = seconds.get(part, 0.0) + now - last
        last = now

    return seconds, lap


def _card_section(recipe: Recipe, text: Mapping[str, Any], linears: Sequence[LinearReport]) -> str:
    """A section of Markdown about the pruning, for the model card; equal in all runs of a job."""
    found = totals(linears)
    losses = [found["mean_relative_loss"], found["largest_relative_loss"]]
    mean, largest = ("not known" if loss is None else f"{loss:.4f}" for loss in losses)
    return f"""## Pruning

The linears of the layers were pruned by prox24 {versions()["prox24"]}, along the input axis.

| | |
|---|---|
| linears | {found["linears"]} |
| their weights | {found["parameters"]} |
| zeros among them | {found["zeros"]} |
| mean relative loss | {mean} |
| largest relative loss | {largest} |

A relative loss is the squared error of a linear's output over the square of the output.
Calibration: {text["windows"]} windows of {text["sequence_length"]} tokens from {text["text"]}.
`prox24 prune --recipe FILE` does the same with this recipe:

```json
{recipe.to_json()}
```
"""
