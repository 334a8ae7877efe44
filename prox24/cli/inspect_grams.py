"""`prox24 inspect --grams`: what Grams say about Wanda against methods that use them whole."""

import argparse
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.cli.output import check_writable, print_json, print_table, progress_bar
from prox24.cli.windows import calibration_windows
from prox24.core.diagnostics import diagnose
from prox24.errors import CheckpointError, Prox24Error
from prox24.jobs.forward import (
    Model,
    embed_windows,
    layer_linears,
    layer_weights,
    load_model,
    run_in_place,
)
from prox24.pipeline import gather_grams

COLUMNS = [
    "input",
    "condition",
    "scaled",
    "effective rank",
    "off diagonal",
    "chance",
    "coherence",
    "Kruskal",
    "dead",
]

Row = dict[str, Any]


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    if arguments.figure is not None:
        check_figure(arguments.figure)
    checkpoint = open_checkpoint(arguments.source)
    windows = calibration_windows(
        checkpoint, arguments.calibration, arguments.samples, arguments.sequence_length
    )
    model = load_model(checkpoint)
    rows: list[Row] = []
    inputs = sum(
        len({linear.input for linear in layer_linears(model.config, index)})
        for index in range(len(model.config.layers))
    )
    with progress_bar("inspect", inputs, arguments.quiet) as advance:
        for row in inspect_layers(model, windows):
            rows.append(row)
            advance(_label(row), None)
    if arguments.figure is not None:
        draw(rows, arguments.figure)
    if arguments.json:
        print_json(
            {
                "model": str(arguments.source),
                "calibration_tokens": windows.size,
                "inputs": [{key: _finite(value) for key, value in row.items()} for row in rows],
                "reading": reading(rows, windows.size),
            }
        )
    elif not arguments.quiet:
        print_table(COLUMNS, [_cells(row) for row in rows])
        print(reading(rows, windows.size))
    return 0


def check_figure(file: Path) -> None:
    """Raises unless a figure can be written to the file: its name, its place, and matplotlib.

    Raises:
      CheckpointError: the name is not that of a PNG or SVG file, or it cannot be written there.
      Prox24Error: matplotlib is not installed.
    """
    if file.suffix not in (".png", ".svg"):
        raise CheckpointError(f"the name of the figure {file} must end in .png or .svg")
    check_writable(file, "figure")
    if importlib.util.find_spec("matplotlib") is None:
        raise Prox24Error("--figure needs matplotlib: pip install 'prox24[examples]'")


def inspect_layers(model: Model, windows: NDArray[np.int32]) -> Iterator[Row]:
    """Runs the dense model layer by layer and diagnoses the Gram of each input of its linears.

    Args:
      model: every layer stays as it is, unlike in pruning, where a layer sees the pruned ones.
      windows: calibration tokens, shape (windows, length).

    Yields:
      The layer, the input, its features that are not dead, the fields of `GramDiagnostics`, and
      `chance_mass`, the off-diagonal mass of as many independent features: that many tokens of
      them have correlations with the mean square 1 / tokens.

    Raises:
      CalibrationError: activations are not finite; names the input.
    """
    hidden = list(embed_windows(model, windows))
    for index in range(len(model.config.layers)):
        weights = layer_weights(model, index)
        grams = gather_grams(model, index, weights, hidden).grams
        # In the order of use; a compiled function returns a dict in the order of its keys.
        for name in dict.fromkeys(linear.input for linear in layer_linears(model.config, index)):
            gram = grams[name]
            diagnosis = diagnose(gram.total)._asdict()
            figures = {key: value.item() for key, value in diagnosis.items()}
            features = len(gram.total) - figures["dead_features"]
            others = max(features - 1, 0)
            place = {"layer": index, "input": name, "features": features}
            chance = others / (int(gram.tokens) + others) if others else 0.0
            yield place | figures | {"chance_mass": chance}
        run_in_place(model, index, weights, hidden)


def reading(rows: list[Row], tokens: int) -> str:
    """What the figures say about Wanda against the other methods, and no more."""
    masses = [row["off_diagonal_mass"] for row in rows]
    if max(masses) == 0:
        return "Every Gram is diagonal, so Wanda's masks are optimal."
    least, most = (rows[masses.index(mass)] for mass in (min(masses), max(masses)))
    singular = sum(math.isinf(row["scaled_condition_number"]) for row in rows)
    if singular:
        bound = (
            f"In {singular} of {len(rows)} inputs the scaled Gram is singular to rounding and "
            "gives no bound on Wanda's loss."
        )
    else:
        factor = max(row["scaled_condition_number"] for row in rows)
        bound = f"Wanda's loss is at most {factor:.4g} times the least loss of the same pattern."
    experts = any("experts" in row["input"] for row in rows)
    fewer = ", or those of them that an expert sees" if experts else ""
    return (
        "Wanda's masks are optimal for a Gram with nothing off the diagonal. "
        f"Here {np.mean(masses):.1%} of the squared correlations are there on average, "
        f"from {min(masses):.1%} ({_label(least)}) to {max(masses):.1%} ({_label(most)}); "
        f"independent features would show up to {max(row['chance_mass'] for row in rows):.1%} "
        f"in {tokens} tokens{fewer}. {bound} Only what is off the diagonal can make another method "
        "better than Wanda; whether it does depends on the weights as well."
    )


def draw(rows: list[Row], file: Path) -> None:
    """Writes a figure with four panels over the layers, one line for each input of a layer."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    off_diagonal, rank, coherence, condition = panels.flat
    for name in dict.fromkeys(row["input"] for row in rows):
        lines = [row for row in rows if row["input"] == name]
        column = {key: [_finite(row[key]) for row in lines] for key in lines[0]}
        layers = column["layer"]
        [line] = off_diagonal.plot(layers, column["off_diagonal_mass"], ".-", label=name)
        dotted: dict[str, Any] = {"linestyle": ":", "color": line.get_color(), "linewidth": 1}
        off_diagonal.plot(layers, column["chance_mass"], **dotted)
        shares = [row["effective_rank"] / max(row["features"], 1) for row in lines]
        rank.plot(layers, shares, ".-")
        coherence.plot(layers, column["coherence"], ".-")
        condition.semilogy(layers, column["scaled_condition_number"], ".-")
        condition.semilogy(layers, column["condition_number"], marker=".", **dotted)
    off_diagonal.set_title("mass off the diagonal (dotted: by chance)", fontsize=10)
    rank.set_title("effective rank / features", fontsize=10)
    coherence.set_title("coherence", fontsize=10)
    condition.set_title("condition number, scaled (dotted: unscaled; gaps: singular)", fontsize=10)
    for axes in (off_diagonal, rank, coherence):
        axes.set_ylim(0, 1.02)
    for axes in panels[1]:
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    with rc_context({"svg.hashsalt": "prox24"}):  # the same file from every run
        figure.savefig(file, metadata={"Date": None})


def _cells(row: Row) -> list[str]:
    return [
        _label(row),
        f"{row['condition_number']:.3g}",
        f"{row['scaled_condition_number']:.3g}",
        f"{row['effective_rank']:.1f} of {row['features']}",
        f"{row['off_diagonal_mass']:.1%}",
        f"{row['chance_mass']:.1%}",
        f"{row['coherence']:.3f}",
        f"{row['kruskal_lower']} to {row['kruskal_upper']}",
        str(row["dead_features"]),
    ]


def _label(row: Row) -> str:
    return f"{row['layer']} {row['input']}"


def _finite(value: Any) -> Any:
    """The value, or None for what JSON and an axis have no place for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
