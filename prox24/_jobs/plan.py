"""Estimates the memory and the work of pruning a model, before it starts."""

import contextlib
import dataclasses
from pathlib import Path

from prox24._checkpoints.checkpoint import open_described
from prox24._checkpoints.tensors import byte_count
from prox24._checkpoints.writer import written_spec
from prox24._core.placement import divisors
from prox24._jobs.forward import batch_size, load_model
from prox24._jobs.memory import (
    checked_setup,
    distinct_layers,
    fitting_micro_batch,
    layer_memory,
    operations,
    streams,
)
from prox24._jobs.output import Report, gigabytes, table
from prox24._jobs.tokens import check_length
from prox24._pruning.recipe import Recipe, with_products
from prox24.errors import Prox24Error


@dataclasses.dataclass(frozen=True)
class Plan(Report):
    """Bytes and operations; printed, it is a table.

    Attributes:
      model: the model to prune.
      devices: number of devices that would share the work.
      shard_grams: whether they would share the columns of Grams.
      micro_batch_windows: windows of a micro-batch on a device.
      sequence_length: tokens of a window.
      checkpoint_bytes: bytes of the weights as they are written.
      activation_bytes: bytes of hidden states on the host.
      layer_weight_bytes: bytes of the weights of the largest layer, counted once.
      layer_gram_bytes: bytes of the Grams of a layer, for the layer with the largest Grams.
      gather_bytes: peak bytes on a device while Grams are gathered.
      solve_bytes: peak bytes on a device while a linear is solved.
      widest_linear: the linear with the peak `solve_bytes`.
      peak_bytes: the larger of `gather_bytes` and `solve_bytes`.
      memory_bytes: the given memory of a device, or None.
      fits: whether the job fits into `memory_bytes`, or None.
      fitting_micro_batch_windows: windows of the largest micro-batch that fits on a device, or
        None.
      operations: multiplications and additions of forward passes and Grams.
      described_by: the source of names and shapes if there are no weights here, else None.
    """

    model: str
    devices: int
    shard_grams: bool
    micro_batch_windows: int
    sequence_length: int
    checkpoint_bytes: int
    activation_bytes: int
    layer_weight_bytes: int
    layer_gram_bytes: int
    gather_bytes: int
    solve_bytes: int
    widest_linear: str
    peak_bytes: int
    memory_bytes: int | None
    fits: bool | None
    fitting_micro_batch_windows: int | None
    operations: dict[str, float]
    described_by: str | None = None

    def __str__(self) -> str:
        tokens = f"{self.micro_batch_windows} x {self.sequence_length} tokens"
        rows = [
            ["weights, as they are written", gigabytes(self.checkpoint_bytes)],
            ["hidden states, on the host", gigabytes(self.activation_bytes)],
            ["a layer's weights", gigabytes(self.layer_weight_bytes)],
            ["a layer's Grams", gigabytes(self.layer_gram_bytes)],
            [f"peak on a device, gathering {tokens}", gigabytes(self.gather_bytes)],
            [f"peak on a device, solving {self.widest_linear}", gigabytes(self.solve_bytes)],
            *[[f"operations: {name}", f"{count:.3g}"] for name, count in self.operations.items()],
        ]
        if self.described_by is not None:
            rows.insert(0, ["no weights, described by", self.described_by])
        if self.memory_bytes is not None:
            most, length = self.fitting_micro_batch_windows, self.sequence_length
            said = "no" if most is None else f"yes, {most} x {length} tokens at once"
            rows.append([f"fits into {gigabytes(self.memory_bytes)}", said])
        title = f"plan for {self.devices} device{'s' * (self.devices > 1)}"
        return table([title + ", Grams shared" * self.shard_grams, self.model], rows)


@with_products
def plan(
    source: str | Path,
    recipe: Recipe = Recipe(),
    *,
    samples: int = 64,
    sequence_length: int = 512,
    devices: int = 1,
    memory: int | None = None,
    shard_grams: bool = False,
) -> Plan:
    """Estimates the memory and the operations of `prune`, from names and shapes.

    XLA's compiler reports the memory of the programs for each kind of layer. The programs do not
    run, and no weight is read.

    Args:
      source: see `prune`; no weights are downloaded. A model of the hub outside the local cache is
        described by its config.json and the headers of its safetensors files. A model without
        weights is described by its config.json, with dtype float32 if it has none.
      recipe: how the model would be pruned.
      samples: number of windows of calibration text.
      sequence_length: tokens of a window.
      devices: number of devices. The plan uses the largest number up to this that divides the
        windows.
      memory: bytes of a device; the plan then says whether the job fits.
      shard_grams: see `prune`.

    Returns:
      A `Plan`.

    Raises:
      CalibrationError: windows are longer than the model's positions, or too few to refine.
      CheckpointError: the model cannot be read, or M does not divide an input width.
      RecipeError: the solver does not support the pattern, or this machine the products.
      UnsupportedModelError: the model has no forward pass here.
      Prox24Error: a number is not positive.
    """
    given = {"samples": samples, "sequence_length": sequence_length, "devices": devices}
    for name, number in given.items():
        if number < 1:
            raise Prox24Error(f"{name} is {number}, not a positive number")
    recipe.check_supported()
    checkpoint = open_described(source)
    model = load_model(checkpoint)
    # The largest number of devices that divides the windows, as in `prune`.
    used = divisors(samples, devices)[0]
    setup = checked_setup(model, recipe, used, shard_grams)
    check_length(checkpoint, sequence_length)
    size = batch_size(samples // used, sequence_length)
    if recipe.refine is not None:  # As in `native_runner`.
        step = recipe.refine.step_windows(samples, sequence_length, used)
        size = divisors(step // used, size)[0]
    memories = [
        layer_memory(model, index, (size, sequence_length), setup)
        for index in distinct_layers(model, recipe)
    ]
    fitting = None
    if memory is not None:
        with contextlib.suppress(Prox24Error):
            fitting = fitting_micro_batch(model, (samples, sequence_length), setup, memory)
    dtype = recipe.dtype or checkpoint.pruned_dtype
    written = [written_spec(checkpoint, name, dtype) for name in checkpoint.tensors]
    gather = max(each.gather for each in memories)
    heaviest = max(memories, key=lambda each: each.solve)
    alongside = 2 if recipe.refine is not None else streams(recipe)
    return Plan(
        model=str(source),
        devices=used,
        shard_grams=shard_grams,
        micro_batch_windows=size,
        sequence_length=sequence_length,
        checkpoint_bytes=sum(map(byte_count, written)),
        activation_bytes=4 * alongside * samples * sequence_length * model.config.hidden,
        layer_weight_bytes=max(each.weights for each in memories),
        layer_gram_bytes=max(each.grams for each in memories),
        gather_bytes=gather,
        solve_bytes=heaviest.solve,
        widest_linear=heaviest.widest,
        peak_bytes=max(gather, heaviest.solve),
        memory_bytes=memory,
        fits=None if memory is None else fitting is not None,
        fitting_micro_batch_windows=None if fitting is None else fitting // used,
        operations=operations(model, samples * sequence_length, recipe),
        described_by=checkpoint.described_by,
    )
