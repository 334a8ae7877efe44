"""Perplexity of SmolLM2-135M-Instruct pruned to 2:4 and then refined, against tokens and seconds.

    python benchmarks/refine.py --calibration calib_mix.txt --texts austen.txt sotu.txt

Every mask is found on the first 64 windows of 512 tokens of the calibration text, in an order drawn
by the seed; the refinements see those and the windows that follow. Each row runs in a process of
its own, for its peak memory. A line is appended to FOLDER/refine.csv after each run, and a run that
is there already is skipped, so that an interrupted command can be given again. Pruned and refined
models are kept in FOLDER/models of the cache, from which --unseen and --evaluation-windows evaluate
them again. FOLDER/refine.png shows the gap in log-perplexity to the dense model against the tokens
trained on and the seconds, pruning included. With --bigbench FILE every model answers the questions
of multiple_choice.py, too. Printed are the table, and how much of what is evaluated is in the
calibration text word for word.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from model import add_row, check_columns, drawn_windows, read_rows
from multiple_choice import Question, accuracies, read_questions
from prox24.cli.output import peak_memory_bytes
from prox24.pipeline import collect, prune
from rich.console import Console
from rich.table import Table

from prox24 import ADMM, ConjugateGradients, Prox, SparseGPT
from prox24.checkpoints.checkpoint import Checkpoint, open_checkpoint
from prox24.checkpoints.writer import write_checkpoint
from prox24.cli.demo_model import fetch_model
from prox24.jobs.distill import ModelRefinement, MovingMask, distill
from prox24.jobs.perplexity import perplexity
from prox24.jobs.text import first_windows, read_text, tokenize
from prox24.refine import BlockRefinement
from prox24.solvers.problem import DEFAULT_PULL
from prox24.solvers.solve import Refit, Solver

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = TypeVar("Result")
LENGTH = 512
WINDOWS = 64
IN_BFLOAT16 = ModelRefinement(rate=5e-4, compute_dtype="bfloat16")
MIXED = ModelRefinement(rate=5e-4, cross_entropy=0.6)
TRIED = {
    64: [ModelRefinement(rate=rate) for rate in (5e-4, 1e-3, 2e-3)],
    256: [ModelRefinement(rate=5e-4)],
    1024: [MIXED, dataclasses.replace(MIXED, compute_dtype="bfloat16", passes=2)],
}
"""With so many windows, of the default mask."""
MOVING = {
    "growing mask, rate 0.003": ModelRefinement(rate=3e-3, mask=MovingMask()),
    "growing mask, rate 0.01": ModelRefinement(rate=1e-2, mask=MovingMask()),
    "ProxSparse's mask": ModelRefinement.proxsparse(),
}
"""Of the dense model: what finds a mask while it trains."""
LONG_STEPS = BlockRefinement(step_tokens=2048)
BLOCKS = {
    f"block, bfloat16, passes: {passes}": dataclasses.replace(
        LONG_STEPS, passes=passes, compute_dtype="bfloat16"
    )
    for passes in (1, 5, 18)
}
"""Over 56 windows: about the tokens of models that are trained on 64, 256 and 1,024."""
SHORT_STEPS = BlockRefinement(compute_dtype="bfloat16")
QUESTIONS = 250
"""Of each task."""
PIECE = 60
"""Characters that are looked for together."""


class Base(NamedTuple):
    """How a mask is found, and its layers are refined."""

    solver: Solver
    refit: Refit | None = None
    pull: float | None = None
    blocks: BlockRefinement | None = None

    @property
    def trained_on(self) -> int:
        """Tokens, in all passes."""
        if self.blocks is None:
            return 0
        size = self.blocks.step_windows(WINDOWS, LENGTH)
        steps = WINDOWS // size
        return self.blocks.passes * (steps - self.blocks.held_out_of(steps)) * size * LENGTH


DEFAULT = "admm, dense targets"
REFINED = {
    "sparsegpt + refit": Base(SparseGPT(), ConjugateGradients(100, 1e-6)),
    DEFAULT: Base(ADMM(), ConjugateGradients(), DEFAULT_PULL),
}
"""What is refined, as blocks and as a whole."""
PRUNED = {"sparsegpt": Base(SparseGPT()), "prox, no refit": Base(Prox()), **REFINED}
BASES = PRUNED | {
    f"{name} + {how}": base._replace(blocks=blocks)
    for how, blocks in BLOCKS.items()
    for name, base in REFINED.items()
}
BLOCKWISE = f"{DEFAULT} + block, passes: 5"
"""In float32; what is refined as blocks, and then as a whole."""
BASES[BLOCKWISE] = REFINED[DEFAULT]._replace(blocks=LONG_STEPS)
BLOCKWISE_SHORT_STEPS = f"{DEFAULT} + block, bfloat16, short steps, passes: 5"
BASES[BLOCKWISE_SHORT_STEPS] = REFINED[DEFAULT]._replace(blocks=SHORT_STEPS)


class Run(NamedTuple):
    """One line: a pruned model, and how the whole of it is refined with how many windows."""

    name: str
    base: str
    windows: int = 0
    refinement: ModelRefinement | None = None

    @property
    def line(self) -> str:
        """What it shares with runs that differ in their tokens alone."""
        return re.sub(r", passes: \d+$", "", self.name)

    @property
    def before(self) -> str | None:
        """The name of the run of the same model before its last refinement."""
        if self.refinement is not None:
            return self.base
        given = BASES.get(self.base)
        if given is None or given.blocks is None:
            return None
        return next(name for name, base in PRUNED.items() if base == given._replace(blocks=None))

    @property
    def distinct_tokens(self) -> int:
        """Of the text that the mask and the training see."""
        return max(0 if self.base == "dense" else WINDOWS, self.windows) * LENGTH


def changed(refinement: ModelRefinement) -> str:
    """What is not as by default; the passes, which change the tokens alone, at the end."""
    parts = [f"rate {refinement.rate:g}"]
    if refinement.cross_entropy:
        parts.append(f"cross-entropy {refinement.cross_entropy:g}")
    if refinement.compute_dtype != "float32":
        parts.append(refinement.compute_dtype)
    if refinement.passes > 1:
        parts.append(f"passes: {refinement.passes}")
    return ", ".join(parts)


def runs() -> list[Run]:
    """The table."""
    table = [Run("dense", "dense")]
    table += [Run(base, base) for base in BASES]
    for windows, tried in TRIED.items():
        for one in tried:
            name = f"{DEFAULT} + model, {changed(one)}"
            table.append(Run(name, DEFAULT, windows, one))
    table += [Run(f"dense + model, {name}", "dense", WINDOWS, one) for name, one in MOVING.items()]
    table += [Run(f"{base} + model", base, WINDOWS, ModelRefinement()) for base in REFINED]
    table += [
        Run(f"{base} + model, {changed(IN_BFLOAT16)}", base, windows, IN_BFLOAT16)
        for windows in TRIED
        for base in (*REFINED, BLOCKWISE, BLOCKWISE_SHORT_STEPS)
    ]
    return table


def windows_of(dense: Checkpoint, text: Path, count: int, seed: int) -> np.ndarray:
    """Of the calibration text; fewer are the first of more."""
    ids = tokenize(dense.load_tokenizer(), read_text(text), dense.config["vocab_size"])
    return drawn_windows(ids, max(WINDOWS, count), LENGTH, seed)


class Made(NamedTuple):
    """A model in the cache, and what it took."""

    folder: str
    tokens: int
    seconds: float
    peak_memory_bytes: int
    held_out_loss: float


Tensors = Iterable[tuple[str, np.ndarray]]


def made(
    name: str,
    settings: object,
    windows: np.ndarray,
    make: Callable[[], tuple[Tensors, int, float]],
    dense: Checkpoint,
    cache: Path,
) -> Made:
    """Of these settings and windows, made where it is not there yet: tensors, tokens and loss."""
    digest = hashlib.sha256(repr(settings).encode() + windows.tobytes()).hexdigest()[:8]
    folder = cache / "models" / f"{name}-{digest}"
    took = folder.with_name(f"{folder.name}.json")
    if not took.exists():
        start = time.perf_counter()
        tensors, tokens, loss = make()
        folder.parent.mkdir(exist_ok=True)
        write_checkpoint(dense, folder, tensors, dtype="float32", overwrite=True)
        numbers = (tokens, time.perf_counter() - start, peak_memory_bytes(), loss)
        took.write_text(json.dumps(numbers))
    return Made(str(folder), *json.loads(took.read_text()))


def pruned_model(name: str, calibration: Path, seed: int, cache: Path) -> Made:
    """Of the bases."""
    base, dense = BASES[name], open_checkpoint(fetch_model(cache))
    solver, refit, pull, blocks = base
    windows = windows_of(dense, calibration, WINDOWS, seed)

    def make() -> tuple[Tensors, int, float]:
        pruned = prune(dense, windows, solver, refit, pull=pull, refinement=blocks)
        return collect(pruned).tensors.items(), base.trained_on, math.nan

    return made(name, base, windows, make, dense, cache)


def refined_model(run: Run, before: str, calibration: Path, seed: int, cache: Path) -> Made:
    """Of a pruned model, or of the dense one."""
    dense = open_checkpoint(fetch_model(cache))
    windows = windows_of(dense, calibration, run.windows, seed)[: run.windows]

    def make() -> tuple[Tensors, int, float]:
        distilled = distill(dense, open_checkpoint(before), windows, run.refinement)
        return distilled.tensors, distilled.tokens, min(distilled.refined.losses)

    settings = BASES.get(run.base), run.refinement
    return made(run.name, settings, windows, make, dense, cache)


def evaluate(
    folder: str,
    texts: dict[str, np.ndarray],
    questions: dict[str, list[Question]] | None,
) -> tuple[dict[str, float], int]:
    """The model on the windows of every text, and on the questions; and the peak memory."""
    model = open_checkpoint(folder)
    found = {name: perplexity(model, windows).perplexity for name, windows in texts.items()}
    if questions is not None:
        found["right_answers"] = float(np.mean(list(accuracies(model, questions).values())))
    return found, peak_memory_bytes()


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """In a process of its own, whose peak memory is that of nothing else."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def setting(row: dict[str, str]) -> tuple[str, ...]:
    """What rows must share to be compared."""
    return row["seed"], row["calibration"], row["evaluation_windows"]


