"""Estimated times of pruning whole Llama models, from the counts of `compiled_cuda.py`.

    python benchmarks/compiled_models.py [--windows 128]

A window has 2,048 tokens. Each layer runs three times on every window: the pruned and the dense
layer with Grams and cross-Grams, then the layer with its pruned weights. The solver with its refit
runs once for each linear, and so does the correction for dense targets. Not counted are the basis
of attention heads, files, transfers and compilation. A model and a chip without counts have no
line. No estimate was compared with a chip.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import LLAMAS, llama_linears, parser_of, positive, show

COUNTS = Path(__file__).parents[1] / "docs/figures/compiled-cuda.csv"


def seconds(
    ms: Mapping[str, float], config: Mapping[str, Any], prefix: str, windows: int
) -> list[float]:
    """Of layers and Grams, solver, and correction."""
    layer = windows * (ms[f"{prefix}layer, dense too, and Grams"] + ms[f"{prefix}layer"])
    linears = llama_linears(config).items()
    solver, correction = (
        sum(number * ms[f"{prefix}{part}, {shape}"] for shape, number in linears)
        for part in ("default", "correction")
    )
    return [config["num_hidden_layers"] * part / 1e3 for part in (layer, solver, correction)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--windows", type=positive, default=128)
    windows = parser.parse_args().windows
    of_chips: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(COUNTS.read_text().splitlines()):
        of_chips.setdefault(row["chip"], {})[row["program"]] = float(row["ms"])
    rows = []
    for model, config in LLAMAS.items():
        for chip, ms in of_chips.items():
            prefix = "" if model == "8B" else f"{model}: "
            if f"{prefix}layer" in ms:
                parts = seconds(ms, config, prefix, windows)
                rows.append((model, chip, *(f"{part:,.0f}" for part in (*parts, sum(parts)))))
    show(("model", "chip", "layers and Grams, s", "solver, s", "correction, s", "sum, s"), rows)


if __name__ == "__main__":
    main()
