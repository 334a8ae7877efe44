"""Peak memory of `prox24 prune` on synthetic Llama checkpoints of more and more layers.

    python benchmarks/memory.py --layers 8 16 32
    python benchmarks/memory.py --layers 32 --limit 3000000000

A layer has 31 million random weights, 126 MB in float32. Each checkpoint is pruned by Wanda in a
process of its own, whose peak resident memory its report states. The second command has the kernel
end the process if it takes more than the limit, with what the kernel caches of its files, in a
memory cgroup of its own (which takes root).
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prox24.checkpoints.safetensors_file import create_file
from prox24.checkpoints.tensors import Spec
from prox24.models.decoder import tensor_shapes
from prox24.models.families import config_from_hf

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 2048,
    "intermediate_size": 2400,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, layers: int) -> int:
    """A checkpoint of random weights and a tokenizer of bytes; the bytes of the weights."""
    folder.mkdir()
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config_from_hf(config, ()))
    rng = np.random.default_rng(0)
    specs = {name: Spec(shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    with create_file(folder / "model.safetensors", specs) as put:
        for name, shape in shapes.items():
            put(name, rng.standard_normal(shape, np.float32) * np.float32(0.02))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return sum(4 * math.prod(shape) for shape in shapes.values())


@contextlib.contextmanager
def cgroup(limit: int | None) -> Iterator[Callable[[], None] | None]:
    """A memory cgroup of version 1 or 2 with a limit; what a new process calls to join it."""
    if limit is None:
        yield None
        return
    first = Path("/sys/fs/cgroup/memory")
    root, file = (
        (first, "memory.limit_in_bytes") if first.exists() else (first.parent, "memory.max")
    )
    group = root / f"prox24-{os.getpid()}"
    group.mkdir()
    try:
        (group / file).write_text(str(limit))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def prune(folder: Path, layers: int, samples: int, limit: int | None) -> dict[str, float]:
    """Writes, prunes and deletes a checkpoint; what the process took."""
    size = write_model(folder / "model", layers)
    command = [sys.executable, "-m", "prox24", "prune", "model", "pruned", "--method", "wanda"]
    command += ["--samples", str(samples), "--sequence-length", "128", "--quiet"]
    command += ["--report", "report.json"]
    with cgroup(limit) as join:
        subprocess.run(command, cwd=folder, check=True, preexec_fn=join)
    report = json.loads((folder / "report.json").read_text())
    return {
        "layers": layers,
        "model_bytes": size,
        "peak_bytes": report["peak_memory_bytes"],
        "seconds": report["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 128 tokens")
    parser.add_argument("--limit", type=int, metavar="BYTES", help="of memory, by a cgroup")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(prune(Path(folder), layers, arguments.samples, arguments.limit))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table()
    for title in ("layers", "model, GB", "peak, GB", "seconds"):
        table.add_column(title, justify="right")
    for row in rows:
        sizes = [f"{row[name] / 1e9:.3f}" for name in ("model_bytes", "peak_bytes")]
        table.add_row(str(row["layers"]), *sizes, f"{row['seconds']:.0f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
