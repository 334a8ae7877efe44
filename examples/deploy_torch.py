"""Runs a pruned Hugging Face model in PyTorch on the sparse tensor cores of a GPU.

It gives 2:4 linears PyTorch's semi-structured weights, and changes nothing else. It compares the
time and the last logits of a prefill with the dense model's. Without a GPU it only lists the
linears. The code is the same for CUDA and ROCm.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.sparse import to_sparse_semi_structured
from transformers import AutoModelForCausalLM

BATCH, LENGTH, TURNS = 8, 1024, 10  # of a prefill
OUT, IN = 32, 64  # CUTLASS takes their multiples; 16 and 16, which cuSPARSELt takes, divide them


def takes_sparse_kernel(weight):
    """Whether a weight (out, in) is 2:4 and of a dtype and sizes that the sparse kernels take."""
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    if weight.shape[0] % OUT or weight.shape[1] % IN:
        return False
    return bool((weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1) <= 2).all())


def sparse_linears(model):
    """The linears to convert, by name; the head stays dense."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
        if takes_sparse_kernel(module.weight)
    }


def convert(model):
    """Gives these linears semi-structured weights, in place."""
    for linear in sparse_linears(model).values():
        weight = to_sparse_semi_structured(linear.weight.detach())
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)


@torch.inference_mode()
def prefill(model, tokens):
    """The last logits of a prefill, in float32, and its median time in milliseconds."""
    seconds = []
    for _ in range(1 + TURNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        logits = model(tokens, use_cache=False, logits_to_keep=1).logits
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return logits.float(), 1000 * statistics.median(seconds[1:])  # the first turn warms up


def main():
    """Lists the linears, converts them and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a pruned folder, in float16 or bfloat16")
    source = parser.parse_args().source

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
    names = sparse_linears(model)
    if not names:
        parser.error(
            f"{source} has no 2:4 linear in float16 or bfloat16; "
            "prox24 convert SRC DST --dtype bfloat16 changes the dtype"
        )
    print(*names, sep="\n")
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    print(f"{len(names)} of {linears} linears take semi-structured weights")
    if not torch.cuda.is_available():
        print("Nothing was converted: PyTorch finds no GPU (CUDA or ROCm), and one is needed.")
        return

    model.to("cuda")
    tokens = torch.randint(model.config.vocab_size, (BATCH, LENGTH), device="cuda")
    dense, dense_time = prefill(model, tokens)
    convert(model)
    sparse, sparse_time = prefill(model, tokens)
    difference = (sparse - dense).abs().max() / dense.abs().max()
    print(f"prefill of {BATCH} x {LENGTH} tokens on {torch.cuda.get_device_name()}")
    speed = dense_time / sparse_time
    print(f"dense {dense_time:.1f} ms, sparse {sparse_time:.1f} ms: {speed:.2f} times as fast")
    print(f"largest difference of the last logits, relative to the largest: {difference:.1e}")


if __name__ == "__main__":
    main()
