"""Logits of SmolLM2-135M-Instruct against PyTorch's, in float32 and in float64.

    python benchmarks/parity.py

On the first windows of the packaged text. A token agrees if all of its logits do, to 1e-4. "Exact
products" are those of prox24 with every product of a linear in float64, rounded to float32 once.
"""

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from prox24.cli.windows import evaluation_windows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from prox24.checkpoints.checkpoint import Checkpoint, open_checkpoint
from prox24.checkpoints.writer import write_checkpoint
from prox24.cli.demo_model import fetch_model
from prox24.jobs.forward import embed_windows, head_weights, layer_weights, load_model, run_in_place
from prox24.models import decoder

jax.config.update("jax_enable_x64", True)

AGREEMENT = 1e-4


def our_logits(checkpoint: Checkpoint, windows: NDArray[np.int32]) -> NDArray[np.float32]:
    """Shape (windows, length, vocabulary)."""
    model = load_model(checkpoint)
    hidden = list(embed_windows(model, windows))
    for index in range(len(model.config.layers)):
        run_in_place(model, index, layer_weights(model, index), hidden)
    head = head_weights(model)
    return np.concatenate([decoder.logits(model.config, head, states) for states in hidden])


def exact_linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`decoder.linear`, rounded once."""
    y = jnp.einsum("bti,oi->bto", x.astype(jnp.float64), weight.astype(jnp.float64))
    return y.astype(jnp.float32)


def torch_logits(folder: Path, windows: NDArray[np.int32], dtype: torch.dtype) -> NDArray:
    """Shape (windows, length, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.from_numpy(windows).long()).logits.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=40)
    arguments = parser.parse_args()
    cache = Path(".cache")
    cache.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(fetch_model(cache))
    windows = evaluation_windows(checkpoint, None, arguments.windows, arguments.length)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(checkpoint, Path(folder) / "model")
        torch32, torch64 = (
            torch_logits(Path(folder) / "model", windows, dtype)
            for dtype in (torch.float32, torch.float64)
        )
    ours = our_logits(checkpoint, windows)
    jax.clear_caches()
    with mock.patch.object(decoder, "linear", exact_linear):
        exact = our_logits(checkpoint, windows)
    table = Table()
    for title in ("", "largest difference", "of the largest logit", "tokens that agree"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for title, a, b in (
        ("prox24, PyTorch float32", ours, torch32),
        ("prox24, PyTorch float64", ours, torch64),
        ("exact products, PyTorch float32", exact, torch32),
        ("exact products, PyTorch float64", exact, torch64),
        ("PyTorch float32, float64", torch32, torch64),
    ):
        worst = np.abs(a - b).max(axis=-1)
        agree = f"{np.sum(worst <= AGREEMENT)} of {worst.size}"
        table.add_row(title, f"{worst.max():.2e}", f"{worst.max() / np.abs(b).max():.1e}", agree)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
