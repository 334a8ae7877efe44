"""Packed weights in the layouts of other libraries, read back by their own code."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_packed import bits, random_24

from prox24.packed import pack, to_bitmask, to_cutlass

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


@pytest.mark.parametrize("width", [4, 8, 36, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_of_a_mask_place_the_values(width, dtype):
    dense = with_few_nonzeros(random_24((5, width), dtype=dtype))
    values, mask = map(np.asarray, to_bitmask(pack(dense)))
    assert mask.dtype == np.uint8
    kept = np.unpackbits(mask, axis=1, bitorder="little")
    assert not kept[:, width:].any()
    kept = kept[:, :width].astype(bool)
    assert np.all(kept.reshape(5, -1, 4).sum(-1) == 2)
    read = np.zeros_like(dense)
    read[kept] = values.ravel()
    np.testing.assert_array_equal(bits(read), bits(dense))


@pytest.mark.parametrize(
    ("export", "weight", "said"),
    [
        (to_cutlass, jnp.zeros((32, 64), jnp.float32), "float16 or bfloat16, not float32"),
        (to_cutlass, jnp.zeros((30, 64), jnp.float16), r"multiples of 32 and 64, not \(30, 64\)"),
        (to_cutlass, jnp.zeros((32, 32), jnp.float16), r"multiples of 32 and 64, not \(32, 32\)"),
        (to_bitmask, jnp.zeros((2, 3, 4)), r"shape \(2, 3, 4\) packed along axis -1"),
    ],
)
def test_what_the_other_library_cannot_hold_is_refused(export, weight, said):
    with pytest.raises(ValueError, match=said):
        export(pack(weight))


@pytest.mark.parametrize("export", [to_cutlass, to_bitmask])
def test_another_axis_is_refused(export):
    with pytest.raises(ValueError, match="packed along axis -2"):
        export(pack(jnp.zeros((64, 32), jnp.float16), axis=-2))
