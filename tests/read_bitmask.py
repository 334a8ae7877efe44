"""Reads a folder in the format sparse-24-bitmask by transformers, and writes what it read.

python read_bitmask.py FOLDER FILE
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, destination = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
model(torch.arange(1, 9)[None])  # unpacks what is not yet
tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
save_file(tensors, destination)
