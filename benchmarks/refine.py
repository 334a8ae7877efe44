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
from typing import NamedTuple

import common
import matplotlib
import numpy as np
from common import (
    CONVERGED,
    BlockRefinement,
    Checkpoint,
    ModelRefinement,
    MovingMask,
    Refit,
    Result,
    Rows,
    Solver,
    dense_model,
    open_checkpoint,
    plt,
    positive,
    read_text,
)
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from multiple_choice import Question, accuracies, read_questions

from prox24 import ADMM, ConjugateGradients, Prox, SparseGPT

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
    "sparsegpt + refit": Base(SparseGPT(), CONVERGED),
    DEFAULT: Base(ADMM(), ConjugateGradients(), common.PULL),
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


def calibration_windows(dense: Checkpoint, text: Path, count: int, seed: int) -> np.ndarray:
    """Of the calibration text; fewer are the first of more."""
    drawn = max(WINDOWS, count)
    return common.drawn_windows(common.token_ids(dense, text), drawn, LENGTH, seed)[:count]


class Made(NamedTuple):
    """A model in the cache, and what it took."""

    folder: str
    tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    held_out_loss: float = math.nan


Tensors = Iterable[tuple[str, np.ndarray]]


def made(
    name: str,
    settings: object,
    windows: np.ndarray,
    make: Callable[[], tuple[Tensors, int, float]],
    dense: Checkpoint,
    cache: Path,
) -> Made:
    """A model of these settings and windows, made where it is not there yet.

    `make` returns its tensors, the tokens that it was trained on, and the loss.
    """
    digest = hashlib.sha256(repr(settings).encode() + windows.tobytes()).hexdigest()[:8]
    folder = cache / "models" / f"{name}-{digest}"
    took = folder.with_name(f"{folder.name}.json")
    if not took.exists():
        start = time.perf_counter()
        tensors, tokens, loss = make()
        folder.parent.mkdir(exist_ok=True)
        common.write_checkpoint(dense, folder, tensors, dtype="float32", overwrite=True)
        numbers = (tokens, time.perf_counter() - start, common.peak_memory_bytes(), loss)
        took.write_text(json.dumps(numbers))
    return Made(str(folder), *json.loads(took.read_text()))


def pruned_model(name: str, calibration: Path, seed: int, cache: Path) -> Made:
    """Of the bases."""
    base, dense = BASES[name], dense_model(cache)
    windows = calibration_windows(dense, calibration, WINDOWS, seed)

    def make() -> tuple[Tensors, int, float]:
        pruned = common.prune(
            dense, windows, base.solver, base.refit, pull=base.pull, refinement=base.blocks
        )
        return common.collect(pruned).tensors.items(), base.trained_on, math.nan

    return made(name, base, windows, make, dense, cache)


def refined_model(run: Run, before: str, calibration: Path, seed: int, cache: Path) -> Made:
    """Of a pruned model, or of the dense one."""
    dense = dense_model(cache)
    windows = calibration_windows(dense, calibration, run.windows, seed)

    def make() -> tuple[Tensors, int, float]:
        distilled = common.distill(dense, open_checkpoint(before), windows, run.refinement)
        return distilled.tensors, distilled.tokens, min(distilled.refined.losses)

    settings = BASES.get(run.base), run.refinement
    return made(run.name, settings, windows, make, dense, cache)