def gaps(rows: list[dict[str, str]], texts: list[str]) -> list[float]:
    """Of each row: its gap in log-perplexity to dense, all texts together, over SparseGPT's."""

    def log(row: dict[str, str]) -> float:
        return sum(math.log(float(row[text])) for text in texts)

    logs = {(row["run"], *setting(row)): log(row) for row in rows}
    found = []
    for row in rows:
        dense, reference = (
            logs.get((run, *setting(row)), math.nan) for run in ("dense", "sparsegpt")
        )
        found.append((log(row) - dense) / (reference - dense))
    return found


def print_table(rows: list[dict[str, str]], texts: list[str]) -> None:
    """Every row."""
    table = Table()
    table.add_column("method", no_wrap=True)
    tokens = ("tokens of text", "trained on")
    perplexities = (f"{text} (gap)" for text in texts)
    for title in (*perplexities, "gap, SparseGPT's is 1", "right", *tokens, "seconds", "peak GB"):
        table.add_column(title, justify="right")
    of_text = {text: gaps(rows, [text]) for text in texts}
    for place, (row, gap) in enumerate(zip(rows, gaps(rows, texts), strict=True)):
        table.add_row(
            row["run"],
            *(f"{float(row[text]):.2f} ({of_text[text][place]:.2f})" for text in texts),
            f"{gap:.2f}",
            f"{100 * float(row['right_answers']):.1f}%" if row.get("right_answers") else "",
            row["distinct_tokens"],
            row["tokens"],
            f"{float(row['seconds']):.0f}",
            f"{int(row['peak_memory_bytes']) / 1e9:.2f}",
        )
    Console(width=200).print(table)


