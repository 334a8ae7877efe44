"""Whether a mask that moves while a layer is trained as a block beats one that the solver fixed.

    python benchmarks/moving_masks.py --calibration calib_mix.txt

For layers of SmolLM2-135M-Instruct, on the dense model's activations: the default's masks, then all
passes of `prox24.refine.block` on what they keep; against dense weights trained by Adam and the
proximal step, lambda growing until all is 2:4, and then the last passes on what that keeps. In both
every linear is scaled as the solvers scale it, by the root of its Gram's diagonal and to a mean
magnitude of 1, in which units rate and lambda are given. Printed is the relative error of the
layer's output on held-out windows.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from model import drawn_windows
from rich.console import Console
from rich.table import Table

import prox24
from prox24 import ADMM, ConjugateGradients, LayerProblem, SparseGPT, refine
from prox24.calibration.text import text_or_packaged, tokenize
from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.cli.demo import fetch_model
from prox24.forward import embed_windows, layer_linears, layer_weights, load_model, run_in_place
from prox24.models import decoder
from prox24.optax import exponential, proximal
from prox24.pipeline import gather_grams

LENGTH, BATCH = 512, 4
HELD_OUT = 2
FIRST, LAST = 1e-3, 1e3
"""Of lambda."""

Weights = dict[str, Array]


class Layer(NamedTuple):
    """A dense layer with what it is trained on."""

    apply: Callable[[Weights, Array], Array]
    weights: Weights
    scales: Weights
    problems: dict[str, LayerProblem]
    inputs: list[np.ndarray]
    targets: list[np.ndarray]


def dense_layers(indices: list[int], calibration: Path | None, samples: int) -> Iterator[Layer]:
    """Each with the dense model's own activations."""
    checkpoint = open_checkpoint(fetch_model(Path(".cache")))
    model = load_model(checkpoint)
    text = text_or_packaged(calibration, "speeches.txt")
    ids = tokenize(checkpoint.load_tokenizer(), text, checkpoint.config["vocab_size"])
    hidden = list(embed_windows(model, drawn_windows(ids, samples, LENGTH, 0), BATCH))
    for index in range(max(indices) + 1):
        weights, inputs = layer_weights(model, index), list(hidden)
        run_in_place(model, index, weights, hidden)
        if index in indices:
            sums, problems, scales = gather_grams(model, index, weights, inputs), {}, {}
            for linear in layer_linears(model.config, index):
                gram = sums.grams[linear.input].total.astype(jnp.float32)
                weight = weights[linear.weight].astype(jnp.float32)
                problems[linear.weight] = LayerProblem(weight, gram)
                scale = jnp.sqrt(jnp.diagonal(gram) + 0.01 * jnp.mean(jnp.diagonal(gram)))
                scales[linear.weight] = scale / jnp.mean(jnp.abs(weight) * scale[None, :])
            apply = functools.partial(whole_layer, model.config.layers[index])
            yield Layer(apply, weights, scales, problems, inputs, list(hidden))


def whole_layer(spec: decoder.Layer, weights: Weights, hidden: Array) -> Array:
    """What the layer makes of hidden states."""
    return decoder.layer(spec, weights, hidden, decoder.no_tap)


def scaled(layer: Layer, weights: Weights, sign: int = 1) -> Weights:
    """Linears in the units of the solvers, or back with sign -1."""
    return {
        name: w.astype(jnp.float32) * layer.scales[name][None, :] ** sign
        if name in layer.scales
        else w.astype(jnp.float32)
        for name, w in weights.items()
    }


def train(
    layer: Layer, params: Weights, optimizer: optax.GradientTransformation, **more: object
) -> refine.Refined:
    """`refine.block` on parameters in the units of the solvers."""

    def apply(params: Weights, hidden: Array) -> Array:
        return layer.apply(scaled(layer, params, -1), hidden)

    return refine.block(
        apply, params, layer.inputs, layer.targets, optimizer, held_out=HELD_OUT, **more
    )


def kept(layer: Layer, params: Weights) -> dict[str, Array | bool]:
    """The nonzeros of linears, and all else."""
    return {name: w != 0 if name in layer.scales else True for name, w in params.items()}


def pattern(layer: Layer, params: Weights) -> Weights:
    """The two largest of each block of a linear."""
    return {
        name: jnp.where(prox24.top_mask(jnp.abs(w)), w, 0) if name in layer.scales else w
        for name, w in params.items()
    }


def fixed(layer: Layer, params: Weights, rate: float, passes: int) -> refine.Refined:
    """Adam on what is kept."""
    steps = passes * (len(layer.inputs) - HELD_OUT)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    return train(layer, params, optimizer, passes=passes, kept=kept(layer, params))


def moving(layer: Layer, rate: float, passes: int, last: int) -> refine.Refined:
    """Adam and the proximal step from the dense weights, and the last passes on what is kept."""
    steps = (passes - last) * (len(layer.inputs) - HELD_OUT)
    optimizer = optax.chain(
        optax.adam(rate),
        proximal(
            exponential(FIRST, (LAST / FIRST) ** (1 / steps)),
            axis=-1,
            mask={name: name in layer.scales for name in layer.weights},
        ),
    )
    found = []
    train(
        layer,
        scaled(layer, layer.weights),
        optimizer,
        passes=passes - last,
        project=functools.partial(pattern, layer),
        on_measured=lambda state: found.append(jax.tree.map(jnp.copy, state.master)),
    )
    return fixed(layer, pattern(layer, found[-1]), rate, last)


def solved(layer: Layer, solver: object, refit: object) -> Weights:
    """The layer with every linear pruned for itself."""
    pruned = {
        name: prox24.solve(problem, solver, refit).weight
        for name, problem in layer.problems.items()
    }
    return {**layer.weights, **pruned}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens")
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    arguments = parser.parse_args()
    table = Table()
    table.add_column("layer, rate", no_wrap=True)
    for title in (
        "sparsegpt",
        "+ fixed",
        "default",
        "+ fixed",
        "moving, half",
        "moving, all but one",
    ):
        table.add_column(title, justify="right")
    layers = dense_layers(arguments.layers, arguments.calibration, arguments.samples)
    for index, layer in zip(sorted(arguments.layers), layers, strict=True):
        starts = [
            scaled(layer, solved(layer, *method))
            for method in ((SparseGPT(), None), (ADMM(), ConjugateGradients()))
        ]
        for rate in arguments.rates:
            cells = []
            for start in starts:
                began = time.perf_counter()
                refined = fixed(layer, start, rate, arguments.passes)
                cells += [f"{refined.losses[0]:.5f}", f"{min(refined.losses):.5f}"]
                cells[-1] += f" ({time.perf_counter() - began:.0f} s)"
            for last in (arguments.passes // 2, 1):
                began = time.perf_counter()
                refined = moving(layer, rate, arguments.passes, last)
                cells.append(f"{min(refined.losses):.5f} ({time.perf_counter() - began:.0f} s)")
            table.add_row(f"{index}, {rate}", *cells)
            Console(width=130).print(f"{index}, {rate}:", *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
