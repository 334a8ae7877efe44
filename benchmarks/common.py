"""Shared by the benchmarks: arguments, tables, files of results, timing, models and texts."""

import argparse
import concurrent.futures
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import matplotlib
import numpy as np

import prox24
from prox24 import ConjugateGradients, Recipe, Text
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.safetensors_file import create_file
from prox24._checkpoints.tensors import TensorSource
from prox24._cli.demo_model import fetch_model
from prox24._cli.options import positive
from prox24._jobs.output import table
from prox24._jobs.text import evaluation_windows
from prox24._models.families import config_from_hf
from prox24._models.spec import tensor_shapes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CACHE = Path(".cache")
CALIBRATION, *TEXTS = (
    Path(__file__).with_name("data") / f"{name}.txt.gz" for name in ("calib_mix", "austen", "sotu")
)
"""What the tables of README.md are calibrated on, and what they measure perplexity on."""
WITHOUT_BASIS = dataclasses.replace(Recipe(), basis=None)
"""The default, but that heads are not turned: what was measured before they were."""
CONVERGED = ConjugateGradients(100, 1e-6)
"""A refit that ends at the optimum, for baselines."""

Result = TypeVar("Result")
Rows = list[dict[str, str]]


def own_targets(solver: Any, refit: Any = None) -> Recipe:
    """Each linear reproduces its own output on the pruned model's activations."""
    return Recipe(solver, refit, targets=None, basis=None)


# Arguments, tables, files


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the folder of the results. It is made at once, so a long run cannot fail for it."""
    parser.add_argument("--output", type=made_folder, default=Path(), metavar="FOLDER")


def made_folder(path: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def add_texts(parser: argparse.ArgumentParser) -> None:
    """The calibration text, and the texts that perplexity is measured on."""
    add_calibration(parser)
    parser.add_argument("--texts", type=Path, nargs="+", default=TEXTS, metavar="FILE")
    parser.add_argument("--evaluation-windows", type=positive, default=16)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration", type=Path, default=CALIBRATION, metavar="FILE", help="UTF-8 text"
    )


def show(titles: Iterable[str], rows: Iterable[Iterable[str]], title: str = "") -> None:
    """Prints a table; its first column is words."""
    if title:
        print(title)
    print(table([*titles], [*map(list, rows)]))


def environment() -> str:
    """What times depend on."""
    found = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    if torch := sys.modules.get("torch"):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        found += f", torch {torch.__version__}, {device}, {torch.get_num_threads()} threads"
    return found


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path, titles: Collection[str]) -> Rows:
    """The lines of an earlier command, if there are any.

    Raises:
      SystemExit: they have other titles.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or ())
        if set(found) != set(titles):
            sys.exit(f"{path} has {', '.join(found)}, not {', '.join(titles)}: move it away")
        return list(reader)


def completed(
    path: Path,
    titles: Collection[str],
    runs: Iterable[tuple[Mapping[str, object], tuple[Any, ...]]],
    measure: Callable[..., Mapping[str, object]],
) -> Rows:
    """All lines of a file, after each run has one.

    A run is the key of its line and the arguments of `measure`, which finds the other columns. A
    run whose key has a line is skipped. Others append theirs at once, so that an interrupted
    command can be given again.

    Raises:
      SystemExit: the file has other titles.
    """
    rows = read_rows(path, titles)
    for key, given in runs:
        if any(all(row[name] == str(value) for name, value in key.items()) for row in rows):
            continue
        found = {**dict.fromkeys(titles, ""), **key, **measure(*given)}
        if rows:
            with path.open("a", newline="") as file:
                csv.DictWriter(file, list(rows[0]), lineterminator="\n").writerow(found)
        else:
            write_rows(path, [found])
        rows = read_rows(path, titles)
    return rows


def alone(function: Callable[..., Result], *arguments: object, **more: object) -> Result:
    """In a process of its own, which nothing else has used."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments, **more).result()


def save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# Time


def timed(run: Callable[[], Result], waking: float = 0.0) -> tuple[float, Result]:
    """Seconds of the first run that begins `waking` seconds after the call, and its result."""
    awake = time.perf_counter() + waking
    while True:
        began = time.perf_counter()
        result = jax.block_until_ready(run())
        if began >= awake:
            return time.perf_counter() - began, result


def medians(
    contenders: Mapping[str, Callable[[], Any]],
    repetitions: int,
    slow: Collection[str] = (),
    waking: float = 0.0,
) -> dict[str, float]:
    """Median seconds of each contender. All contenders have run before.

    Each repetition runs every contender once, in an order that begins with the next one. A change
    in the machine's speed then affects all contenders. Slow ones take part in the first three
    repetitions.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            if name not in slow or repetition < 3:
                seconds[name].append(timed(contenders[name], waking)[0])
    return {name: statistics.median(found) for name, found in seconds.items()}


# Models and texts


def llama(hidden: int, intermediate: int, layers: int, heads: int, **more: object) -> dict:
    """A config.json in the shape of Llama-3.1."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **more,
    }


LLAMAS = {
    "1B": llama(2048, 8192, 16, 32, head_dim=64),
    "8B": llama(4096, 14336, 32, 32, head_dim=128),
    "70B": llama(8192, 28672, 80, 64, head_dim=128),
}
"""Llama-3.2-1B, and Llama-3.1 of two sizes."""


def llama_linears(config: Mapping[str, Any]) -> dict[tuple[int, int], int]:
    """The shapes of the linears of a layer of `llama`, and their numbers."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    values = config["num_key_value_heads"] * config["head_dim"]
    return {
        (values, hidden): 2,
        (hidden, hidden): 2,
        (intermediate, hidden): 2,
        (hidden, intermediate): 1,
    }


def write_llama(
    folder: Path, config: dict[str, Any], dtype: Any, rng: np.random.Generator | None
) -> int:
    """A checkpoint of random weights, or of holes without `rng`; the bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": np.dtype(dtype).name}))
    shapes = tensor_shapes(config_from_hf(config, ()))
    specs = {name: TensorSource(shape, np.dtype(dtype)) for name, shape in shapes.items()}
    with create_file(folder / "model.safetensors", specs) as put:
        for name, shape in shapes.items():
            if rng is not None:
                values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
                put(name, values.astype(dtype))
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for shape in shapes.values())


def dense_model(cache: Path = CACHE) -> Path:
    """SmolLM2-135M-Instruct."""
    cache.mkdir(parents=True, exist_ok=True)
    return fetch_model(cache)


def windows_of(model: Path, text: Path | None, count: int | None, length: int) -> np.ndarray:
    """The first windows of a text or of the packaged novel; all whole ones if `count` is None."""
    return evaluation_windows(open_checkpoint(model), Text(text, count, length))


def name_of(text: Path) -> str:
    """How rows call a text: its file without suffixes."""
    return text.name.partition(".")[0]


def windows_of_texts(
    model: Path, texts: Sequence[Path], count: int, length: int
) -> dict[str, np.ndarray]:
    """The first windows of each text, by its name."""
    return {name_of(text): windows_of(model, text, count, length) for text in texts}


def perplexities(model: Path, texts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The perplexity of a model on the windows of each text, by its name."""
    return {name: prox24.perplexity(model, w).perplexity for name, w in texts.items()}


def drawn_windows(windows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Some windows, drawn without replacement; fewer are a subset of more.

    Raises:
      SystemExit: there are too few.
    """
    if len(windows) < count:
        sys.exit(f"the text has {len(windows)} windows of {windows.shape[1]} tokens, not {count}")
    return windows[np.random.default_rng(seed).permutation(len(windows))[:count]]
