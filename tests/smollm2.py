"""SmolLM2-135M-Instruct, whole and cut off after its first layers."""

import json
import re
from pathlib import Path

from safetensors.numpy import load_file, save_file

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24._cli.demo_model import fetch_model

CACHE = Path(__file__).parents[1] / ".cache"


def fetched():
    """The GGUF file of the whole model."""
    CACHE.mkdir(exist_ok=True)
    return fetch_model(CACHE)


def write_first_layers(folder, count=2):
    """Writes a model of the first layers. It has real weights, and takes a tenth of the time."""
    write_checkpoint(open_checkpoint(fetched()), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name in list(tensors):
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= count:
            del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    return folder
