"""Errors of float32 products in passes of TF32 or bfloat16, on real layers, without a GPU.

    python benchmarks/products.py [--layers 0,15] [--samples N] [--calibration FILE]

Weights and inputs are those of the dense SmolLM2-135M-Instruct. Each kind of product takes all
products of float32 matrices in prox24. Errors are against float64, relative, in the Frobenius norm.

Gram       X^T X of 2,048 tokens
forward    X W^T
W G        a step of the solver
inverse    of the damped Gram
loss       of the default solver's result, in float64, over that of the float64 solver, less 1
masks      blocks with the mask of the float64 solver

A pass multiplies parts of the operands, which it takes as XLA does for GPUs: TF32 cuts off bits,
bfloat16 rounds to nearest. Products of parts are summed in float32 by the CPU. The last two
lines of a linear sum as GPUs do. Cores for float32 add one product after the other. Tensor cores
are assumed to add the exact sum of eight products, and to round toward zero.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

import prox24
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._core.precision import PRODUCTS, matmul, products
from prox24._jobs.native import native_runner
from prox24._jobs.observe import layer_inputs
from prox24._jobs.text import calibration_windows
from prox24._pruning.grams import add_tokens, empty_gram
from prox24._pruning.runner import Streams
from prox24._solvers.damping import damped_inverse

TOKENS = 2048
LINEARS = ("up_proj", "down_proj")
ROWS = 128
"""Of a result that is summed as GPUs do."""


class Passes(NamedTuple):
    """An operand is a sum of parts; the smallest products of parts are left out."""

    part: Callable[[Array], Array]
    parts: int

    def split(self, x: Array) -> list[Array]:
        """The parts, the largest first."""
        found: list[Array] = []
        for _ in range(self.parts):
            found.append(self.part(x))
            x = x - found[-1]
        return found

    def pairs(self, x: Array, y: Array) -> list[tuple[Array, Array]]:
        """The factors of the passes, the smallest first."""
        left, right = self.split(x), self.split(y)
        orders = reversed(range(self.parts))
        return [(left[i], right[order - i]) for order in orders for i in range(order + 1)]


def tf32(x: Array) -> Array:
    """The first 10 bits of the fraction."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFE000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def bfloat16(x: Array) -> Array:
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


EMULATED = {
    "tf32x3": Passes(tf32, 2),
    "bf16x3": Passes(bfloat16, 2),
    "bf16x6": Passes(bfloat16, 3),
}
KINDS = ("float32", *EMULATED)


def emulated(multiply: Callable[..., Array]) -> Callable[..., Array]:
    """`jnp.matmul`, for which `Passes` are a precision too."""

    def run(x: Array, y: Array, precision: Any = None) -> Array:
        if not isinstance(precision, Passes):
            return multiply(x, y, precision=precision)
        return sum(multiply(*pair, precision="highest") for pair in precision.pairs(x, y))

    return run


def summed(x: Array, y: Array, together: int, chopped: bool) -> NDArray[np.float32]:
    """x y, the float32 sum of exact products of some columns and rows."""
    left, right = np.asarray(x, np.float64), np.asarray(y, np.float64)
    total = np.zeros((len(left), right.shape[1]), np.float32)
    for first in range(0, len(right), together):
        last = first + together
        exact = total + left[:, first:last] @ right[first:last]
        total = exact.astype(np.float32)
        if chopped:
            away = np.abs(total) > np.abs(exact)
            total = np.where(away, np.nextafter(total, np.float32(0)), total)
    return total


def in_order(x: Array, y: Array) -> NDArray[np.float32]:
    return summed(x, y, 1, chopped=False)


def on_tensor_cores(x: Array, y: Array) -> NDArray[np.float32]:
    return sum(summed(*pair, 8, chopped=True) for pair in EMULATED["tf32x3"].pairs(x, y))


SUMS = {"float32, in order": in_order, "tf32x3, tensor cores": on_tensor_cores}


