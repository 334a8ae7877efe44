"""Perplexity by PyTorch alone, to time against `prox24 eval FOLDER --samples 16 --json`."""

import argparse
import json
import math
from pathlib import Path

import torch
import transformers

NOVEL = Path(__file__).parents[1] / "prox24/data/austen.txt"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="HF folder")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    text = NOVEL.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: arguments.samples * arguments.sequence_length].view(arguments.samples, -1)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    total = 0.0
    with torch.inference_mode():
        for window in windows:
            logits = model(window[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    tokens = windows.numel() - len(windows)
    print(json.dumps({"perplexity": math.exp(total / tokens), "predicted_tokens": tokens}))


if __name__ == "__main__":
    main()
