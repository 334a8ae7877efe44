"""Logits of SmolLM2-135M-Instruct against PyTorch's, in float32 and in float64.

    python benchmarks/parity.py

On the first windows of the packaged novel. A token agrees if all of its logits do, to 1e-4. "Exact
products" are prox24's with every product of a linear in float64, rounded to float32 once.
"""

import tempfile
from pathlib import Path
from unittest import mock

import common
import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

import prox24
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24._models import decoder

AGREEMENT = 1e-4


def exact_linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`decoder.linear`, rounded once."""
    y = jnp.einsum("bti,oi->bto", x.astype(jnp.float64), weight.astype(jnp.float64))
    return y.astype(jnp.float32)


def torch_logits(folder: Path, windows: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Shape (windows, length, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.from_numpy(windows).long()).logits.numpy()


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--windows", type=common.positive, default=6)
    parser.add_argument("--length", type=common.positive, default=40)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    path = common.dense_model()
    windows = common.windows_of(path, None, arguments.windows, arguments.length)
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model"
        write_checkpoint(open_checkpoint(path), written)
        for dtype in ("float32", "float64"):
            logits[f"PyTorch {dtype}"] = torch_logits(written, windows, getattr(torch, dtype))
    apply, params, _ = prox24.load(path)
    logits["prox24"] = np.asarray(jax.jit(apply)(params, windows))
    jax.clear_caches()
    with mock.patch.object(decoder, "linear", exact_linear):
        logits["exact products"] = np.asarray(jax.jit(apply)(params, windows))
    rows = []
    pairs = [(ours, theirs) for ours in ("prox24", "exact products") for theirs in list(logits)[:2]]
    for names in (*pairs, list(logits)[:2]):
        found, expected = (logits[name] for name in names)
        worst = np.abs(found - expected).max(axis=-1)
        agree = f"{np.sum(worst <= AGREEMENT)} of {worst.size}"
        relative = worst.max() / np.abs(expected).max()
        rows.append((", ".join(names), f"{worst.max():.2e}", f"{relative:.1e}", agree))
    common.show(("", "largest difference", "of the largest logit", "tokens that agree"), rows)


if __name__ == "__main__":
    main()
