"""Whether a mask that moves while a layer is trained as a block beats one that the solver fixed.

    python benchmarks/moving_masks.py --calibration calib_mix.txt

For layers of SmolLM2-135M-Instruct, on the dense model's activations: the masks of SparseGPT and of
the default, then all passes of training on what they keep; against dense weights trained by Adam
and the proximal step, lambda growing until all is 2:4, and then the last passes on what that keeps.
In all of them every linear is scaled as the solvers scale it, by the root of its Gram's diagonal
and to a mean magnitude of 1, in which units rate and lambda are given; but for "as --refine block",
in whose units the rate is of each tensor's root mean square. The best pass is chosen on held-out
windows. Printed are the relative error of the layer's output on the last windows, which only the
Grams have seen, and the seconds of the training, without those of compiling when another layer had
the same shapes and rate.
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
from prox24 import ADMM, ConjugateGradients, LayerProblem, SparseGPT
from prox24.calibration.text import text_or_packaged, tokenize
from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.cli.demo import fetch_model
from prox24.forward import embed_windows, layer_linears, layer_weights, load_model, run_in_place
from prox24.models import decoder
from prox24.optax import exponential, proximal
from prox24.pipeline import gather_grams
from prox24.refine import BlockRefinement
from prox24.refine.blocks import relative_error
from prox24.refine.training import Loss, Refined, refine
from prox24.solvers.solve import Refit, Solver

LENGTH = 512
HELD_OUT, TESTED = 8, 8
"""Windows: the last before those that are tested, and the last."""
FIRST, LAST = 1e-3, 1e3
"""Of lambda."""

Weights = dict[str, Array]
Batch = tuple[np.ndarray, np.ndarray]
"""What goes into a layer, and what the dense one puts out."""


class Layer(NamedTuple):
    """A dense layer with what it is trained on."""

    loss: Loss
    weights: Weights
    scales: Weights
    problems: dict[str, LayerProblem]
    batches: list[Batch]

    def steps(self, windows: int) -> int:
        """Batches that have so many windows."""
        return windows // len(self.batches[0][0])

    @property
    def seen(self) -> list[Batch]:
        """By a training, held out or not."""
        return self.batches[: -self.steps(TESTED)]

    @property
    def steps_of_pass(self) -> int:
        return len(self.seen) - self.steps(HELD_OUT)


def dense_layers(
    indices: list[int], calibration: Path | None, samples: int, step_windows: int
) -> Iterator[Layer]:
    """Each with the dense model's own activations."""
    checkpoint = open_checkpoint(fetch_model(Path(".cache")))
    model = load_model(checkpoint)
    text = text_or_packaged(calibration, "speeches.txt")
    ids = tokenize(checkpoint.load_tokenizer(), text, checkpoint.config["vocab_size"])
    hidden = list(embed_windows(model, drawn_windows(ids, samples, LENGTH, 0), step_windows))
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
            batches = list(zip(inputs, hidden, strict=True))
            yield Layer(loss_of(model.config.layers[index]), weights, scales, problems, batches)


@functools.lru_cache
def loss_of(spec: decoder.Layer) -> Loss:
    """One function for equal layers, which is compiled once."""

    def loss(params: Weights, scales: Weights, batch: tuple[Array, Array]) -> Array:
        hidden, target = batch
        output = decoder.layer(spec, scaled(scales, params, -1), hidden, decoder.no_tap)
        return relative_error(output, target)

    return loss


def scaled(scales: Weights, weights: Weights, sign: int = 1) -> Weights:
    """Linears in the units of the solvers, or back with sign -1."""
    return {
        name: w.astype(jnp.float32) * scales[name][None, :] ** sign
        if name in scales
        else w.astype(jnp.float32)
        for name, w in weights.items()
    }


def kept(layer: Layer, params: Weights) -> dict[str, Array | bool]:
    """The nonzeros of linears, and all else."""
    return {name: w != 0 if name in layer.scales else True for name, w in params.items()}


def pattern(layer: Layer, params: Weights) -> Weights:
    """The two largest of each block of a linear."""
    return {
        name: jnp.where(prox24.top_mask(jnp.abs(w)), w, 0) if name in layer.scales else w
        for name, w in params.items()
    }


@functools.lru_cache
def decaying(rate: float, steps: int) -> optax.GradientTransformation:
    """The same object for the same numbers, to be compiled once; so is `pruning`."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


@functools.lru_cache
def pruning(rate: float, steps: int, linears: frozenset[str]) -> optax.GradientTransformation:
    """Adam and the proximal step, lambda growing from `FIRST` to `LAST`."""
    growth = (LAST / FIRST) ** (1 / steps)

    def pruned(params: Weights) -> dict[str, bool]:
        return {name: name in linears for name in params}

    return optax.chain(optax.adam(rate), proximal(exponential(FIRST, growth), axis=-1, mask=pruned))


def trained(
    layer: Layer, params: Weights, optimizer: optax.GradientTransformation, passes: int
) -> Refined:
    """On what is kept."""
    return refine(
        layer.loss,
        params,
        layer.scales,
        layer.seen,
        optimizer,
        passes=passes,
        held_out=layer.steps(HELD_OUT),
        kept=kept(layer, params),
    )


def fixed(layer: Layer, params: Weights, rate: float, passes: int) -> Weights:
    """Of Adam on what is kept, in the solvers' units."""
    optimizer = decaying(rate, passes * layer.steps_of_pass)
    found = trained(layer, scaled(layer.scales, params), optimizer, passes).params
    return scaled(layer.scales, found, -1)


