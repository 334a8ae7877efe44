"""The memory of pruning Llama-3.1 8B and 70B on one 80 GB GPU and on TPU v5e slices.

    python benchmarks/plan.py [--models 8B 70B] [--samples 128] [--sequence-length 2048]

The checkpoints are files of the right size with holes for weights, which take no place on disk. The
memory is what XLA's CPU compiler reserves for the programs. "Columns" is --shard-grams.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
from common import add_json, llama, parser_of, positive, show, write_json, write_llama

MODELS = {"8B": llama(4096, 14336, 32, 32), "70B": llama(8192, 28672, 80, 64)}
MACHINES = {
    "one H100 80 GB": ["--memory", "80GB"],
    "v5e-8": ["--memory", "16GB", "--devices", "8"],
    "v5e-8, columns": ["--memory", "16GB", "--devices", "8", "--shard-grams"],
    "v5e-64": ["--memory", "16GB", "--devices", "64"],
    "v5e-64, columns": ["--memory", "16GB", "--devices", "64", "--shard-grams"],
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", type=positive, default=128, help="calibration windows")
    parser.add_argument("--sequence-length", type=positive, default=2048, help="tokens of a window")
    add_json(parser)
    arguments = parser.parse_args()
    sizes = "--samples", arguments.samples, "--sequence-length", arguments.sequence_length
    plans = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            write_llama(Path(folder) / name, MODELS[name], ml_dtypes.bfloat16, None)
            for machine, options in MACHINES.items():
                command = ["plan", Path(folder) / name, "--json", *options, *sizes]
                outcome = subprocess.run(
                    [sys.executable, "-m", "prox24", *map(str, command)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                plans.append(json.loads(outcome.stdout) | {"model": name, "machine": machine})
    write_json(arguments.json, plans)
    rows = [
        (
            *(plan["model"], plan["machine"]),
            *(f"{plan[key] / 1e9:.1f}" for key in ("gather_bytes", "solve_bytes")),
            "yes" if plan["fits"] else "no",
        )
        for plan in plans
    ]
    show(("model", "machine", "gather, GB", "solve, GB", "fits"), rows, left=2)


if __name__ == "__main__":
    main()
