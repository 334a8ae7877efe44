"""Perplexity of SmolLM2-135M-Instruct pruned to 2:4 and then refined, against tokens and seconds.

    python benchmarks/refine.py

The seed draws the order of the windows of 512 tokens of the calibration text. A mask is found on
the first 64 windows, or on the first 320. Refinements see these windows and later ones. Each job
has its own process, for its peak memory. Each run appends a line to FOLDER/refine.csv. A run that
has its line is skipped, so the same command continues an interrupted one.

Pruned and refined models are kept in the folder `models` of the cache. --unseen and
--evaluation-windows evaluate them again. With --bigbench FILE every model also answers the
questions of multiple_choice.py. The script prints the table of the same texts, windows and seed.
The line below the table says how much of the evaluated text is in the calibration text too. gap.py
draws the figure from the file.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
from common import CONVERGED, WITHOUT_BASIS, Rows, own_targets, positive
from multiple_choice import Question, accuracies, read_questions

import prox24
from prox24 import BlockRefinement, ModelRefinement, Recipe
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs.documents import plain_text
from prox24._jobs.output import peak_memory_bytes
from prox24._jobs.text import calibration_windows

LENGTH = 512
WINDOWS = 64
QUESTIONS = 250
"""Of each task."""
PIECE = 60
"""Characters that are looked for together."""
MEASURED = ("tokens", "seconds", "peak_memory_bytes", "held_out_loss")

DEFAULT = "admm, dense targets"
REFINED = {
    "sparsegpt + refit": own_targets(prox24.SparseGPT(), CONVERGED),
    DEFAULT: WITHOUT_BASIS,
}
"""What is refined, as blocks and as a whole."""
BASES = {
    "sparsegpt": Recipe.sparsegpt(),
    "prox, no refit": own_targets(prox24.ProximalGradient()),
    **REFINED,
}
LONG_STEPS = BlockRefinement(step_tokens=2048)
# Passes over 56 windows see about as many tokens as one pass over 64, 256 and 1,024 windows.
BASES |= {
    f"{base} + block, bfloat16, passes: {passes}": replace(
        recipe, refine=replace(LONG_STEPS, passes=passes, compute_dtype="bfloat16")
    )
    for passes in (1, 5, 18)
    for base, recipe in REFINED.items()
}
BLOCKWISE = {
    f"{DEFAULT} + block, passes: 5": replace(WITHOUT_BASIS, refine=LONG_STEPS),
    f"{DEFAULT} + block, bfloat16, short steps, passes: 5": replace(
        WITHOUT_BASIS, refine=BlockRefinement(compute_dtype="bfloat16")
    ),
}
"""What is refined as blocks, and then as a whole."""
TURNED = "heads turned + block, bfloat16, short steps, passes: 5"
"""Today's default, refined as blocks, and then as a whole."""
BASES |= BLOCKWISE | {TURNED: Recipe(refine=BlockRefinement(compute_dtype="bfloat16"))}
TWICE = "heads turned + block, bfloat16, short steps, passes: 10"
"""About as many seconds as `TURNED` and then training the model on 256 windows."""
BASES |= {TWICE: Recipe(refine=BlockRefinement(compute_dtype="bfloat16", passes=10))}
WIDE = "heads turned + block, bfloat16, short steps, windows: 320"
"""As many steps as `TURNED`, in one pass over distinct text."""
BASES |= {WIDE: Recipe(refine=BlockRefinement(compute_dtype="bfloat16", passes=1))}

IN_BFLOAT16 = ModelRefinement(rate=5e-4, compute_dtype="bfloat16")
MIXED = ModelRefinement(rate=5e-4, cross_entropy=0.6)
TRIED = {
    64: [ModelRefinement(rate=rate) for rate in (5e-4, 1e-3, 2e-3)],
    256: [ModelRefinement(rate=5e-4)],
    1024: [MIXED, replace(MIXED, compute_dtype="bfloat16", passes=2)],
}
"""By the number of windows, of the default mask."""
OF_TURNED = [IN_BFLOAT16, ModelRefinement(compute_dtype="bfloat16")]
LONGEST = 892
"""Two passes over these windows end below 1,000,000 tokens, those of the blocks included."""
IN_AN_HOUR = 1024
"""Pruning with blocks over 320 windows, and then one pass over these, take about one hour."""
DISTINCT = (1261, 427), (128, 128)
"""Windows of the calibration text, and windows that the dense model writes.

One pass over the first pair takes about as many steps as two passes over `LONGEST`. One pass over
the second takes about as many as the training on 256 windows of the text.
"""


def windows_of_mask(base: str) -> int:
    """The number of windows that a model of this name is pruned on."""
    return 0 if base == "dense" else 5 * WINDOWS if base == WIDE else WINDOWS


class Run(NamedTuple):
    """One line of the table: a pruned model, its training, and the number of windows."""

    name: str
    base: str
    windows: int = 0
    refinement: ModelRefinement | None = None
    written: int = 0
    """Further windows, which the dense model writes."""

    @property
    def distinct_tokens(self) -> int:
        """The number of tokens in the windows of the mask and of the training."""
        return (max(windows_of_mask(self.base), self.windows) + self.written) * LENGTH


