"""Tokens a second and resident memory of generation, for each form of the weights.

    python benchmarks/generate.py
    python benchmarks/generate.py --model FOLDER
    python benchmarks/generate.py --synthetic

The model is SmolLM2-135M-Instruct, or a checkpoint, or random weights in the shape of Llama-3.2-1B.
Each form of the weights has a process of its own, which goes on from the same prompt, and all forms
take turns --rounds times: printed are medians. The rate is that of all tokens but the first, which
is the prompt's, and the second, for which programs are compiled. Speed is that rate over the dense
form's in the same dtype, and its ceiling the bytes of all weights of the dense form over those of
the packed one. Resident memory is that of the process after the last token, on Linux.
"""

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import ModelWeights, decoder
from jax import Array

import prox24.packed

Weights = dict[str, Array]


def cast(dtype: Any, weights: Weights) -> Weights:
    return {name: w.astype(dtype) for name, w in weights.items()}


def packed(dtype: Any, weights: Weights) -> dict[str, Any]:
    """Cut to the two largest of each block, where the model is not 2:4 already."""

    def pack_linear(w: Array) -> prox24.packed.Packed24:
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
"""The weights of a layer, or of the embedding and head, in each form."""


def from_checkpoint(path: Path, form: Callable[[Weights], Weights]) -> tuple[Any, ModelWeights]:
    model = common.load_model(common.open_checkpoint(path))
    outer = form(common.embedding_weights(model) | common.head_weights(model))
    layers = range(len(model.config.layers))
    return model.config, ModelWeights(outer, [form(common.layer_weights(model, i)) for i in layers])


def synthetic(form: Callable[[Weights], Weights]) -> tuple[Any, ModelWeights]:
    config = common.config_from_hf(common.llama(2048, 8192, 16, 32, tie_word_embeddings=True))
    rng = np.random.default_rng(0)

    def random(shapes: dict[str, tuple[int, ...]]) -> Weights:
        return form(
            {
                name: jnp.asarray(np.float32(0.02) * rng.standard_normal(shape, np.float32))
                for name, shape in shapes.items()
            }
        )

    outer = random(decoder.embedding_shapes(config) | decoder.head_shapes(config))
    return config, ModelWeights(outer, [random(decoder.layer_shapes(x)) for x in config.layers])


def measure(form: str, path: Path | None, prompt: int, tokens: int) -> dict[str, Any]:
    """One line of the table; without a path, of the synthetic model."""
    make = FORMS[form]
    config, weights = synthetic(make) if path is None else from_checkpoint(path, make)
    ids = np.random.default_rng(1).integers(0, config.vocabulary, (1, prompt))
    times = [time.perf_counter()]
    for _ in common.generate(config, weights, ids, tokens):
        times.append(time.perf_counter())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "form": form,
        "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "peak_bytes": common.peak_memory_bytes(),
        "first_token_seconds": times[1] - times[0],
        "second_token_seconds": times[2] - times[1],
        "tokens_per_second": common.decoding_rate(times),
    }


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of several of the same form."""
    numbers = {key: statistics.median(row[key] for row in rounds) for key in list(rounds[0])[1:]}
    return {"form": rounds[0]["form"], **numbers}


def ratio(rows: list[dict[str, Any]], row: dict[str, Any], of: str) -> float:
    """Of a packed form's figure to that of the dense form in its dtype; NaN if that did not run."""
    dtype, is_packed, _ = row["form"].partition(", packed")
    dense = [other[of] for other in rows if is_packed and other["form"] == dtype]
    return row[of] / dense[0] if dense else math.nan


def cells(rows: list[dict[str, Any]], row: dict[str, Any]) -> tuple[str, ...]:
    sizes = [f"{row[f'{name}_bytes'] / 1e9:.2f}" for name in ("weights", "resident", "peak")]
    seconds = [f"{row[f'{which}_token_seconds']:.1f}" for which in ("first", "second")]
    speed, bytes_left = (ratio(rows, row, of) for of in ("tokens_per_second", "weights_bytes"))
    shares = ["" if math.isnan(share) else f"{share:.2f}" for share in (speed, 1 / bytes_left)]
    return row["form"], *sizes, *seconds, f"{row['tokens_per_second']:.2f}", *shares


def main() -> None:
    parser = common.parser_of(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="as the commands of prox24 take it")
    source.add_argument("--synthetic", action="store_true", help="random weights of Llama-3.2-1B")
    parser.add_argument("--form", choices=FORMS, action="append", help="all by default")
    parser.add_argument("--prompt", type=common.positive, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=common.positive, default=64, help="three or more")
    parser.add_argument("--rounds", type=common.positive, default=3, help="of all forms (3)")
    common.add_json(parser)
    arguments = parser.parse_args()
    if arguments.tokens < 3:
        parser.error(f"argument --tokens: {arguments.tokens} are too few to measure")
    path = arguments.model
    if path is None and not arguments.synthetic:
        path = common.dense_model().path
    forms = list(arguments.form or FORMS)
    rounds = []
    for form in arguments.rounds * forms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rounds.append(pool.apply(measure, (form, path, arguments.prompt, arguments.tokens)))
    rows = [median_of(rounds[place :: len(forms)]) for place in range(len(forms))]
    common.write_json(arguments.json, rows)
    titles = "weights", "GB", "resident, GB", "peak, GB", "first s", "second s", "tokens / s"
    common.show((*titles, "speed", "ceiling"), [cells(rows, row) for row in rows])


if __name__ == "__main__":
    main()