def evaluate(
    folder: str, texts: dict[str, np.ndarray], questions: dict[str, list[Question]] | None
) -> tuple[dict[str, float], int]:
    """The model on the windows of every text, and on the questions; and the peak memory."""
    model = open_checkpoint(folder)
    found = {name: common.perplexity(model, w).perplexity for name, w in texts.items()}
    if questions is not None:
        found["right_answers"] = float(np.mean(list(accuracies(model, questions).values())))
    return found, common.peak_memory_bytes()


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """In a process of its own, whose peak memory is that of nothing else."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def setting(row: dict[str, str]) -> tuple[str, ...]:
    """What rows must share to be compared."""
    return row["seed"], row["calibration"], row["evaluation_windows"]


def gaps(rows: Rows, texts: list[str]) -> list[float]:
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


def print_table(rows: Rows, texts: list[str]) -> None:
    of_text = {text: gaps(rows, [text]) for text in texts}
    lines = [
        (
            row["run"],
            *(f"{float(row[text]):.2f} ({of_text[text][place]:.2f})" for text in texts),
            f"{gap:.2f}",
            f"{100 * float(row['right_answers']):.1f}%" if row.get("right_answers") else "",
            row["distinct_tokens"],
            row["tokens"],
            f"{float(row['seconds']):.0f}",
            f"{int(row['peak_memory_bytes']) / 1e9:.2f}",
        )
        for place, (row, gap) in enumerate(zip(rows, gaps(rows, texts), strict=True))
    ]
    tokens = "tokens of text", "trained on"
    titles = "gap, SparseGPT's is 1", "right", *tokens, "seconds", "peak GB"
    common.show(("method", *(f"{text} (gap)" for text in texts), *titles), lines, width=200)


def share_seen(text: str, calibration: str) -> float:
    """Of the pieces of a text, those in the calibration text; all white space is one blank."""
    text, calibration = (" ".join(part.split()) for part in (text, calibration))
    pieces = [text[i : i + PIECE] for i in range(0, len(text) - PIECE + 1, PIECE)]
    return float(np.mean([piece in calibration for piece in pieces]))


def evaluated_windows(
    dense: Checkpoint, text: Path, count: int, calibration: Path, unseen: bool
) -> np.ndarray:
    """The first of a text; or of those of which no piece is in the calibration text."""
    if not unseen:
        return common.windows_of(dense, text, count, LENGTH)
    windows, seen = common.windows_of(dense, text, None, LENGTH), read_text(calibration)
    tokenizer = dense.load_tokenizer()
    found = (one for one in windows if share_seen(tokenizer.decode(one), seen) == 0)
    chosen = list(itertools.islice(found, count))
    if len(chosen) < count:
        raise SystemExit(f"{text} has {len(chosen)} windows that are not in {calibration}")
    return np.stack(chosen)


def lines_of(rows: Rows, texts: list[str]) -> dict[str, list[tuple[float, float, float]]]:
    """Tokens, seconds and gap of a pruned model and its refinements, by the name of the line."""
    by_name = {run.name: run for run in runs()}
    several = len(set(map(setting, rows))) > 1
    points = {
        (row["run"], row["distinct_tokens"], *setting(row)): np.array(
            [float(row["tokens"]), float(row["seconds"]), gap]
        )
        for row, gap in zip(rows, gaps(rows, texts), strict=True)
    }
    lines: dict[str, list[np.ndarray]] = {}
    for (name, _, *place), point in points.items():
        run = by_name.get(name)  # None for what an older table had.
        before = run and points.get((str(run.before), str(WINDOWS * LENGTH), *place))
        if before is None:
            continue
        # A model is refined after it is pruned, its blocks while it is.
        begun = before * (1, 1, 0) if run.refinement is not None else 0
        label = ", ".join([run.line, *(place if several else ())])
        lines.setdefault(label, [before]).append(point + begun)
    return {label: sorted(map(tuple, found)) for label, found in lines.items()}


def draw(rows: Rows, texts: list[str], path: Path) -> None:
    """The gap against tokens and seconds, a line from what was pruned through its refinements."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 6), layout="constrained", sharey=True)
    for place, title in enumerate(("tokens trained on", "seconds")):
        axes = panels[place]
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
        for label, points in lines_of(rows, texts).items():
            columns = list(zip(*points, strict=True))
            axes.plot(columns[place], columns[2], marker="o", markersize=4, label=label)
        axes.set_xlabel(title)
    panels[0].set_xscale("symlog", linthresh=1e4)
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1].xaxis.set_major_formatter(ScalarFormatter())
    panels[1].xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("gap in log-perplexity, SparseGPT's is 1")
    if panels[0].lines:
        handles = panels[0].get_legend_handles_labels()
        where = {"loc": "outside lower center", "ncols": 2}
        figure.legend(*handles, **where, frameon=False, fontsize=8)
    common.save(figure, path)


MEASURED = ("tokens", "seconds", "peak_memory_bytes", "held_out_loss")


def main() -> None:
    parser = common.parser_of(__doc__)
    common.add_texts(parser)
    parser.add_argument(
        "--unseen", action="store_true", help="only those without a piece of the calibration text"
    )
    parser.add_argument("--seed", type=int, default=0)
    names = list(dict.fromkeys(run.name for run in runs()))
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="names of rows")
    parser.add_argument("--windows", type=positive, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--bigbench", type=Path, metavar="FILE", help="bigbench-1.0.0.tar.gz")
    parser.add_argument("--cache", type=Path, default=common.CACHE, metavar="FOLDER")
    common.add_output(parser)
    arguments = parser.parse_args()
    calibration, seed, cache = arguments.calibration, arguments.seed, arguments.cache
    count, unseen = arguments.evaluation_windows, arguments.unseen

    def key_of(run: Run) -> dict[str, object]:
        return {
            "run": run.name,
            "distinct_tokens": run.distinct_tokens,
            "seed": seed,
            "calibration": calibration.stem,
            "evaluation_windows": f"{count} unseen" if unseen else count,
        }

    arguments.output.mkdir(parents=True, exist_ok=True)
    path, texts = arguments.output / "refine.csv", [text.stem for text in arguments.texts]
    answers = [] if arguments.bigbench is None else ["right_answers"]
    rows = common.read_rows(path, [*key_of(runs()[0]), *MEASURED, *texts, *answers])
    questions = read_questions(arguments.bigbench, QUESTIONS) if answers else None
    dense = dense_model(cache)
    evaluated = {
        text.stem: evaluated_windows(dense, text, count, calibration, unseen)
        for text in arguments.texts
    }
    for run in runs():
        if run.name not in arguments.only or common.has_row(rows, key_of(run)):
            continue
        if run.windows and run.windows not in arguments.windows:
            continue
        model = Made(str(dense.path))
        if run.base in BASES:
            model = alone(pruned_model, run.base, calibration, seed, cache)
        if run.refinement is not None:
            model = alone(refined_model, run, model.folder, calibration, seed, cache)
        found, peak = alone(evaluate, model.folder, evaluated, questions)
        peak = max(peak, model.peak_memory_bytes)
        numbers = model.tokens, model.seconds, peak, model.held_out_loss
        measured = dict(zip(MEASURED, numbers, strict=True))
        rows = common.add_row(path, key_of(run) | measured | found)
    print_table(rows, texts)
    tokenizer = dense.load_tokenizer()
    for name, windows in evaluated.items():
        share = share_seen(tokenizer.decode(windows.ravel()), read_text(calibration))
        print(f"{share:.0%} of what is evaluated of {name} is in {calibration.name}")
    draw(rows, texts, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
