"""An identity that tells calibration which weight an array is multiplied with."""

import operator
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# A primitive stays in the jaxpr of any traced function. So calibration needs no hooks, and also
# works for functions compiled before it.
tap_p = Primitive("prox24_tap")


def tap(name: str, x: Array, axis: int | tuple[int, ...] = 0) -> Array:
    """Returns x, and tells `prox24.calibrate` that the weight called `name` is multiplied with it.

    It is needed only if `prox24.calibrate` cannot see the product: the weight is reshaped, sliced,
    masked or unpacked before, or enters a kernel written by hand. A weight that `lax.scan` runs
    over has a Gram for each slice. All other rows are summed in one Gram, also the rows of all
    indices under `jax.vmap`. Outside of a calibration `tap` costs nothing, and `jax.jit`,
    `jax.grad` and `jax.vmap` see an identity.

    Args:
      name: the weight's path in the parameters, components joined by "/": "layers/0/kernel".
      x: the inputs of the weight, shape (..., in), any number of rows. For k summed axes, the last
        k axes of x are the features.
      axis: the axis of the weight that the product sums over, counted from 0. It is 0 for a weight
        (in, out) and 1 for (out, in). Or several axes, in the order of x's last axes.

    Returns:
      x. The model must use this value in place of its argument.

    Example:
      >>> weight = jnp.ones((4, 2))
      >>> (tap("weight", jnp.ones((3, 4))) @ weight).shape
      (3, 2)
    """
    axes = tuple(axis) if isinstance(axis, tuple) else (operator.index(axis),)
    return tap_p.bind(jnp.asarray(x), name=name, axes=axes)


def _batch(arguments: Any, dimensions: Any, **params: Any) -> tuple[Array, int]:
    # The batch axis comes first, so that the features stay last.
    return tap_p.bind(jnp.moveaxis(arguments[0], dimensions[0], 0), **params), 0


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Any]:
    return tap_p.bind(*primals, **params), tangents[0]


tap_p.def_impl(lambda x, **params: x)
tap_p.def_abstract_eval(lambda x, **params: x)
mlir.register_lowering(tap_p, lambda context, x, **params: [x])
batching.primitive_batchers[tap_p] = _batch
ad.primitive_jvps[tap_p] = _jvp