def changed(refinement: ModelRefinement) -> str:
    """The settings that differ from the defaults. Passes change only the tokens, and come last."""
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
    refined = [(DEFAULT, windows, one) for windows, tried in TRIED.items() for one in tried]
    refined += itertools.product((*REFINED, *BLOCKWISE), TRIED, [IN_BFLOAT16])
    refined += [(TURNED, 256, one) for one in OF_TURNED]
    refined += [(TURNED, LONGEST, replace(one, passes=2)) for one in OF_TURNED]
    refined += [(WIDE, windows, OF_TURNED[1]) for windows in (256, IN_AN_HOUR)]
    distinct = replace(OF_TURNED[1], held_out=0.01)
    name = f"{WIDE} + model, {changed(distinct)}, written: "
    return [
        Run("dense", "dense"),
        *(Run(base, base) for base in BASES),
        *(Run(f"{base} + model", base, WINDOWS, ModelRefinement()) for base in REFINED),
        *(Run(f"{base} + model, {changed(one)}", base, n, one) for base, n, one in refined),
        *(Run(f"{name}{written}", WIDE, own, distinct, written) for own, written in DISTINCT),
    ]


def made(
    job: Callable[..., Any], models: list[Path], settings: Any, windows: np.ndarray, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """A model that a job of prox24 made of others, and its report; made if it is not there yet."""
    given = repr(([model.name for model in models], settings)).encode() + windows.tobytes()
    folder = folder.with_name(f"{folder.name}-{hashlib.sha256(given).hexdigest()[:8]}")
    report = folder.with_name(f"{folder.name}.json")
    if not report.exists():
        folder.parent.mkdir(exist_ok=True)
        text = "calibration" if job is prox24.prune else "text"
        done = common.alone(job, *models, folder, settings, **{text: windows}, overwrite=True)
        report.write_text(done.to_json())
    return folder, json.loads(report.read_text())


def model_of(run: Run, dense: Path, windows: np.ndarray, cache: Path) -> tuple[Path, list[Any]]:
    """The model of a run, and how it was made: what is `MEASURED`, of the last job alone."""
    if run.base == "dense":
        return dense, [0, 0.0, 0, math.nan]
    recipe, folder = replace(BASES[run.base], dtype="float32"), cache / "models"
    of_mask = windows[: windows_of_mask(run.base)]
    pruned, report = made(prox24.prune, [dense], recipe, of_mask, folder / run.base)
    if run.refinement is not None:
        given, text = [dense, pruned], windows[: run.windows]
        if run.written:
            text = with_written(dense, text, run.written, folder)
        trained, report = made(prox24.distill, given, run.refinement, text, folder / run.name)
        losses = [loss for loss in report["losses"] if loss is not None]
        figures = report["tokens"], report["seconds"], report["peak_memory_bytes"], min(losses)
        return trained, [*figures]
    tokens, block = 0, report["linears"][0]["refinement"]
    if recipe.refine is not None:
        tokens = block["steps"] * recipe.refine.step_windows(len(of_mask), LENGTH) * LENGTH
    return pruned, [tokens, report["seconds"], report["peak_memory_bytes"], math.nan]


def with_written(dense: Path, windows: np.ndarray, count: int, folder: Path) -> np.ndarray:
    """Windows of a text, shuffled with `count` windows that the dense model writes.

    The last windows, which a training holds out, stay at the end: they are of the text.
    """
    path = folder / f"written-{count}.npy"
    if not path.exists():
        text = prox24.Text(f"generate:{count}", sequence_length=LENGTH)
        folder.mkdir(exist_ok=True)
        np.save(path, calibration_windows(open_checkpoint(dense), text))
    held_out = max(3, len(windows) // 64)  # At least as many as the trainings hold out.
    mixed = np.concatenate([windows[:-held_out], np.load(path)])
    return np.concatenate([np.random.default_rng(0).permutation(mixed), windows[-held_out:]])


def evaluate(
    model: Path, texts: dict[str, np.ndarray], questions: dict[str, list[Question]] | None
) -> tuple[dict[str, float], int]:
    """The model on the windows of every text, and on the questions; and the peak memory."""
    found = common.perplexities(model, texts)
    if questions is not None:
        found["right_answers"] = float(np.mean(list(accuracies(model, questions).values())))
    return found, peak_memory_bytes()


def gaps(rows: Rows, texts: list[str]) -> list[float]:
    """The gap of each row to dense, in log-perplexity of all texts, as a share of SparseGPT's."""
    logs = [sum(math.log(float(row[text])) for text in texts) for row in rows]
    named = {row["run"]: log for row, log in zip(rows, logs, strict=True)}
    dense, reference = (named.get(name, math.nan) for name in ("dense", "sparsegpt"))
    return [(log - dense) / (reference - dense) for log in logs]


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
    common.show(("method", *(f"{text} (gap)" for text in texts), *titles), lines)


def share_seen(text: str, calibration: str) -> float:
    """The share of a text's pieces that the calibration text has. White space counts as a blank."""
    text, calibration = (" ".join(part.split()) for part in (text, calibration))
    pieces = [text[i : i + PIECE] for i in range(0, len(text) - PIECE + 1, PIECE)]
    return float(np.mean([piece in calibration for piece in pieces]))


def evaluated_windows(
    dense: Path, text: Path, count: int, calibration: Path, unseen: bool
) -> np.ndarray:
    """The first windows of a text; if `unseen`, without windows that share a piece with the mix."""
    if not unseen:
        return common.windows_of(dense, text, count, LENGTH)
    windows, seen = common.windows_of(dense, text, None, LENGTH), plain_text(calibration)
    tokenizer = open_checkpoint(dense).load_tokenizer()
    found = (one for one in windows if share_seen(tokenizer.decode(one), seen) == 0)
    chosen = list(itertools.islice(found, count))
    if len(chosen) < count:
        raise SystemExit(f"{text} has {len(chosen)} windows that are not in {calibration}")
    return np.stack(chosen)


def lines_of(rows: Rows, texts: list[str]) -> dict[str, list[tuple[float, float, float]]]:
    """Tokens, seconds and gap of a pruned model and its refinements, by the name of the line."""
    points = {
        (row["run"], row["distinct_tokens"]): np.array(
            [float(row["tokens"]), float(row["seconds"]), gap]
        )
        for row, gap in zip(rows, gaps(rows, texts), strict=True)
    }
    lines: dict[str, list[np.ndarray]] = {}
    for (name, _), point in points.items():
        start, _, last = name.rpartition(" + ")
        before = points.get((start, str(windows_of_mask(start) * LENGTH)))
        if before is None or not last.startswith(("block", "model")):
            continue
        # A model is refined after it is pruned, its blocks while it is.
        begun = before * (1, 1, 0) if last.startswith("model") else 0
        # Runs that differ in their tokens alone share a line.
        label = re.sub(r", (passes|written): \d+$", "", name)
        lines.setdefault(label, [before]).append(point + begun)
    return {label: sorted(map(tuple, found)) for label, found in lines.items()}


def main() -> None:
    parser = common.parser_of(__doc__)
    common.add_texts(parser)
    parser.add_argument(
        "--unseen", action="store_true", help="only those without a piece of the calibration text"
    )
    parser.add_argument("--seed", type=int, default=0)
    names = list(dict.fromkeys(run.name for run in runs()))
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="names of rows")
    given = sorted({run.windows for run in runs()} - {0})
    parser.add_argument("--windows", type=positive, nargs="+", default=given)
    parser.add_argument("--bigbench", type=Path, metavar="FILE", help="bigbench-1.0.0.tar.gz")
    parser.add_argument("--cache", type=Path, default=common.CACHE, metavar="FOLDER")
    common.add_output(parser)
    arguments = parser.parse_args()
    calibration, cache, unseen = arguments.calibration, arguments.cache, arguments.unseen
    count = arguments.evaluation_windows
    setting = {
        "seed": str(arguments.seed),
        "calibration": common.name_of(calibration),
        "evaluation_windows": f"{count} unseen" if unseen else str(count),
    }
    path, texts = arguments.output / "refine.csv", list(map(common.name_of, arguments.texts))
    answers = [] if arguments.bigbench is None else ["right_answers"]
    titles = ["run", "distinct_tokens", *setting, *MEASURED, *texts, *answers]
    common.read_rows(path, titles)  # Other titles are found before the work.
    questions = read_questions(arguments.bigbench, QUESTIONS) if answers else None
    dense = common.dense_model(cache)
    evaluated = {
        common.name_of(text): evaluated_windows(dense, text, count, calibration, unseen)
        for text in arguments.texts
    }
    available = common.windows_of(dense, calibration, None, LENGTH)

    def measured(run: Run) -> dict[str, Any]:
        needed = max(windows_of_mask(run.base), run.windows)
        drawn = common.drawn_windows(available, needed, arguments.seed)
        model, figures = model_of(run, dense, drawn, cache)
        found, peak = common.alone(evaluate, model, evaluated, questions)
        own = dict(zip(MEASURED, figures, strict=True))
        return own | {"peak_memory_bytes": max(peak, own["peak_memory_bytes"])} | found

    sizes = (0, *arguments.windows)
    chosen = [run for run in runs() if run.name in arguments.only and run.windows in sizes]
    keys = [{"run": run.name, "distinct_tokens": run.distinct_tokens} for run in chosen]
    lines = [(key | setting, (run,)) for key, run in zip(keys, chosen, strict=True)]
    rows = common.completed(path, titles, lines, measured)
    rows = [row for row in rows if row.items() >= setting.items()]
    print_table(rows, texts)
    tokenizer = open_checkpoint(dense).load_tokenizer()
    for name, windows in evaluated.items():
        share = share_seen(tokenizer.decode(windows.ravel()), plain_text(calibration))
        print(f"{share:.0%} of what is evaluated of {name} is in {calibration.name}")


if __name__ == "__main__":
    main()