def share_seen(text: str, calibration: str) -> float:
    """Of the pieces of a text, those in the calibration text; all white space is one blank."""
    text, calibration = (" ".join(part.split()) for part in (text, calibration))
    pieces = [text[i : i + PIECE] for i in range(0, len(text) - PIECE + 1, PIECE)]
    return float(np.mean([piece in calibration for piece in pieces]))


def evaluated_windows(
    text: Path, count: int, calibration: Path, unseen: bool, cache: Path
) -> np.ndarray:
    """The first of a text; or of those of which no piece is in the calibration text."""
    dense = open_checkpoint(fetch_model(cache))
    tokenizer, vocabulary = dense.load_tokenizer(), dense.config["vocab_size"]
    ids, seen = tokenize(tokenizer, read_text(text), vocabulary), read_text(calibration)
    if not unseen:
        return first_windows(ids, count, LENGTH)
    windows = first_windows(ids, None, LENGTH)
    found = (one for one in windows if share_seen(tokenizer.decode(one), seen) == 0)
    chosen = list(itertools.islice(found, count))
    if len(chosen) < count:
        raise SystemExit(f"{text} has {len(chosen)} windows that are not in {calibration}")
    return np.stack(chosen)


def print_shares_seen(calibration: Path, texts: dict[str, np.ndarray], cache: Path) -> None:
    """Of every text's windows that are evaluated."""
    tokenizer = open_checkpoint(fetch_model(cache)).load_tokenizer()
    for name, windows in texts.items():
        share = share_seen(tokenizer.decode(windows.ravel()), read_text(calibration))
        print(f"{share:.0%} of what is evaluated of {name} is in {calibration.name}")