def refined(layer: Layer, params: Weights, rate: float, passes: int) -> Weights:
    """Of what `--refine block` does."""
    own = layer._replace(scales={name: jnp.ones_like(s) for name, s in layer.scales.items()})
    held_out = layer.steps(HELD_OUT) / len(layer.seen)
    optimizer = BlockRefinement(rate, passes, held_out).optimizer(len(layer.seen))
    return trained(own, scaled(own.scales, params), optimizer, passes).params


def moving(
    layer: Layer, params: Weights, rate: float, passes: int, last: int | None = None
) -> Weights:
    """Of Adam and the proximal step, and of the last passes, or half of all, on what is kept."""
    last = passes // 2 if last is None else last
    masters: list[Weights] = []
    refine(
        layer.loss,
        scaled(layer.scales, params),
        layer.scales,
        layer.seen,
        pruning(rate, (passes - last) * layer.steps_of_pass, frozenset(layer.scales)),
        passes=passes - last,
        held_out=layer.steps(HELD_OUT),
        project=functools.partial(pattern, layer),
        # Of the last step, at which lambda has grown, not of the best before that.
        on_measured=lambda state: masters.append(jax.tree.map(jnp.copy, state.master)),
    )
    return fixed(layer, scaled(layer.scales, pattern(layer, masters[-1]), -1), rate, last)


def error(layer: Layer, params: Weights) -> float:
    """On the batches that no training sees."""
    given = scaled(layer.scales, params)
    tested = layer.batches[-layer.steps(TESTED) :]
    losses = [jax.jit(layer.loss)(given, layer.scales, batch) for batch in tested]
    return float(np.mean(losses))


def timed(
    layer: Layer,
    train: Callable[[Layer, Weights, float, int], Weights],
    params: Weights,
    rate: float,
    passes: int,
) -> str:
    """The error after a training, and its seconds."""
    began = time.perf_counter()
    found = train(layer, params, rate, passes)
    seconds = time.perf_counter() - began
    return f"{error(layer, found):.5f} ({seconds:.0f} s)"


def solved(layer: Layer, solver: Solver, refit: Refit | None) -> Weights:
    """The layer with every linear pruned for itself."""
    pruned = {
        name: prox24.solve(problem, solver, refit).weight
        for name, problem in layer.problems.items()
    }
    return {**layer.weights, **pruned}


SOLVED: dict[str, tuple[Solver, Refit | None]] = {
    "sparsegpt": (SparseGPT(), None),
    "default": (ADMM(), ConjugateGradients()),
}
TRAININGS = {
    "sparsegpt, fixed": (fixed, "sparsegpt"),
    "default, fixed": (fixed, "default"),
    "default, as --refine block": (refined, "default"),
    "moving, half": (moving, "dense"),
    "moving, all but one": (functools.partial(moving, last=1), "dense"),
}
"""And the weights that they begin with."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens")
    parser.add_argument("--step-windows", type=int, default=4, choices=(1, 2, 4, 8))
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    arguments = parser.parse_args()
    if arguments.passes < 4:
        parser.error("with fewer than 4 passes the two ways to move a mask are one")
    if arguments.samples <= HELD_OUT + TESTED:
        parser.error(f"--samples {arguments.samples} leave none to train on")
    if arguments.samples % arguments.step_windows:
        parser.error(f"--samples {arguments.samples} are no whole number of --step-windows")
    table = Table()
    table.add_column("layer, rate", no_wrap=True)
    for title in (*SOLVED, *arguments.only):
        table.add_column(title, justify="right")
    layers = dense_layers(
        arguments.layers, arguments.calibration, arguments.samples, arguments.step_windows
    )
    for index, layer in zip(sorted(arguments.layers), layers, strict=True):
        pruned = {name: solved(layer, *method) for name, method in SOLVED.items()}
        before = [f"{error(layer, weights):.5f}" for weights in pruned.values()]
        starts = pruned | {"dense": layer.weights}
        for rate in arguments.rates:
            cells = list(before)
            for name in arguments.only:
                train, start = TRAININGS[name]
                cells.append(timed(layer, train, starts[start], rate, arguments.passes))
            table.add_row(f"{index}, {rate}", *cells)
            Console(width=130).print(f"{index}, {rate}:", *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
