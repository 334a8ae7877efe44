"""The memory of pruning Llama models of 1B, 8B and 70B on one 80 GB GPU and on TPU v5e slices.

    python benchmarks/plan.py [--models 1B 8B 70B] [--samples 128] [--sequence-length 2048]

The checkpoints are files of the right size with holes for weights, which take no place on disk. The
memory of a device is what XLA's CPU compiler reserves for the programs. "Columns" is --shard-grams.
Hidden states are on the host.
"""

import tempfile
from pathlib import Path

import ml_dtypes
from common import LLAMAS, parser_of, positive, show, write_llama

import prox24

MACHINES = {
    "one H100 80 GB": (60, 1, False),  # three quarters, which JAX reserves
    "v5e-8": (16, 8, False),
    "v5e-8, columns": (16, 8, True),
    "v5e-64": (16, 64, False),
    "v5e-64, columns": (16, 64, True),
}
"""GB of a device, their number, and whether they share columns."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=LLAMAS, default=list(LLAMAS))
    parser.add_argument("--samples", type=positive, default=128, help="calibration windows")
    parser.add_argument("--sequence-length", type=positive, default=2048, help="tokens of a window")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            model = Path(folder) / name
            write_llama(model, LLAMAS[name], ml_dtypes.bfloat16, None)
            for machine, (gigabytes, devices, columns) in MACHINES.items():
                plan = prox24.plan(
                    model,
                    samples=arguments.samples,
                    sequence_length=arguments.sequence_length,
                    devices=devices,
                    memory=gigabytes * 10**9,
                    shard_grams=columns,
                )
                found = plan.activation_bytes, plan.gather_bytes, plan.solve_bytes
                sizes = [f"{size / 1e9:.1f}" for size in found]
                rows.append((name, machine, *sizes, "yes" if plan.fits else "no"))
    show(("model", "machine", "hidden states, GB", "gather, GB", "solve, GB", "fits"), rows)


if __name__ == "__main__":
    main()
