"""Perplexity by `prox24 eval` and by PyTorch: seconds, CPU seconds and peak memory of the commands.

    prox24 convert .cache/SmolLM2-135M-Instruct.Q4_1.gguf smol
    python benchmarks/torch_eval.py smol --repetitions 5

Both compute in float32. Run it without torchax: with it, prox24 imports PyTorch too.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

NOVEL = Path(__file__).parents[1] / "prox24/data/austen.txt"


def torch_perplexity(folder, samples, length):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = NOVEL.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: samples * length].view(samples, length)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    total = 0.0
    with torch.inference_mode():
        for window in windows:
            logits = model(window[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (windows.numel() - samples))


def measured(command):
    """The perplexity that a command prints as JSON, its seconds, CPU seconds and peak in GB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    seconds = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime
    return json.loads(printed)["perplexity"], seconds, cpu, usage.ru_maxrss * 1024 / 1e9


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="HF folder")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="compute by PyTorch, and print JSON")
    given = parser.parse_args()
    if given.once:
        found = torch_perplexity(given.model, given.samples, given.sequence_length)
        print(json.dumps({"perplexity": found}))
        return
    sizes = ["--samples", str(given.samples), "--sequence-length", str(given.sequence_length)]
    commands = {
        "prox24 eval": [sys.executable, "-m", "prox24", "eval", given.model, *sizes, "--json"],
        "PyTorch": [sys.executable, __file__, given.model, *sizes, "--once"],
    }
    runs = {name: [] for name in commands}
    for _ in range(given.repetitions):  # in turn, so that other work meets both
        for name, command in commands.items():
            runs[name].append(measured(command))
    print(f"{'':12}  perplexity  seconds  CPU s  peak GB")
    for name, found in runs.items():
        perplexity, seconds, cpu, peak = map(statistics.median, zip(*found, strict=True))
        print(f"{name:12}  {perplexity:10.3f}  {seconds:7.1f}  {cpu:5.1f}  {peak:7.2f}")


if __name__ == "__main__":
    main()
