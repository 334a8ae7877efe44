"""The report of pruning a model."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prox24._core.pattern import Pattern
from prox24._jobs import page, torchax
from prox24._jobs.output import Report, gigabytes, table
from prox24._pruning.recipe import Recipe
from prox24._pruning.report import LinearReport
from prox24._solvers.problem import Status
from prox24.refine._training import Outcome

NEXT = """prox24 eval {folder}
prox24 generate {folder} --prompt "Once upon a time"
prox24 verify {folder}
python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
"""


def totals(linears: Sequence[LinearReport]) -> dict[str, Any]:
    """See `PruneReport.totals`."""
    losses = [linear.statistics.relative_loss for linear in linears]
    known = bool(losses) and all(map(math.isfinite, losses))
    return {
        "linears": len(linears),
        "parameters": sum(linear.parameters for linear in linears),
        "zeros": sum(round(linear.sparsity * linear.parameters) for linear in linears),
        "mean_relative_loss": math.fsum(losses) / len(losses) if known else None,
        "largest_relative_loss": max(losses) if known else None,
    }


@dataclasses.dataclass(frozen=True)
class PruneReport(Report):
    """How a model was pruned; printed, it is a table.

    Attributes:
      source: the dense model.
      destination: the written folder.
      recipe: the recipe of the job.
      calibration: the text, its windows and tokens.
      linears: one `LinearReport` for each pruned linear, in the order of pruning.
      kept_dense: the tensors that `keep_dense` of the recipe left dense, the worst first, each
        with the relative loss of Wanda's mask.
      kept_dense_effect: what they cost and save, over all tensors that the recipe selects; empty
        without `keep_dense`. "share_of_weights" is the share of their weights left dense.
        "mean_loss_all_pruned" is their mean relative loss by Wanda's mask, and "mean_loss" the same
        with zero for the dense ones.
      turned_layers: the number of layers with attention heads in a learnt basis; see
        `prox24.HeadBasis`.
      resumed_linears: the number of linears that an earlier, interrupted run has pruned.
      seconds: wall-clock time of the job.
      stages: seconds by part: "check" the arguments and the source, "gather" Grams, learn a
        "basis", "solve", "refine", "run" the pruned layers, "write". A device may still compute
        at the end of a part. Then the part that waits for the result includes the rest of the time.
      peak_memory_bytes: the largest resident memory; None if it is not known.
      versions: of Python and packages.
      remark: the effect of the zeros on the speed of a runtime.
    """

    source: str
    destination: str
    recipe: Recipe
    calibration: dict[str, Any]
    linears: list[LinearReport]
    kept_dense: dict[str, float]
    kept_dense_effect: dict[str, float]
    turned_layers: int
    resumed_linears: int
    seconds: float
    stages: dict[str, float]
    peak_memory_bytes: int | None
    versions: dict[str, str]
    remark: str

    @property
    def mean_relative_loss(self) -> float:
        """The mean over linears; NaN without linears, or if a loss is not finite."""
        mean = self.totals["mean_relative_loss"]
        return math.nan if mean is None else float(mean)

    @property
    def totals(self) -> dict[str, Any]:
        """The number of all linears, their parameters, zeros, mean and largest relative loss.

        Both losses are None without linears, or if a loss is not finite.
        """
        return totals(self.linears)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict for JSON."""
        linears = [linear.figures() for linear in self.linears]
        own = {"recipe": self.recipe.to_dict(), "totals": self.totals, "linears": linears}
        return super().to_dict() | own

    def __str__(self) -> str:
        return f"{table(['', ''], self._rows())}\n{self.remark}"

    def _rows(self) -> list[list[str]]:
        losses = {linear.name: linear.statistics.relative_loss for linear in self.linears}
        rows = [["written", self.destination], ["linears pruned", str(len(losses))]]
        if self.recipe.dtype is not None:
            rows.append(["written as", self.recipe.dtype])
        if losses:
            worst = max(losses, key=losses.__getitem__)
            rows += [
                ["mean relative loss", f"{self.mean_relative_loss:.4f}"],
                ["largest relative loss", f"{losses[worst]:.4f}  {worst}"],
            ]
        rows += [
            ["calibration", self.calibration["text"]],
            [
                "calibration tokens",
                f"{self.calibration['tokens']}, {self.calibration['windows']} windows of "
                f"{self.calibration['sequence_length']}",
            ],
            ["their SHA-256", self.calibration["sha256"][:16]],
            ["seconds", f"{self.seconds:.0f}"],
            ["seconds by stage", ", ".join(f"{k} {v:.0f}" for k, v in self.stages.items())],
            ["peak memory", gigabytes(self.peak_memory_bytes)],
            *self._block_rows(),
        ]
        if self.kept_dense:
            most, least = max(self.kept_dense.values()), min(self.kept_dense.values())
            spared = f"{len(self.kept_dense)} linears, of losses {least:.4f} to {most:.4f} by Wanda"
            bought = (
                "mean loss by Wanda {mean_loss_all_pruned:.4f} to {mean_loss:.4f}, for "
                "{share_of_weights:.1%} of the weights".format(**self.kept_dense_effect)
            )
            rows += [["kept dense", spared], ["their effect", bought]]
        if self.recipe.basis is not None:
            why = "" if self.turned_layers else ": a linear stays dense, or heads do not fit"
            rows.append(["learnt bases of heads", f"{self.turned_layers} layers{why}"])
        counts = {
            "done by the run before": self.resumed_linears,
            "cut to the pattern at the last step": sum(
                linear.status is Status.MAX_STEPS for linear in self.linears
            ),
            "damping raised to make a Gram definite": sum(
                linear.statistics.damping_raised for linear in self.linears
            ),
            "calibrated on fewer tokens than inputs": sum(
                linear.tokens < linear.inputs for linear in self.linears
            ),
        }
        rows += [[label, f"{count} linears"] for label, count in counts.items() if count]
        dead = sum(linear.statistics.dead_features for linear in self.linears)
        if dead:
            rows.append(["input features never active", str(dead)])
        return rows

    def to_html(self) -> str:
        """One self-contained HTML page: figures, losses by layer, a mask, and next commands."""
        return page.page(f"{self.source}, pruned", *self.html_sections())

    def html_sections(self) -> list[str]:
        """The sections of the page, in reading order."""
        losses = {linear.name: linear.statistics.relative_loss for linear in self.linears}
        return [
            page.section("Result", page.table(self._rows()), page.paragraph(self.remark)),
            page.section(
                "Relative loss of each linear",
                page.paragraph("The squared error of the output over its square; dark is large."),
                page.heat_map(losses),
            ),
            *self._mask_section(),
            page.section(
                "Totals", page.table([[name, str(value)] for name, value in self.totals.items()])
            ),
            page.section(
                "Seconds by stage",
                page.table([[name, f"{value:.1f}"] for name, value in self.stages.items()]),
            ),
            page.section("Recipe", page.code(self.recipe.to_json())),
            page.section("Next", page.code(NEXT.format(folder=self.destination))),
        ]

    def _mask_section(self) -> list[str]:
        """The first rows and columns of a mask, read from the written model."""
        if not self.linears:
            return []
        checkpoint = torchax.open_any(self.destination)
        name = self.linears[0].name.partition("[")[0]
        axis = torchax.linear_axes(checkpoint)[name]
        weight = np.moveaxis(np.asarray(checkpoint.read(name)), axis, -1)
        corner = weight.reshape(-1, weight.shape[-1])[:24, :64] != 0
        pattern = self.recipe.pattern_of(name)
        group = pattern.width if isinstance(pattern, Pattern) else None
        said = f"The first rows and columns of {name}; a square is a nonzero weight."
        return [page.section("A mask", page.paragraph(said), page.picture(corner, group))]

    def _block_rows(self) -> list[list[str]]:
        # Linears of a layer share one report.
        blocks = list(dict.fromkeys(each.refinement for each in self.linears if each.refinement))
        if not blocks:
            return []
        before, after = np.mean([(block.error_before, block.error) for block in blocks], axis=0)
        rows = [["mean error of a layer, refined", f"{before:.4f} to {after:.4f}"]]
        if diverged := sum(block.outcome is Outcome.DIVERGED for block in blocks):
            rows.append(["diverged while refined", f"{diverged} layers"])
        return rows
