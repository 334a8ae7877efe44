"""Tokens a second and resident memory of generation, for each form of the weights.

    python benchmarks/generate.py
    python benchmarks/generate.py --model FOLDER
    python benchmarks/generate.py --synthetic

The model is SmolLM2-135M-Instruct, or a checkpoint, or random weights in the shape of Llama-3.2-1B.
Each form of the weights continues the same prompt in its own process. The forms take turns --rounds
times, and the table has medians.

The rate leaves out two tokens: the first ends the prompt, and the second compiles programs. Speed
is a packed form's rate over the dense form's in the same dtype. Its ceiling is the dense form's
bytes over the packed form's, of all weights. Resident memory is measured after the last token, on
Linux.
"""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import prox24
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._cli.generate import decoding_rate
from prox24._jobs.forward import all_weights, load_model
from prox24._models.generate import generate
from prox24.packed import Packed24, pack

FORMS = [f"{dtype}{form}" for dtype in ("float32", "bfloat16") for form in ("", ", packed")]
SHAPE = common.llama(2048, 8192, 16, 32, tie_word_embeddings=True)
"""Of --synthetic."""
PROMPT = 32
"""Tokens."""


def cut_and_pack(weight: jax.Array) -> Packed24:
    """The two largest of each block, where the model is not 2:4 already."""
    return pack(jnp.where(prox24.top_mask(jnp.abs(weight)), weight, 0))


def measure(form: str, path: Path, tokens: int) -> tuple[float, float, float]:
    """Bytes of the weights, resident bytes, and tokens a second."""
    dtype, is_packed, _ = form.partition(", packed")
    model = load_model(open_checkpoint(path))
    weights = all_weights(model, np.dtype(dtype), pack_linear=cut_and_pack if is_packed else None)
    ids = np.random.default_rng(1).integers(0, model.config.vocabulary, (1, PROMPT))
    times = [time.perf_counter()]
    for _ in generate(model.config, weights, ids, tokens):
        times.append(time.perf_counter())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    return size, pages * os.sysconf("SC_PAGE_SIZE"), decoding_rate(times)


def cells(found: Mapping[str, Sequence[float]], form: str) -> tuple[str, ...]:
    """The cells of a line. Packed forms are compared with the dense form of their dtype."""
    size, resident, rate = found[form]
    row = form, f"{size / 1e9:.2f}", f"{resident / 1e9:.2f}", f"{rate:.2f}"
    dense_size, _, dense_rate = found[form.partition(", packed")[0]]
    shares = f"{rate / dense_rate:.2f}", f"{dense_size / size:.2f}"
    return (*row, *(shares if "packed" in form else ("", "")))


def main() -> None:
    parser = common.parser_of(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="as the commands of prox24 take it")
    source.add_argument("--synthetic", action="store_true", help="random weights of Llama-3.2-1B")
    parser.add_argument("--tokens", type=common.positive, default=64, help="three or more")
    parser.add_argument("--rounds", type=common.positive, default=3, help="of all forms (3)")
    arguments = parser.parse_args()
    if arguments.tokens < 3:
        parser.error(f"argument --tokens: {arguments.tokens} are too few to measure")
    rounds: dict[str, list[tuple[float, ...]]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        if arguments.synthetic:
            common.write_llama(path, SHAPE, ml_dtypes.bfloat16, np.random.default_rng(0))
        else:
            path = arguments.model or common.dense_model()
        for form in arguments.rounds * FORMS:
            rounds[form].append(common.alone(measure, form, path, arguments.tokens))
    found = {form: np.median(turns, axis=0) for form, turns in rounds.items()}
    titles = "weights", "GB", "resident, GB", "tokens / s", "speed", "ceiling"
    common.show(titles, [cells(found, form) for form in FORMS])


if __name__ == "__main__":
    main()
