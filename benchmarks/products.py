"""Errors of float32 products in passes of TF32 or bfloat16, on real layers, without a GPU.

    python benchmarks/products.py [--layer N] [--samples N] [--calibration FILE]

The dense SmolLM2-135M-Instruct has the weights and inputs. A weight has its first 128 rows. All
products of float32 matrices are of one kind. Errors are against float64, relative, in the Frobenius
norm.

Gram       X^T X of 2,048 tokens
forward    X W^T
W G        a step of the solver
inverse    of the damped Gram of all tokens
loss       of the default solver's result, over the loss of float64's, less 1
masks      blocks that have the same mask in float64

A pass multiplies parts of the operands, which it takes as XLA does for GPUs: TF32 cuts off bits,
bfloat16 rounds to nearest. The CPU adds the products of parts in float32. The last two kinds add as
GPUs do. Cores for float32 add one product after the other. Tensor cores are assumed to add the
exact sum of eight products, and to round toward zero.
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
from prox24._jobs import forward
from prox24._jobs.observe import layer_inputs
from prox24._jobs.text import calibration_windows
from prox24._pruning.grams import add_tokens, empty_gram
from prox24._solvers.damping import damped_inverse

TOKENS, ROWS = 2048, 128
LINEARS = ("k_proj", "down_proj")


class Passes(NamedTuple):
    """An operand is a sum of parts; the smallest products of parts are left out.

    The CPU adds, or each float32 sum takes the exact sum of `together` products.
    """

    part: Callable[[Array], Array]
    parts: int
    together: int | None = None
    toward_zero: bool = False

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
    "float32, one by one": Passes(lambda x: x, 1, together=1),
    "tf32x3, tensor cores": Passes(tf32, 2, together=8, toward_zero=True),
}
KINDS = ("float32", *EMULATED)
multiply = functools.partial(jnp.matmul, precision="highest")


def emulated(x: Array, y: Array, precision: Any = None) -> Array:
    """`jnp.matmul`, for which `Passes` are a precision too."""
    if not isinstance(precision, Passes):
        return multiply(x, y, precision=precision)
    if x.ndim == y.ndim == 3:
        return jax.vmap(functools.partial(emulated, precision=precision))(x, y)
    by_steps = precision.together is not None and x.ndim == y.ndim == 2
    add = functools.partial(in_steps, kind=precision) if by_steps else multiply
    return functools.reduce(jnp.add, (add(*pair) for pair in precision.pairs(x, y)))


def in_steps(x: Array, y: Array, kind: Passes) -> Array:
    """x y, summed over a few columns of x and rows of y at a time."""
    together, more = kind.together, -x.shape[1] % kind.together
    left = jnp.pad(x, ((0, 0), (0, more))).reshape(len(x), -1, together).swapaxes(0, 1)
    right = jnp.pad(y, ((0, more), (0, 0))).reshape(-1, together, y.shape[1])

    def add(total: Array, factors: tuple[Array, Array]) -> tuple[Array, None]:
        exact = total.astype(float) + multiply(*(each.astype(float) for each in factors))
        total = exact.astype(jnp.float32)
        if kind.toward_zero:
            away = jnp.abs(total.astype(float)) > jnp.abs(exact)
            total = jnp.where(away, jnp.nextafter(total, jnp.zeros_like(total)), total)
        return total, None

    nothing = jnp.zeros((len(x), y.shape[1]), jnp.float32)
    return lax.scan(add, nothing, (left, right))[0]


def inputs_of(path: Path, last: int, text: prox24.Text) -> Iterator[tuple[str, Array, Array]]:
    """Names of a layer's linears, rows of the weights, and the inputs in the dense model."""
    model = forward.load_model(open_checkpoint(path))
    hidden = list(forward.embed_windows(model, calibration_windows(model.checkpoint, text)))
    for index in range(last):
        forward.run_into(model, index, forward.layer_weights(model, index), hidden, hidden)
    own, layer = forward.layer_weights(model, last), model.config.layers[last]
    seen = [layer_inputs(layer, own, jnp.asarray(each)) for each in hidden]
    for linear in forward.layer_linears(model.config, last):
        name = linear.tensor.split(".")[-2]
        if name in LINEARS:
            x = jnp.concatenate([each[linear.input] for each in seen])
            yield name, own[linear.weight][:ROWS].astype(jnp.float32), x.reshape(-1, x.shape[-1])


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
        output, step = matmul(x[:TOKENS], weight.T), matmul(weight, first)
        return gram.total, first, output, step, _inverse(gram.total)


def _inverse(gram: Array) -> Array:
    return damped_inverse(gram, jnp.asarray(0.01, gram.dtype)).matrix


def rows_of(name: str, weight: Array, x: Array) -> Iterator[list[str]]:
    """The lines of a linear."""
    exact_x, exact_weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    whole, first = exact_x.T @ exact_x, exact_x[:TOKENS].T @ exact_x[:TOKENS]
    best = prox24.solve(jnp.asarray(exact_weight), jnp.asarray(whole))
    masks = np.asarray(best.mask).reshape(-1, 4)

    def loss(solution: prox24.Solution) -> float:
        difference = np.asarray(solution.weight, np.float64) - exact_weight
        return np.sum((difference @ whole) * difference)

    for kind in KINDS:
        gram, own, output, step, inverted = computed(x, weight, kind)
        with products(kind):
            solution = prox24.solve(weight, gram)
        equal = np.all(np.asarray(solution.mask).reshape(-1, 4) == masks, axis=1)
        yield [
            name,
            kind,
            error(own, first),
            error(output, exact_x[:TOKENS] @ exact_weight.T),
            error(step, exact_weight @ np.asarray(own, np.float64)),
            error(inverted, np.asarray(_inverse(jnp.asarray(gram, float)))),
            f"{loss(solution) / loss(best) - 1:+.1e}",
            f"{np.mean(equal):.2%}",
        ]


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--samples", type=common.positive, default=8)
    common.add_calibration(parser)
    arguments = parser.parse_args()
    text = prox24.Text(arguments.calibration, arguments.samples)
    given = list(inputs_of(common.dense_model(), arguments.layer, text))
    jax.config.update("jax_enable_x64", True)
    with mock.patch.object(jnp, "matmul", emulated), mock.patch.dict(PRODUCTS, EMULATED):
        rows = [row for each in given for row in rows_of(*each)]
    titles = ("linear", "products", "Gram", "forward", "W G", "inverse", "loss", "masks")
    common.show(titles, rows)


if __name__ == "__main__":
    main()
