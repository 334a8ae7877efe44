"""Plans for Llama-3.1 8B and 70B: memory and hours on one 80 GB GPU and on TPU v5e slices.

    python benchmarks/plan.py [--models 8B 70B] [--samples 128] [--sequence-length 2048]

The checkpoints are files of the right size with holes for weights: names, shapes and dtypes are
there, and nothing takes place on disk. The memory is what XLA's CPU compiler reserves for the
programs. The hours are a lower bound: operations over the device's peak in float32 products, which
is 67e12 a second on an H100 (its float32 units) and a sixth of 197e12 on a v5e (six bfloat16
passes, which is how a TPU multiplies float32 at the highest precision). "Columns" is --shard-grams.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from prox24.checkpoints.safetensors_file import create_file
from prox24.checkpoints.tensors import Spec
from prox24.models.decoder import tensor_shapes
from prox24.models.families import config_from_hf

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
MODELS = {
    "8B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "70B": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
}
V5E = ["--memory", "16GB", "--rate", str(197e12 / 6)]
MACHINES = {
    "one H100 80 GB": ["--memory", "80GB", "--rate", "67e12"],
    "v5e-8": [*V5E, "--devices", "8"],
    "v5e-8, columns": [*V5E, "--devices", "8", "--shard-grams"],
    "v5e-64": [*V5E, "--devices", "64"],
    "v5e-64, columns": [*V5E, "--devices", "64", "--shard-grams"],
}


def write_model(folder: Path, config: dict[str, object]) -> None:
    """A checkpoint whose weights are holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config_from_hf(config, ()))
    specs = {name: Spec(shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in shapes.items()}
    with create_file(folder / "model.safetensors", specs):
        pass


def plan(folder: Path, options: list[str]) -> dict[str, object]:
    """What the command says."""
    command = [sys.executable, "-m", "prox24", "plan", str(folder), "--json", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", default="128", help="calibration windows")
    parser.add_argument("--sequence-length", default="2048", help="tokens of a window")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    more = ["--samples", arguments.samples, "--sequence-length", arguments.sequence_length]
    plans = []
    table = Table()
    table.add_column("model")
    table.add_column("machine")
    parts = ("forward", "grams", "factor", "solve")
    for title in ("gather, GB", "solve, GB", "fits", *(f"{part}, h" for part in parts)):
        table.add_column(title, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            write_model(Path(folder) / name, MODELS[name])
            for machine, options in MACHINES.items():
                said = plan(Path(folder) / name, [*options, *more])
                plans.append(said | {"model": name, "machine": machine})
                memory = [f"{said[key] / 1e9:.1f}" for key in ("gather_bytes", "solve_bytes")]
                hours = [f"{said['hours'][part]:.3g}" for part in parts]
                fits = "yes" if said["fits"] else "no"
                table.add_row(name, machine, *memory, fits, *hours)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(plans, indent=2) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
