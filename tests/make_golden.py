"""Writes tests/golden/ with PyTorch: `python tests/make_golden.py`. Run when a variant is added."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from tiny import VARIANTS, tokens, write_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

GOLDEN = Path(__file__).parent / "golden"


def torch_logits(model, token_ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(token_ids).long()).logits.float().numpy()


def torch_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "error_msgs"))
    return model.eval()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(Path(folder) / "model", variant)
            logits = torch_logits(torch_model(Path(folder) / "model"), tokens())
        # The last positions depend on all the others.
        np.save(GOLDEN / f"{variant}.npy", logits[:, -4:])


if __name__ == "__main__":
    main()
