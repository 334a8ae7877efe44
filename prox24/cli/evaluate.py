"""`prox24 eval`: the perplexity of a model on a text."""

import argparse

from prox24 import torchax
from prox24.cli.output import print_json, print_table, progress_bar
from prox24.cli.windows import evaluation_windows
from prox24.forward import load_model
from prox24.perplexity import perplexity


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    checkpoint, native = torchax.open_any(arguments.model)
    windows = evaluation_windows(
        checkpoint, arguments.text, arguments.samples, arguments.sequence_length
    )
    steps = len(load_model(checkpoint).config.layers) if native else len(windows)
    with progress_bar("eval", steps, arguments.quiet) as advance:
        if native:
            result = perplexity(
                checkpoint, windows, on_layer=lambda index: advance(f"layer {index}", None)
            )
        else:
            result = torchax.perplexity(
                checkpoint, windows, on_window=lambda index: advance(f"window {index}", None)
            )
    name = "austen.txt of the package" if arguments.text is None else str(arguments.text)
    if arguments.json:
        print_json({"model": str(arguments.model), "text": name, **result._asdict()})
    else:
        rows = [
            ["perplexity", f"{result.perplexity:.3f}"],
            ["text", name],
            ["context length", f"{result.context_length} tokens"],
            ["windows", str(result.windows)],
            ["predicted tokens", str(result.predicted_tokens)],
        ]
        print_table(["model", str(arguments.model)], rows)
    return 0
