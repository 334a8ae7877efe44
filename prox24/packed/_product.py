"""The product with a packed weight, and its derivatives."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.typing import ArrayLike

from prox24._core.placement import is_on_one_device
from prox24.packed._choice import AUTO, IMPLEMENTATIONS, UNPACK, Case, choose
from prox24.packed._codes import BLOCK, KEPT, place
from prox24.packed._format import Packed24, check_words
from prox24.packed._kernels import xla

PLATFORMS = ("cpu", "cuda", "tpu")


def matmul(x: ArrayLike, w: Packed24, *, implementation: str = AUTO) -> Array:
    """x W^T for a packed W (out, in); some implementations never have the whole W in memory.

    "unpack" lets XLA unpack the weight and multiply. "auto" runs the kernel for CPUs where it can,
    and "unpack" everywhere else. Every other implementation runs only by its name. The page
    docs/packed.md says which products it can compute.

    Kernels are for programs of one device and for the inside of `shard_map`, since XLA does not
    partition them. "auto" unpacks in programs of several devices, and in exported programs, which
    run elsewhere.

    The product is differentiable in `x` and in the values of `w`, in reverse mode, once or more.
    Sums are of float32 products at the highest precision, or of float64 products if `x` is float64.
    The result is rounded once. If an entry of `x` is not finite, implementations differ: "unpack"
    also multiplies the pruned zeros, and then returns NaN.

    Args:
      x: shape (..., in), of the dtype of `w`.
      w: a packed weight with two axes: (out, in) packed along -1, or a Flax kernel (in, out) packed
        along -2. For stacked matrices use `jax.vmap` or `jax.lax.scan`. Reshape
        other weights to matrices before you pack them.
      implementation: "auto", "unpack", "cpu", "cuda", "cusparselt" or "tpu".

    Returns:
      Array (..., out) of that dtype.

    Raises:
      ValueError: shapes or dtypes do not fit, or the implementation is unknown. If a named
        implementation cannot compute the product, the error comes when the program is compiled.

    Example:
      >>> from prox24.packed import pack
      >>> matmul(jnp.arange(4.0), pack(jnp.array([[0.0, 1.0, 0.0, 2.0]]))).tolist()
      [7.0]
    """
    x = jnp.asarray(x)
    check_words(w)
    if w.values.ndim != 2:
        raise ValueError(
            f"matmul takes a packed weight of two axes, not of shape {w.shape}; map it"
        )
    inputs = w.values.shape[-1] // KEPT * BLOCK
    if not x.ndim or x.shape[-1] != inputs:
        raise ValueError(f"x of shape {x.shape} does not end in the {inputs} inputs of w")
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}; convert one of them")
    names = AUTO, UNPACK, *IMPLEMENTATIONS
    if implementation not in names:
        raise ValueError(f"implementation {implementation!r} is none of {', '.join(names)}")
    return _matmul(implementation, *_varying_alike(x, w.values, w.codes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation: str, x: Array, values: Array, codes: Array) -> Array:
    return _product(x, values, codes, implementation=implementation)


def _forward(
    implementation: str, x: Array, values: Array, codes: Array
) -> tuple[Array, tuple[Array, ...]]:
    # Not `_product`, which has no derivative. `_matmul` can be differentiated again.
    return _matmul(implementation, x, values, codes), (x, values, codes)


def _backward(
    implementation: str, saved: tuple[Array, ...], slope: Array
) -> tuple[Array, Array, None]:
    x, values, codes = saved
    # The product is linear in each of the two.
    of_x = jax.linear_transpose(lambda x: xla.run(x, values, codes), x)
    of_values = jax.linear_transpose(lambda values: xla.multiply(x, place(values, codes)), values)
    return *of_x(slope), *of_values(slope), None


_matmul.defvjp(_forward, _backward)


def _varying_alike(*arrays: Array) -> list[Array]:
    """Makes every array vary, inside shard_map, over all axes over which any array varies.

    The result will vary over these axes. Arithmetic does this by itself, and then sums the
    derivatives, but a primitive does not.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return list(arrays)
    # XLA folds these zeros away.
    zero = sum(lax.stop_gradient(array).astype(jnp.int32).ravel()[:1].sum() * 0 for array in arrays)
    return [jnp.where(zero == 0, array, jnp.zeros_like(array)) for array in arrays]


product_p = Primitive("matmul24")


@functools.partial(jax.jit, static_argnames="implementation")
def _product(x: Array, values: Array, codes: Array, *, implementation: str) -> Array:
    return product_p.bind(x, values, codes, implementation=implementation)


def _by_xla(x: Array, values: Array, codes: Array, *, implementation: str) -> Array:
    if implementation not in (AUTO, UNPACK):
        raise ValueError(
            f"implementation {implementation!r} is for one weight in a program of one device: use "
            "jax.jit, jax.lax.scan over weights, and shard_map over all axes of a mesh"
        )
    return xla.run(x, values, codes)


def _shape_of_product(*operands: Any, implementation: str) -> Any:
    return jax.make_jaxpr(xla.run)(*operands).out_avals[0]


def _lower(platform: str, context: Any, *operands: Any, implementation: str) -> Any:
    x, values, _ = context.avals_in
    run: Callable[..., Array] = functools.partial(_by_xla, implementation=implementation)
    # Exported programs run elsewhere, without the kernels of this process. Some have symbolic
    # shapes.
    exported = context.module_context.lowering_parameters.for_export
    known = all(isinstance(size, int) for size in (*x.shape, *values.shape))
    if known and not exported and is_on_one_device(context):
        batch = math.prod(x.shape[:-1])
        case = Case(platform, x.dtype.name, values.shape[0], x.shape[-1], batch)
        run = choose(implementation, case)
    return mlir.lower_fun(run, multiple_results=False)(context, *operands)


def _map(operands: Any, axes: Any, *, implementation: str) -> tuple[Array, int]:
    (x, values, codes), (of_x, of_values, of_codes) = operands, axes
    if of_values is None and of_codes is None:
        return _product(jnp.moveaxis(x, of_x, 0), values, codes, implementation=implementation), 0
    by_xla = functools.partial(_by_xla, implementation=implementation)
    return jax.vmap(by_xla, axes)(x, values, codes), 0


product_p.def_impl(_by_xla)
product_p.def_abstract_eval(_shape_of_product)
mlir.register_lowering(product_p, mlir.lower_fun(_by_xla, multiple_results=False))
for _platform in PLATFORMS:
    mlir.register_lowering(product_p, functools.partial(_lower, _platform), platform=_platform)
batching.primitive_batchers[product_p] = _map
