"""The job of training a pruned model on the dense model's predictions."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.manifest import read_manifest, write_manifest
from prox24._checkpoints.model_card import source_card, write_card
from prox24._checkpoints.training_state import states
from prox24._checkpoints.unfinished import (
    Written,
    check_unchanged,
    source_files,
    unfinished_folder,
)
from prox24._checkpoints.writer import (
    OUTPUTS,
    check_destination,
    check_outside,
    fill_folder,
)
from prox24._core.masks import mean_sparsity
from prox24._core.placement import common_mesh
from prox24._jobs.forward import all_linears, load_model
from prox24._jobs.output import Report, gigabytes, peak_memory_bytes, table, versions
from prox24._jobs.progress import metric, progress_bar
from prox24._jobs.text import (
    Text,
    Windows,
    calibration_windows,
    check_unread,
    described,
    files_of_text,
    shape_of,
)
from prox24._jobs.training import check_pair, held_out_groups, train_checkpoint
from prox24.refine._model import ModelRefinement
from prox24.refine._training import Refined, Training


@dataclasses.dataclass(frozen=True)
class DistillReport(Report):
    """How a model was trained; printed, it is a table.

    Attributes:
      dense: the dense model.
      pruned: the pruned model before the training.
      destination: the written folder.
      refinement: the settings of the training, by field of `ModelRefinement`.
      text: the text, its windows and tokens.
      outcome: "improved", "unchanged" or "diverged".
      losses: the loss on held-out windows, before the first step and at each measurement; None for
        NaN or infinity.
      steps: number of steps of the optimizer.
      resumed_steps: number of steps of an earlier, interrupted run.
      tokens: number of training tokens, counted once for each pass.
      seconds: wall-clock time of the job.
      peak_memory_bytes: the largest resident memory; None if it is not known.
      versions: of Python and packages.
      remark: the effect of the zeros on the speed of a runtime.
    """

    dense: str
    pruned: str
    destination: str
    refinement: dict[str, Any]
    text: dict[str, Any]
    outcome: str
    losses: list[float | None]
    steps: int
    resumed_steps: int
    tokens: int
    seconds: float
    peak_memory_bytes: int | None
    versions: dict[str, str]
    remark: str

    def __str__(self) -> str:
        best = min(loss for loss in self.losses if loss is not None)
        rows = [
            ["outcome", self.outcome],
            ["loss on held-out windows", f"{self.losses[0]:.4f} to {best:.4f}"],
            ["steps", str(self.steps)],
            ["tokens", str(self.tokens)],
            ["seconds", f"{self.seconds:.0f}"],
            ["peak memory", gigabytes(self.peak_memory_bytes)],
        ]
        if self.resumed_steps:
            rows.append(["done by the run before", f"{self.resumed_steps} steps"])
        return f"{table(['written', self.destination], rows)}\n{self.remark}"


def distill(
    dense: str | Path,
    pruned: str | Path,
    destination: str | Path,
    refinement: ModelRefinement = ModelRefinement(),
    *,
    text: Windows = Text(),
    state: str | Path | None = None,
    tensor_parallel: int = 1,
    overwrite: bool = False,
    quiet: bool = True,
) -> DistillReport:
    """Trains the kept weights on the dense model's predictions, and writes the result.

    The zeros stay zeros. Norms and biases are trained too; embeddings and head are not.

    Args:
      dense: the dense model: an HF folder, a GGUF file, or the hub's OWNER/NAME[@REVISION].
      pruned: the pruned model, in the same forms.
      destination: the HF folder to write; complete or absent.
      refinement: the settings of the training.
      text: the text to train on; or token ids, shape (windows, length). The windows of a text are
        shuffled first. Then the last windows are held out.
      state: a folder for the state of the training at each measurement; the same call resumes from
        there.
      tensor_parallel: number of devices that share heads and widths; all such groups of devices
        share the windows.
      overwrite: replaces a model at the destination.
      quiet: shows no progress bar.

    Returns:
      A `DistillReport`.

    Raises:
      CheckpointError: the models differ in more than their weights, the pruned one is not pruned,
        or the destination cannot be written.
      CalibrationError: the text is too short, or the loss is not finite before the first step.
      Prox24Error: the devices do not divide windows, heads or widths.
    """
    began = time.perf_counter()
    destination = Path(destination)
    check_destination(destination, [dense, pruned, *files_of_text(text)], overwrite)
    check_unread(destination, text)
    if state is not None:
        check_outside(destination, Path(state))
    teacher, student = open_checkpoint(dense), open_checkpoint(pruned)
    card = source_card(pruned, student)
    check_pair(teacher, student)
    mesh = common_mesh(refinement.micro_batch, tensor_parallel)
    config = load_model(student).config
    if isinstance(text, Text) and text.written:  # Errors come before the model writes.
        held_out_groups(config, shape_of(text)[0], refinement, mesh)
    windows = calibration_windows(teacher, text, held_out=True, quiet=quiet)
    of_teacher, of_student = source_files(teacher.path), source_files(student.path)
    job = {
        "command": "distill",
        "refinement": dataclasses.asdict(refinement),
        "text": described(text, windows, published=True),
        "dense": of_teacher,
        "source": of_student,
        "versions": versions(),
        "devices": [jax.devices()[0].device_kind, *([1] if mesh is None else mesh.devices.shape)],
    }
    linears = {linear.tensor for linear in all_linears(config)}
    made = read_manifest(student.path)
    if made is not None and "recipe" in made:  # which may leave linears dense; `verify` reads it
        job["recipe"] = made["recipe"]
        linears &= {name for name, entry in made["tensors"].items() if "pruned" in entry}
    figures: list[dict[str, Any]] = []
    trained: set[str] = set()

    def note(file: Written, tensor: tuple[str, NDArray[Any]]) -> None:
        name, values = tensor
        trained.add(name)
        if name in linears:
            figures.append({"name": name, "sparsity": float(mean_sparsity(values))})

    steps = refinement.steps(len(windows) // refinement.step_windows)
    measurements = math.ceil(steps / refinement.measured_every(steps))
    keeping = contextlib.nullcontext() if state is None else states(Path(state), job)
    outcome: list[Refined] = []
    with (
        unfinished_folder(destination, overwrite=overwrite) as unfinished,
        progress_bar("distill", measurements, quiet) as advance,
        keeping as kept,
    ):

        def resume(begun: Training) -> Training:
            training = begun if kept is None else kept.resume(begun)
            for loss in training.losses[1:]:
                advance(f"step {training.steps} of {steps}", loss)
            return training

        def on_measured(training: Training) -> None:
            step, loss = training.steps, training.losses[-1]
            advance(f"step {step} of {steps}", loss)
            metric("training", {"step": step, "steps": steps, "loss": loss})
            if kept is not None:
                kept.save(training)

        def on_step(step: int, loss: float) -> None:
            metric("step", {"step": step, "steps": steps, "loss": loss})

        def trained_tensors() -> Iterator[tuple[str, NDArray[Any]]]:
            refined, tensors = train_checkpoint(
                teacher,
                student,
                windows,
                refinement,
                mesh=mesh,
                resume=resume,
                on_measured=on_measured,
                on_step=on_step,
            )
            outcome.append(refined)
            yield from tensors

        try:
            # The other files are written first: their errors come before the long training.
            written = fill_folder(student, unfinished, trained_tensors(), on_replaced=note)
        except KeyboardInterrupt as error:
            if state is None:
                error.add_note("nothing is kept, since there is no --state FOLDER")
            elif kept is not None and kept.manager.latest_step() is not None:
                error.add_note(f"the training is in {state}: the same command goes on with it")
            raise
        (refined,) = outcome
        write_card(unfinished.folder, card, [], _card_section(windows, refinement, refined.losses))
        check_unchanged(teacher.path, of_teacher)
        check_unchanged(student.path, of_student)
        write_manifest(unfinished.folder, job, written, figures, trained - linears)
    return DistillReport(
        dense=str(dense),
        pruned=str(pruned),
        destination=str(destination),
        refinement=dataclasses.asdict(refinement),
        text=described(text, windows),
        outcome=refined.outcome.value,
        losses=[loss if math.isfinite(loss) else None for loss in refined.losses],
        steps=refined.steps,
        resumed_steps=refined.resumed_steps,
        tokens=refined.steps * refinement.step_windows * windows.shape[1],
        seconds=time.perf_counter() - began,
        peak_memory_bytes=peak_memory_bytes(),
        versions=versions(),
        remark=OUTPUTS["safetensors"](student).remark,
    )


def _card_section(
    windows: NDArray[np.int32], refinement: ModelRefinement, losses: Sequence[float]
) -> str:
    """A section of Markdown about the training, for the model card."""
    return f"""## Distillation

prox24 {versions()["prox24"]} trained the weights that pruning kept, in {refinement.passes} passes
over {windows.shape[0]} windows of {windows.shape[1]} tokens. Some were held out to choose the best
weights. Adam had rates up to {refinement.rate}. A share of {refinement.cross_entropy} of the loss
is the text's own next tokens, the rest the dense model's predictions. The loss on held-out
windows was {losses[0]:.4f} before and {np.nanmin(losses):.4f} after.
"""