def inputs_of(
    model: Path, layers: list[int], text: prox24.Text
) -> Iterator[tuple[str, Array, Array]]:
    """Names of linears, their weights, and their inputs in the dense model (tokens, in)."""
    checkpoint = open_checkpoint(model)
    windows = calibration_windows(checkpoint, text)
    runner = native_runner(checkpoint, windows, prox24.Recipe.wanda())
    _, state = runner.enter(Streams(dense=False, crosses=False))
    for index in range(max(layers) + 1):
        weights = runner.weights(index)
        if index in layers:
            layer, own = runner.model.config.layers[index], runner._own(index, weights)
            seen = [layer_inputs(layer, own, jnp.asarray(hidden)) for hidden in state.pruned]
            for linear in runner.linears(index):
                if linear.tensor.split(".")[-2] in LINEARS:
                    x = jnp.concatenate([each[linear.input] for each in seen])
                    weight = weights[linear.tensor].astype(jnp.float32)
                    yield linear.tensor, weight, x.reshape(-1, x.shape[-1])
        state = runner.advance(index, weights, state)


def error(found: Any, exact: NDArray[np.float64]) -> str:
    return f"{np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact):.1e}"


@functools.partial(jax.jit, static_argnames="kind")
def computed(x: Array, weight: Array, kind: str) -> tuple[Array, ...]:
    """The Gram of all tokens, and the four results whose errors are in the table."""
    with products(kind):
        gram = empty_gram(x.shape[1])
        for start in range(0, len(x), TOKENS):
            gram = add_tokens(gram, x[start : start + TOKENS])
        first = add_tokens(empty_gram(x.shape[1]), x[:TOKENS]).total
        forward = matmul(x[:TOKENS], weight.T)
        return gram.total, first, forward, matmul(weight, first), _inverse(gram.total)


def _inverse(gram: Array) -> Array:
    return damped_inverse(gram, jnp.asarray(0.01, gram.dtype)).matrix


def rows_of(name: str, weight: Array, x: Array) -> Iterator[list[str]]:
    """The lines of a linear."""
    exact_x, exact_weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    whole, first = exact_x.T @ exact_x, exact_x[:TOKENS].T @ exact_x[:TOKENS]
    found = {kind: computed(x, weight, kind) for kind in KINDS}
    best = prox24.solve(jnp.asarray(exact_weight), jnp.asarray(whole))

    def loss(solution: prox24.Solution) -> float:
        difference = np.asarray(solution.weight, np.float64) - exact_weight
        return np.sum((difference @ whole) * difference)

    masks = np.asarray(best.mask).reshape(-1, 4)
    for kind, (gram, own_first, forward, step, inverted) in found.items():
        with products(kind):
            solution = prox24.solve(weight, gram)
        equal = np.mean(np.all(np.asarray(solution.mask).reshape(-1, 4) == masks, axis=1))
        yield [
            *(
                name,
                kind,
                error(own_first, first),
                error(forward, exact_x[:TOKENS] @ exact_weight.T),
            ),
            error(step, exact_weight @ np.asarray(own_first, np.float64)),
            error(inverted, np.asarray(_inverse(jnp.asarray(gram, jnp.float64)))),
            *(f"{loss(solution) / loss(best) - 1:+.1e}", f"{equal:.2%}"),
        ]
    x, gram = x[:TOKENS], found["float32"][1]
    factors = ((x.T, x), (x, weight.T), (weight, gram))
    for kind, multiply in SUMS.items():
        errors = []
        for left, right in factors:
            left = left[:ROWS]
            exact = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
            errors.append(error(multiply(left, right), exact))
        yield [name, kind, *errors, "", "", ""]


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--layers", default="0,15")
    parser.add_argument("--samples", type=common.positive, default=16)
    common.add_calibration(parser)
    arguments = parser.parse_args()
    layers = [int(layer) for layer in arguments.layers.split(",")]
    text = prox24.Text(arguments.calibration, arguments.samples)
    given = list(inputs_of(common.dense_model(), layers, text))
    jax.config.update("jax_enable_x64", True)
    multiply = emulated(jnp.matmul)
    with mock.patch.object(jnp, "matmul", multiply), mock.patch.dict(PRODUCTS, EMULATED):
        rows = [row for each in given for row in rows_of(*each)]
    titles = ("linear", "products", "Gram", "forward", "W G", "inverse", "loss", "masks")
    common.show(titles, rows, left=2)


if __name__ == "__main__":
    main()
