"""The reports of pruning: one for each linear, as a line of text or a flat object."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from prox24._solvers.problem import Statistics, Status
from prox24.refine._training import Outcome


class BlockReport(NamedTuple):
    """How a layer was refined.

    Attributes:
      outcome: how the refinement ended.
      error_before: relative error of the layer's output on held-out windows before the refinement,
        see `prox24.refine.relative_error`.
      error: the same error after the refinement.
      steps: number of steps of the optimizer.
      seconds: wall-clock time, compilation included.
    """

    outcome: Outcome
    error_before: float
    error: float
    steps: int
    seconds: float


class LinearReport(NamedTuple):
    """How one matrix was pruned; printed, it is one line.

    Attributes:
      name: the tensor, followed by [i] if it consists of several matrices.
      status: how the solver ended.
      sparsity: fraction of exact zeros.
      parameters: number of weights, zeros included.
      inputs: the input width. With fewer tokens the Gram is singular. Then damping alone limits
        the change of a weight in directions without data.
      tokens: number of calibration tokens of the matrix. An expert sees only its routed tokens.
      seconds: wall-clock time of the solver and the refit, compilation included.
      statistics: the losses and other figures of `prox24.solve`.
      refinement: how the layer was refined afterwards, or None.
    """

    name: str
    status: Status
    sparsity: float
    parameters: int
    inputs: int
    tokens: int
    seconds: float
    statistics: Statistics
    refinement: BlockReport | None = None

    def __str__(self) -> str:
        few = ", too few" if self.tokens < self.inputs else ""
        return (
            f"{self.status.name.lower():9}  loss {self.statistics.relative_loss:.4f}  "
            f"{self.tokens} tokens of {self.inputs}{few}  {self.name}"
        )

    def figures(self) -> dict[str, Any]:
        """The report as a flat dict for JSON; a NaN or an infinite number becomes None."""
        own = {key: value for key, value in self._asdict().items() if key != "statistics"}
        trained = self.refinement
        own["refinement"] = trained and trained._asdict() | {"outcome": trained.outcome.value}
        flat = own | {"status": self.status.name.lower()} | self.statistics._asdict()
        infinite = [k for k, v in flat.items() if isinstance(v, float) and not math.isfinite(v)]
        return flat | dict.fromkeys(infinite)

    @classmethod
    def of_figures(cls, figures: Mapping[str, Any]) -> Self:
        """The report, from the result of its `figures`."""
        numbers = {name: figures[name] for name in Statistics._fields}
        losses = {key: math.inf for key, value in numbers.items() if value is None}
        own = {name: figures[name] for name in cls._fields if name != "statistics"}
        own["status"] = Status[own["status"].upper()]
        if trained := own["refinement"]:
            own["refinement"] = BlockReport(**trained | {"outcome": Outcome(trained["outcome"])})
        return cls(**own, statistics=Statistics(**numbers | losses))
