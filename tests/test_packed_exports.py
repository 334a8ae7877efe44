"""Packed weights in the layouts of other libraries, read back by their own code."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_packed import bits, random_24

from prox24.packed import pack, to_cutlass

SHAPES = [(32, 64), (64, 192), (96, 128)]


def with_few_nonzeros(dense):
    dense = dense.copy()
    dense[::3, ::5] = 0
    return dense


@pytest.fixture
def conversions():
    pytest.importorskip("torch")
    return pytest.importorskip("torch.sparse._semi_structured_conversions")


def in_torch(x):
    import torch

    x = np.asarray(x)
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def from_torch(x):
    import torch

    return x.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_reads_the_layout_of_cutlass_bit_for_bit(conversions, shape, dtype):
    dense = with_few_nonzeros(random_24(shape, dtype=dtype))
    parts = map(in_torch, to_cutlass(pack(dense)))
    read = conversions.sparse_semi_structured_to_dense_cutlass(*parts)
    np.testing.assert_array_equal(from_torch(read), bits(dense))


def test_pytorch_writes_the_same_where_two_of_every_block_are_nonzero(conversions):
    dense = random_24((64, 128), dtype="float16")
    expected = conversions.sparse_semi_structured_from_dense_cutlass(in_torch(dense))
    for ours, theirs in zip(to_cutlass(pack(dense)), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (jnp.zeros((32, 64), jnp.float32), "float16 or bfloat16, not float32"),
        (jnp.zeros((30, 64), jnp.float16), r"multiples of 32 and 64, not \(30, 64\)"),
        (jnp.zeros((32, 32), jnp.float16), r"multiples of 32 and 64, not \(32, 32\)"),
        (jnp.zeros((2, 3, 4)), r"shape \(2, 3, 4\) packed along axis -1"),
    ],
)
def test_what_the_other_library_cannot_hold_is_refused(weight, said):
    with pytest.raises(ValueError, match=said):
        to_cutlass(pack(weight))


def test_another_axis_is_refused():
    with pytest.raises(ValueError, match="packed along axis -2"):
        to_cutlass(pack(jnp.zeros((64, 32), jnp.float16), axis=-2))
