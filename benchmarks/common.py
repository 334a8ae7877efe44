"""What the benchmarks share: arguments, tables, files of results, timing, models and texts.

The benchmarks take what prox24 does not export at its top from here, so that its modules are named
in one place.
"""

import argparse
import csv
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from prox24.cli.output import peak_memory_bytes
from prox24.cli.windows import calibration_windows, evaluation_windows
from prox24.pipeline import PrunedTensor, collect, gather_grams, prune
from rich.console import Console
from rich.table import Table

from prox24 import ConjugateGradients, LayerProblem
from prox24.checkpoints.checkpoint import Checkpoint, open_checkpoint
from prox24.checkpoints.safetensors_file import create_file
from prox24.checkpoints.tensors import Spec, TensorSource
from prox24.checkpoints.writer import write_checkpoint
from prox24.cli.demo_model import fetch_model
from prox24.cli.generate import decoding_rate
from prox24.jobs.distill import ModelRefinement, MovingMask, distill
from prox24.jobs.forward import (
    embed_windows,
    embedding_weights,
    head_weights,
    layer_linears,
    layer_weights,
    load_model,
    run_in_place,
)
from prox24.jobs.perplexity import perplexity, token_losses
from prox24.jobs.text import (
    first_windows,
    packaged_text,
    read_text,
    spread_windows,
    tokenize,
)
from prox24.models import decoder
from prox24.models.families import config_from_hf
from prox24.models.generate import ModelWeights, generate
from prox24.refine import BlockRefinement
from prox24.solvers.problem import DEFAULT_PULL
from prox24.solvers.solve import Refit, Solver

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = [
    "BlockRefinement",
    "Checkpoint",
    "ModelRefinement",
    "ModelWeights",
    "MovingMask",
    "PrunedTensor",
    "Refit",
    "Solver",
    "calibration_windows",
    "collect",
    "config_from_hf",
    "decoder",
    "decoding_rate",
    "distill",
    "embed_windows",
    "embedding_weights",
    "evaluation_windows",
    "generate",
    "head_weights",
    "layer_weights",
    "load_model",
    "open_checkpoint",
    "peak_memory_bytes",
    "perplexity",
    "plt",
    "prune",
    "read_text",
    "run_in_place",
    "token_losses",
    "write_checkpoint",
]

CACHE = Path(".cache")
CONVERGED = ConjugateGradients(100, 1e-6)
"""A refit that ends at the optimum, for baselines."""
PULL = DEFAULT_PULL
"""Of dense targets."""

Result = TypeVar("Result")
Rows = list[dict[str, str]]


# Arguments, tables, files


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def add_texts(parser: argparse.ArgumentParser) -> None:
    """The calibration text and those that perplexity is measured on."""
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--evaluation-windows", type=positive, default=16)


def positive(text: str) -> int:
    """A type of arguments."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def show(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    title: str | None = None,
    width: int = 120,
) -> None:
    """Prints a table; its first columns are words, on the left, and the others numbers."""
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(titles):
        table.add_column(
            name, justify="left" if place < left else "right", no_wrap=place < left or None
        )
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def write_json(path: Path | None, figures: object) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def environment() -> dict[str, str]:
    """What times depend on."""
    found = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    if torch := sys.modules.get("torch"):
        cuda = torch.cuda.is_available()
        found["torch"] = torch.__version__
        found["torch device"] = torch.cuda.get_device_name() if cuda else "cpu"
        found["torch threads"] = str(torch.get_num_threads())
    return found


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


def add_row(path: Path, row: Mapping[str, object]) -> Rows:
    """Appends a line, and the titles before the first; all lines that are there then."""
    rows = read_rows(path, row)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0] if rows else row))
        if not rows:
            writer.writeheader()
        writer.writerow(row)
    return read_rows(path, row)


def has_row(rows: Rows, key: Mapping[str, object]) -> bool:
    """Whether a run was measured before."""
    return any(all(row[name] == str(value) for name, value in key.items()) for row in rows)


def save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# Time


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds, and the result."""
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - began, result


def medians(
    contenders: Mapping[str, Callable[[], Any]],
    repetitions: int,
    slow: Collection[str] = (),
    slow_repetitions: int = 3,
) -> dict[str, float]:
    """Median seconds of each contender, which all have run before.

    Each repetition runs every contender once, and starts one further than the last, so that a
    change in the machine's speed meets all of them. Slow ones take part in the first repetitions.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            if name not in slow or repetition < slow_repetitions:
                seconds[name].append(timed(contenders[name])[0])
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


def write_llama(
    folder: Path, config: dict[str, Any], dtype: Any, rng: np.random.Generator | None
) -> int:
    """A checkpoint of random weights, or of holes where there is no `rng`; bytes of the weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": np.dtype(dtype).name}))
    shapes = decoder.tensor_shapes(config_from_hf(config, ()))
    specs = {name: Spec(shape, np.dtype(dtype)) for name, shape in shapes.items()}
    with create_file(folder / "model.safetensors", specs) as put:
        for name, shape in shapes.items():
            if rng is not None:
                put(name, rng.standard_normal(shape, np.float32) * np.float32(0.02))
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for shape in shapes.values())


def dense_model(cache: Path = CACHE) -> Checkpoint:
    """SmolLM2-135M-Instruct."""
    cache.mkdir(parents=True, exist_ok=True)
    return open_checkpoint(fetch_model(cache))


def token_ids(model: Checkpoint, text: Path | None) -> np.ndarray:
    """Of a text, or of the packaged speeches."""
    words = packaged_text("speeches.txt") if text is None else read_text(text)
    return tokenize(model.load_tokenizer(), words, model.config["vocab_size"])


def windows_of(
    model: Checkpoint, text: Path | None, count: int | None, length: int, spread: bool = False
) -> np.ndarray:
    """The first windows of a text, all that are whole if None; or windows spread over it."""
    choose = spread_windows if spread else first_windows
    return choose(token_ids(model, text), count, length)


def drawn_windows(ids: np.ndarray, windows: int, length: int, seed: int) -> np.ndarray:
    """Windows drawn without replacement; fewer are a subset of more."""
    available = first_windows(ids, None, length)
    if len(available) < windows:
        first_windows(ids, windows, length)  # Says what is missing.
    return available[np.random.default_rng(seed).permutation(len(available))[:windows]]


def with_tensors(model: Checkpoint, tensors: Mapping[str, np.ndarray]) -> Checkpoint:
    """The checkpoint with some tensors replaced, in memory."""
    replaced = {
        name: TensorSource(value.shape, value.dtype, lambda value=value: value)
        for name, value in tensors.items()
    }
    return dataclasses.replace(model, tensors={**model.tensors, **replaced})


class LayerLinear(NamedTuple):
    """One linear of a model."""

    layer: int
    name: str
    problem: LayerProblem


def linears(
    model: Checkpoint, layers: Collection[int], windows: np.ndarray
) -> Iterator[LayerLinear]:
    """The linears of some layers with their Grams in the dense model."""
    loaded = load_model(model)
    hidden = list(embed_windows(loaded, windows))
    for index in range(max(layers) + 1):
        weights = layer_weights(loaded, index)
        if index in layers:
            grams = gather_grams(loaded, index, weights, hidden).grams
            for linear in layer_linears(loaded.config, index):
                weight = weights[linear.weight].astype(jnp.float32)
                problem = LayerProblem(weight, grams[linear.input].total)
                yield LayerLinear(index, linear.weight.removesuffix(".weight"), problem)
        run_in_place(loaded, index, weights, hidden)
