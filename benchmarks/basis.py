"""Measures the basis of the attention heads: layer losses, perplexity, seconds.

    python benchmarks/basis.py
    python benchmarks/basis.py --models gemma.gguf gpt2 --rows default sparsegpt

Every method prunes every model with the basis, and without it: a line of 0 steps. "refined" also
trains the kept weights of each layer. "distilled" is the default, and then trains all kept weights
together on 64 windows. Calibration windows are drawn at random by the seed.
Evaluation is on the first windows of each text. Models are written in float32.

Losses are geometric means over the layers. "v" is the linear of the values, or the fused linear
with the values in it. "o" is the linear that reads them. Each run appends a line to
FOLDER/basis.csv. A run that has its line is skipped: give another FOLDER for other texts and
lengths.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import name_of, positive

import prox24
from prox24 import HeadBasis, ModelRefinement, Recipe

MAKERS = ("v_proj", "qkv_proj", "query_key_value", "c_attn")
READERS = ("o_proj", "out_proj", "self_attn.dense", "attention.dense", "attn.c_proj")
RECIPES = {
    "magnitude": Recipe.magnitude(),
    "wanda": Recipe.wanda(),
    "sparsegpt": Recipe.sparsegpt(),
    "default": Recipe(),
    "refined": Recipe.best(),
    "distilled": Recipe(),
}
DISTILLED = ModelRefinement(rate=5e-4)
DISTILLED_WINDOWS = 64


def mean_loss(losses: dict[str, float], parts: tuple[str, ...]) -> float:
    found = [loss for name, loss in losses.items() if name.removesuffix(".weight").endswith(parts)]
    return float(np.exp(np.mean(np.log(found))))


def measure(
    recipe: Recipe,
    model: Path,
    windows: np.ndarray,
    texts: dict[str, np.ndarray],
    training: np.ndarray | None,
) -> dict[str, object]:
    """Prunes, trains on other windows if there are any, and evaluates on every text."""
    with tempfile.TemporaryDirectory() as folder:
        pruned, trained = Path(folder) / "pruned", Path(folder) / "trained"
        report = prox24.prune(model, pruned, recipe, calibration=windows, quiet=True)
        seconds = report.seconds
        if training is not None:
            seconds += prox24.distill(model, pruned, trained, DISTILLED, text=training).seconds
            pruned = trained
        found = common.perplexities(pruned, texts)
    losses = {linear.name: linear.statistics.relative_loss for linear in report.linears}
    return {
        "values_loss": mean_loss(losses, MAKERS),
        "readers_loss": mean_loss(losses, READERS),
        "mean_loss": report.mean_relative_loss,
        "seconds": seconds,
    } | found


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--models", type=Path, nargs="+", help="default: SmolLM2-135M-Instruct")
    common.add_texts(parser)
    parser.add_argument("--windows", type=positive, default=16)
    parser.add_argument("--length", type=positive, default=512)
    parser.add_argument("--rows", nargs="+", choices=RECIPES, default=["sparsegpt", "default"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    common.add_output(parser)
    arguments = parser.parse_args()
    titles = ("model", "method", "steps", "windows", "seed")
    losses, names = ("values_loss", "readers_loss", "mean_loss"), [*map(name_of, arguments.texts)]

    def runs() -> Iterator[tuple[dict[str, object], tuple[Any, ...]]]:
        count, length = arguments.evaluation_windows, arguments.length
        for model in arguments.models or [common.dense_model()]:
            every = common.windows_of(model, arguments.calibration, None, length)
            texts = common.windows_of_texts(model, arguments.texts, count, length)
            every_row = itertools.product(arguments.seeds, arguments.rows, (0, HeadBasis().steps))
            for seed, method, steps in every_row:
                windows, more = common.drawn_windows(every, arguments.windows, seed), None
                if method == "distilled":
                    more = common.drawn_windows(every, DISTILLED_WINDOWS, seed)
                basis = HeadBasis() if steps else None
                recipe = dataclasses.replace(RECIPES[method], basis=basis, dtype="float32")
                values = (model.stem, method, steps, arguments.windows, seed)
                yield dict(zip(titles, values, strict=True)), (recipe, model, windows, texts, more)

    path, columns = arguments.output / "basis.csv", (*titles, *losses, "seconds", *names)
    lines = [
        [row["model"], row["method"], row["steps"], row["seed"]]
        + [f"{float(row[name]):.4f}" for name in losses]
        + [f"{float(row[name]):.2f}" for name in names]
        + [f"{float(row['seconds']):.0f}"]
        for row in common.completed(path, columns, runs(), measure)
    ]
    titles = "model", "method", "steps", "seed", "v", "o", "all", *names, "seconds"
    common.show(titles, lines)


if __name__ == "__main__":
    main()
