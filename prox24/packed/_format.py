"""A 2:4 weight as its kept values and their places: 9/16 of the bytes in 16-bit types."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from prox24._core.blocks import checked_axis
from prox24._core.placement import whole
from prox24._core.tracing import is_traced
from prox24.packed._codes import BLOCK, ENTRIES_PER_WORD, KEPT, compress, expand, words_of

DTYPES = ("float64", "float32", "float16", "bfloat16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed24:
    """A 2:4 array, packed along the axis of its blocks; `pack` makes one.

    The packed axis of the weight is the last axis of both arrays, so the entries of a dot product
    lie together. All else follows from the shapes of the arrays. So a slice, a shard or a stack of
    packed weights is a packed weight. Both arrays shard by the same `PartitionSpec`. A shard of
    columns must have whole words, each of 32 inputs.

    Attributes:
      values: shape (..., in / 2), the two kept entries of every block.
      codes: shape (..., ceil(in / 32)), uint32, see `prox24.packed._codes`.
      axis: negative, the axis of the weight along which blocks run.
      remainder: in modulo 32, the number of entries of an incomplete last word. It shows whether an
        axis without whole words was cut.
    """

    values: Array
    codes: Array
    axis: int = dataclasses.field(default=-1, metadata={"static": True})
    remainder: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        *shape, half = self.values.shape
        shape.insert(len(shape) + 1 + self.axis, half // KEPT * BLOCK)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.values.nbytes + self.codes.nbytes


def pack(w: ArrayLike, axis: int = -1) -> Packed24:
    """Packs a 2:4 weight; `unpack` gives it back bit for bit.

    NaN and subnormal numbers are nonzero, and -0.0 is zero. A block with fewer than two nonzeros
    first keeps entries -0.0, and then its earliest zeros. Only a -0.0 that is not kept loses its
    sign: `unpack` gives +0.0.

    It is differentiable in `w`. Blocks are independent, so the result is sharded like `w`.

    Args:
      w: float64, float32, float16 or bfloat16, its length along `axis` a multiple of four.
      axis: the axis along which the blocks run: -1 for weights (out, in), -2 for Flax kernels
        (in, out).

    Returns:
      `Packed24`. Under `jit` and other transformations, which hide the entries, both values of a
      block with more than two nonzeros become NaN.

    Raises:
      ValueError: a block has more than two nonzeros; the message has the index of the first such
        block. Also if the dtype is another one or JAX would round it, if the axis does not exist,
        or if four does not divide its length.

    Example:
      >>> w = pack(jnp.array([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0]]))
      >>> w.values.tolist(), w.shape
      ([[1.0, 2.0], [3.0, 0.0]], (2, 4))
    """
    given, w = getattr(w, "dtype", None), jnp.asarray(w)
    if w.dtype.name not in DTYPES:
        raise ValueError(f"pack takes {', '.join(DTYPES)}, not {w.dtype}")
    if given == np.float64 != w.dtype:
        raise ValueError("w is float64, which JAX rounds unless jax_enable_x64 is set")
    axis = checked_axis(w.shape, axis) - w.ndim
    if w.shape[axis] % BLOCK:
        raise ValueError(f"axis {axis} of shape {w.shape} is not divisible by {BLOCK}")
    values, codes, excess = _pack(w, axis)
    # Under jax.grad the excess is a number, since it has no derivative, but w is not.
    if not (is_traced(w) or is_traced(excess)):
        _check(w, excess, axis)
    return Packed24(values, codes, axis, w.shape[axis] % ENTRIES_PER_WORD)


def unpack(w: Packed24) -> Array:
    """The weight before packing, differentiable in its values.

    Args:
      w: a packed weight. Its codes must be valid, as from `pack` and `from_arrays`.

    Returns:
      Array of shape `w.shape` and dtype `w.dtype`.

    Raises:
      ValueError: the arrays do not fit each other, for example after a cut within a word.

    Example:
      >>> unpack(pack(jnp.array([0.0, 1.0, 0.0, 2.0]))).tolist()
      [0.0, 1.0, 0.0, 2.0]
    """
    check_words(w)
    return _unpack(w)


def check_words(w: Packed24) -> None:
    """Raises ValueError unless w is packed, and its codes, values and axis fit each other."""
    if not isinstance(w, Packed24):
        raise ValueError(f"w is a {type(w).__name__}, not packed: give prox24.packed.pack(w)")
    if not -w.values.ndim <= w.axis < 0:
        raise ValueError(
            f"axis {w.axis} is not in values of shape {w.values.shape}: map or slice axes before it"
        )
    *rows, half = w.values.shape
    entries = half // KEPT * BLOCK
    if (
        half % KEPT
        or entries % ENTRIES_PER_WORD != w.remainder
        or w.codes.shape != (*rows, words_of(entries))
        or w.codes.dtype != jnp.uint32
    ):
        raise ValueError(
            f"codes, {w.codes.dtype} of shape {w.codes.shape}, do not fit values of shape "
            f"{w.values.shape} and a remainder of {w.remainder}: cut both alike, and a packed axis "
            f"at multiples of {ENTRIES_PER_WORD} entries only"
        )


@jax.jit
def _unpack(w: Packed24) -> Array:
    return jnp.moveaxis(expand(w.values, w.codes), -1, w.axis)


@functools.partial(jax.jit, static_argnums=1)
def _pack(w: Array, axis: int) -> tuple[Array, Array, Array]:
    return compress(jnp.moveaxis(w, axis, -1))


def _check(w: Array, excess: Array, axis: int) -> None:
    w, excess = whole(w), whole(excess)  # An explicit mesh forbids joining axes that it cuts.
    count = int(jnp.count_nonzero(excess))
    if not count:
        return
    index = [int(i) for i in np.unravel_index(int(jnp.argmax(excess.ravel())), excess.shape)]
    entries = jnp.moveaxis(w, axis, -1).reshape(*excess.shape, BLOCK)[tuple(index)].tolist()
    index.insert(len(index) + axis, index.pop())
    raise ValueError(
        f"w is not 2:4 along axis {axis}: {count} blocks have more than two nonzeros, the first of "
        f"which is {tuple(index)}, {entries}; prune w, or pack it along the axis it was pruned on"
    )