def draw(rows: list[dict[str, str]], texts: list[str], path: Path) -> None:
    """The gap against tokens and seconds, a line from what was pruned through its refinements."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 6), layout="constrained", sharey=True)
    by_name = {run.name: run for run in runs()}
    several = len(set(map(setting, rows))) > 1
    points = {
        (row["run"], row["distinct_tokens"], *setting(row)): np.array(
            [float(row["tokens"]), float(row["seconds"]), gap]
        )
        for row, gap in zip(rows, gaps(rows, texts), strict=True)
    }
    pruned_on = str(WINDOWS * LENGTH)
    for axes in panels:
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    lines: dict[tuple[str, ...], list[np.ndarray]] = {}
    for (name, _, *place), point in points.items():
        run = by_name.get(name)  # None for what an older table had.
        before = None if run is None else points.get((str(run.before), pruned_on, *place))
        if run is None or before is None:
            continue
        # A model is refined after it is pruned, its blocks while it is.
        begun = before * (1, 1, 0) if run.refinement is not None else 0
        lines.setdefault((run.line, *place), [before]).append(point + begun)
    for (line, *place), found in lines.items():
        tokens, seconds, shares = np.transpose(sorted(found, key=lambda point: point[0]))
        for axes, values in zip(panels, (tokens, seconds), strict=True):
            label = f"{line}, {', '.join(place)}" if several else line
            axes.plot(values, shares, marker="o", markersize=4, label=label)
    panels[0].set_xscale("symlog", linthresh=1e4)
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1].xaxis.set_major_formatter(ScalarFormatter())
    panels[1].xaxis.set_minor_formatter(NullFormatter())
    for axes, title in zip(panels, ("tokens trained on", "seconds"), strict=True):
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gap in log-perplexity, SparseGPT's is 1")
    if panels[0].lines:
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2,
            frameon=False,
            fontsize=8,
        )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--evaluation-windows", type=int, default=16)
    parser.add_argument(
        "--unseen", action="store_true", help="only those without a piece of the calibration text"
    )
    parser.add_argument("--seed", type=int, default=0)
    names = list(dict.fromkeys(run.name for run in runs()))
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="names of rows")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[64, 256, 1024], help="that rows are refined on"
    )
    parser.add_argument("--bigbench", type=Path, metavar="FILE", help="bigbench-1.0.0.tar.gz")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "refine.csv"
    rows = read_rows(path)
    names = [text.stem for text in arguments.texts]
    bigbench = arguments.bigbench
    check_columns(
        path, rows, "held_out_loss", [*names, *([] if bigbench is None else ["right_answers"])]
    )
    questions = None if bigbench is None else read_questions(bigbench, QUESTIONS)
    calibration, seed, cache = arguments.calibration, arguments.seed, arguments.cache
    count, unseen = arguments.evaluation_windows, arguments.unseen
    texts = {
        text.stem: evaluated_windows(text, count, calibration, unseen, cache)
        for text in arguments.texts
    }
    for run in runs():
        key = {
            "run": run.name,
            "distinct_tokens": run.distinct_tokens,
            "seed": seed,
            "calibration": calibration.stem,
            "evaluation_windows": f"{count} unseen" if unseen else count,
        }
        if any(all(row[name] == str(value) for name, value in key.items()) for row in rows):
            continue
        if run.name not in arguments.only:
            continue
        if run.windows and run.windows not in arguments.windows:
            continue
        model = Made(str(fetch_model(cache)), 0, 0.0, 0, math.nan)
        if run.base in BASES:
            model = alone(pruned_model, run.base, calibration, seed, cache)
        if run.refinement is not None:
            model = alone(refined_model, run, model.folder, calibration, seed, cache)
        folder, tokens, seconds, peak, loss = model
        found, evaluating = alone(evaluate, folder, texts, questions)
        measured: dict[str, object] = {
            "tokens": tokens,
            "seconds": seconds,
            "peak_memory_bytes": max(peak, evaluating),
            "held_out_loss": loss,
        }
        rows = add_row(path, key | measured | found)
    print_table(rows, names)
    print_shares_seen(calibration, texts, cache)
    draw(rows, names, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
