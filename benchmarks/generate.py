"""Tokens a second and resident memory of generation, for each form of the weights.

    python benchmarks/generate.py
    python benchmarks/generate.py --model FOLDER
    python benchmarks/generate.py --synthetic

The model is SmolLM2-135M-Instruct, or a checkpoint, or random weights in the shape of Llama-3.2-1B.
Each form of the weights has a process of its own, which goes on from the same prompt,
and all forms take turns --rounds times: printed are medians. The rate is that of all tokens but the
first, which is the prompt's, and the second, for which programs are compiled. Speed is that rate
over the dense form's in the same dtype, and its ceiling the bytes of all weights of the dense form
over those of the packed one. Resident memory is what the process has after the last token, on
Linux.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from prox24.cli.output import peak_memory_bytes
from rich.console import Console
from rich.table import Table

import prox24.packed
from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.cli.demo_model import fetch_model
from prox24.cli.generate import decoding_rate
from prox24.jobs.forward import embedding_weights, head_weights, layer_weights, load_model
from prox24.models import decoder
from prox24.models.decoder import Config
from prox24.models.families import config_from_hf
from prox24.models.generate import ModelWeights, generate
from prox24.packed import Packed24

Weights = dict[str, Array]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def cast(dtype: Any, weights: Weights) -> Weights:
    return {name: w.astype(dtype) for name, w in weights.items()}


def packed(dtype: Any, weights: Weights) -> dict[str, Any]:
    """Cut to the two largest of each block, where the model is not 2:4 already."""

    def pack_linear(w: Array) -> Packed24:
        return prox24.packed.pack(jnp.where(prox24.top_mask(jnp.abs(w)), w, 0))

    return {
        name: pack_linear(w) if "_proj." in name and w.ndim == 2 else w
        for name, w in cast(dtype, weights).items()
    }


FORMS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "float32": partial(cast, jnp.float32),
    "float32, packed": partial(packed, jnp.float32),
    "bfloat16": partial(cast, jnp.bfloat16),
    "bfloat16, packed": partial(packed, jnp.bfloat16),
}
"""What is made of the weights of a layer, or of the embedding and head, when they are read."""


def from_checkpoint(path: Path, form: Callable[[Weights], Weights]) -> tuple[Config, ModelWeights]:
    model = load_model(open_checkpoint(path))
    outer = form(embedding_weights(model) | head_weights(model))
    layers = range(len(model.config.layers))
    return model.config, ModelWeights(outer, [form(layer_weights(model, i)) for i in layers])


def synthetic(form: Callable[[Weights], Weights]) -> tuple[Config, ModelWeights]:
    config, rng = config_from_hf(LLAMA), np.random.default_rng(0)

    def random(shapes: dict[str, tuple[int, ...]]) -> Weights:
        scale = np.float32(0.02)
        return form(
            {
                name: jnp.asarray(scale * rng.standard_normal(shape, np.float32))
                for name, shape in shapes.items()
            }
        )

    outer = random(decoder.embedding_shapes(config) | decoder.head_shapes(config))
    layers = [random(decoder.layer_shapes(layer)) for layer in config.layers]
    return config, ModelWeights(outer, layers)


def ratio(rows: list[dict[str, Any]], row: dict[str, Any], of: str) -> float:
    """Of a packed form's figure to that of the dense form in its dtype; NaN if that did not run."""
    dtype, of_packed, _ = row["form"].partition(", packed")
    dense = [other[of] for other in rows if of_packed and other["form"] == dtype]
    return row[of] / dense[0] if dense else math.nan


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table of several of the same form: the median of each number."""
    return {
        key: statistics.median(row[key] for row in rounds)
        if isinstance(value, int | float)
        else value
        for key, value in rounds[0].items()
    }


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(form: str, path: Path | None, prompt: int, tokens: int) -> dict[str, Any]:
    """One line of the table; without a path, of the synthetic model."""
    make = FORMS[form]
    config, weights = synthetic(make) if path is None else from_checkpoint(path, make)
    ids = np.random.default_rng(1).integers(0, config.vocabulary, (1, prompt))
    times = [time.perf_counter()]
    for _ in generate(config, weights, ids, tokens):
        times.append(time.perf_counter())
    return {
        "form": form,
        "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
        "resident_bytes": resident_bytes(),
        "peak_bytes": peak_memory_bytes(),
        "first_token_seconds": times[1] - times[0],
        "second_token_seconds": times[2] - times[1],
        "tokens_per_second": decoding_rate(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="as the commands of prox24 take it")
    source.add_argument("--synthetic", action="store_true", help="random weights of Llama-3.2-1B")
    parser.add_argument("--form", choices=FORMS, action="append", help="all by default")
    parser.add_argument("--prompt", type=int, default=32, help="random tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="to generate, three or more")
    parser.add_argument("--rounds", type=int, default=3, help="of all forms, one or more (3)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.tokens < 3:
        parser.error(f"argument --tokens: {arguments.tokens} are too few to measure")
    if arguments.rounds < 1:
        parser.error(f"argument --rounds: {arguments.rounds} is not positive")
    path = arguments.model
    if path is None and not arguments.synthetic:
        cache = Path(".cache")
        cache.mkdir(exist_ok=True)
        path = fetch_model(cache)
    forms = list(arguments.form or FORMS)
    rounds = []
    for form in arguments.rounds * forms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rounds.append(pool.apply(measure, (form, path, arguments.prompt, arguments.tokens)))
    rows = [median_of(rounds[place :: len(forms)]) for place in range(len(forms))]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    grid = Table()
    titles = ["GB", "resident, GB", "peak, GB", "first s", "second s", "tokens / s"]
    grid.add_column("weights", no_wrap=True)
    for title in (*titles, "speed", "ceiling"):
        grid.add_column(title, justify="right")
    for row in rows:
        sizes = ("weights_bytes", "resident_bytes", "peak_bytes")
        cells = [f"{row[name] / 1e9:.2f}" for name in sizes]
        seconds = [f"{row[f'{which}_token_seconds']:.1f}" for which in ("first", "second")]
        speed, bytes_left = (ratio(rows, row, of) for of in ("tokens_per_second", "weights_bytes"))
        shares = ["" if math.isnan(share) else f"{share:.2f}" for share in (speed, 1 / bytes_left)]
        rate = f"{row['tokens_per_second']:.2f}"
        grid.add_row(row["form"], *cells, *seconds, rate, *shares)
    Console(width=120).print(grid)


if __name__ == "__main__":
    main()
