"""Peak memory of `prox24 prune` on synthetic Llama checkpoints of more and more layers.

    python benchmarks/memory.py --layers 8 16 32
    python benchmarks/memory.py --layers 32 --limit 3000000000

A layer has 31 million random weights, 126 MB in float32. Each checkpoint is pruned by Wanda in a
process of its own. Its report has the peak resident memory. The second command runs as root, in a
memory cgroup of its own. There the kernel ends the process if it takes more than the limit. The
limit counts the kernel's cache of its files too.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import llama, parser_of, positive, show, write_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import byte_tokenizer

SHAPE = {
    "vocab_size": 256,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# The command has glibc give memory back, which a call of `prox24.prune` does not.
PRUNE = [sys.executable, "-m", "prox24", "prune", "model", "pruned", "--method", "wanda"]
PRUNE += ["--sequence-length", "128", "--quiet", "--report", "report.json", "--samples"]


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


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=positive, nargs="+", default=[8, 16, 32])
    parser.add_argument("--samples", type=positive, default=16, help="windows of 128 tokens")
    parser.add_argument("--limit", type=positive, metavar="BYTES", help="of memory, by a cgroup")
    arguments = parser.parse_args()
    rows = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as folder, cgroup(arguments.limit) as join:
            model, config = Path(folder) / "model", llama(2048, 2400, layers, 16, **SHAPE)
            size = write_llama(model, config, np.float32, np.random.default_rng(0))
            byte_tokenizer().save_pretrained(model)
            command = [*PRUNE, str(arguments.samples)]
            subprocess.run(command, cwd=folder, check=True, preexec_fn=join)
            report = json.loads((Path(folder) / "report.json").read_text())
        sizes = [f"{count / 1e9:.3f}" for count in (size, report["peak_memory_bytes"])]
        rows.append((str(layers), *sizes, f"{report['seconds']:.0f}"))
    show(("layers", "model, GB", "peak, GB", "seconds"), rows)


if __name__ == "__main__":
    main()
