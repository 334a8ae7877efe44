"""The packed format: bit-exact round trips, its rules, transformations, files and exports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from prox24._checkpoints.safetensors_file import open_file
from prox24.errors import CheckpointError
from prox24.packed import Packed24, from_arrays, pack, to_arrays, to_cutlass, unpack

DTYPES = {"float64": np.uint64, "float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
PLACES = np.array([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
ROWS, WIDTH = 3, 40


def scatter(values, pairs):
    """The dense array of any dtype, by another algorithm: entries are put where they belong."""
    dense = np.zeros((*pairs.shape, 4), values.dtype)
    np.put_along_axis(dense, PLACES[pairs], values.reshape(*pairs.shape, 2), axis=-1)
    return dense.reshape(*pairs.shape[:-1], 4 * pairs.shape[-1])


def decode(w):
    """The dense array, from the bytes of a packed one."""
    codes, values = np.asarray(w.codes).view(np.uint8), np.asarray(w.values)
    code = np.stack([codes & 15, codes >> 4], axis=-1)
    code = code.reshape(*codes.shape[:-1], 2 * codes.shape[-1])
    code = code[..., : values.shape[-1] // 2]
    dense = np.zeros((*code.shape, 4), values.dtype)
    places = np.stack([code & 3, code >> 2], axis=-1).astype(int)
    np.put_along_axis(dense, places, values.reshape(*code.shape, 2), axis=-1)
    return np.moveaxis(dense.reshape(*code.shape[:-1], 4 * code.shape[-1]), -1, w.axis)


def random_24(shape=(ROWS, WIDTH), axis=-1, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shape = np.moveaxis(np.empty(shape), axis, -1).shape
    pairs = rng.integers(6, size=(*shape[:-1], shape[-1] // 4))
    values = rng.normal(size=(*shape[:-1], shape[-1] // 2))
    return np.moveaxis(scatter(values, pairs), -1, axis).astype(dtype)


def bits(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_every_bit_comes_back(dtype, data):
    integer = DTYPES[dtype]
    # Zero with a sign is the one thing that may be lost.
    sign = 1 << (8 * np.dtype(integer).itemsize - 1)
    any_bits = st.integers(0, 2 * sign - 1).filter(lambda entry: entry != sign)
    values = data.draw(arrays(integer, (ROWS, WIDTH // 2), elements=any_bits))
    pairs = data.draw(arrays(np.int64, (ROWS, WIDTH // 4), elements=st.integers(0, 5)))
    dense = scatter(values, pairs).view(np.dtype(dtype))
    packed = pack(dense)
    assert packed.dtype == dtype
    np.testing.assert_array_equal(bits(unpack(packed)), bits(dense))
    np.testing.assert_array_equal(bits(decode(packed)), bits(dense))


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 64), -1), ((64, 5), -2), ((2, 36, 3), 1), ((4,), 0), ((0, 32), 1)]
)
def test_blocks_run_along_any_axis(shape, axis):
    w = random_24(shape, axis)
    packed = pack(w, axis)
    assert (packed.shape, packed.axis) == (shape, axis if axis < 0 else axis - len(shape))
    np.testing.assert_array_equal(unpack(packed), w)
    np.testing.assert_array_equal(decode(packed), w)


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 9 / 16), ("float32", 17 / 32)])
def test_bytes_are_those_of_half_of_the_entries_and_of_four_bits_a_block(dtype, ratio):
    w = jnp.zeros((4, 64), dtype)
    assert pack(w).nbytes == ratio * w.nbytes


@pytest.mark.parametrize(
    ("block", "values", "places"),
    [
        ([0, 0, 0, 0], [0, 0], (0, 1)),
        ([0, 0, 0, 5], [0, 5], (0, 3)),
        ([0, 5, -0.0, 0], [5, -0.0], (1, 2)),
        ([-0.0, 5, 0, -0.0], [-0.0, 5], (0, 1)),
        ([-0.0, 5, 0, 6], [5, 6], (1, 3)),
        ([0, 0, np.nan, 1], [np.nan, 1], (2, 3)),
        ([0, 1e-40, 0, 1], [1e-40, 1], (1, 3)),
    ],
)
def test_which_entries_of_a_block_are_kept(block, values, places):
    packed = pack(np.array(block, np.float32))
    np.testing.assert_array_equal(bits(packed.values), bits(np.array(values, np.float32)))
    assert packed.codes.tolist() == [places[0] | places[1] << 2]


@pytest.mark.parametrize(
    ("shape", "axis", "block"), [((3, 64), 1, "(2, 5)"), ((64, 3), 0, "(5, 2)")]
)
@pytest.mark.parametrize("third", [1.0, np.nan, 1e-40])
def test_a_block_with_three_nonzeros_is_named_and_becomes_nan_under_jit(shape, axis, block, third):
    w = np.zeros(shape, np.float32)
    np.moveaxis(w, axis, -1)[2, 20:23] = 1.0, 2.0, third
    with pytest.raises(ValueError, match="1 blocks have more than two nonzeros") as error:
        pack(w, axis)
    assert block in str(error.value)
    assert "\n" not in str(error.value)
    values = np.asarray(jax.jit(pack, static_argnums=1)(w, axis).values)
    assert np.isnan(values[2, 10:12]).all()
    assert np.isnan(values).sum() == 2
    total, _ = jax.value_and_grad(lambda w: jnp.sum(pack(w, axis).values))(w)
    assert np.isnan(total)


@pytest.mark.parametrize(
    ("w", "words"),
    [
        (np.zeros((2, 6), np.float32), "is not divisible by 4"),
        (np.zeros((2, 8), np.int32), "not int32"),
        (np.zeros(8, np.float32), r"shape \(8,\) has no axis 1"),
    ],
)
def test_what_cannot_be_packed_is_named(w, words):
    with pytest.raises(ValueError, match=words):
        pack(w, 1)


# Transformations


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_is_packed_and_unpacked_by_vmap_and_scan(axis):
    stack = random_24((2, ROWS, WIDTH) if axis else (2, WIDTH, ROWS), axis + 1)
    packed = jax.vmap(lambda w: pack(w, axis))(stack)
    assert packed.shape == stack.shape
    np.testing.assert_array_equal(jax.vmap(unpack)(packed), stack)
    _, layers = jax.lax.scan(lambda none, layer: (none, unpack(layer)), None, packed)
    np.testing.assert_array_equal(layers, stack)
    second = jax.tree.map(lambda array: array[1], packed)
    np.testing.assert_array_equal(unpack(second), stack[1])


def test_gradients_pass_through_both_ways():
    w = random_24()
    packed, slope = pack(w), np.random.default_rng(1).normal(size=w.shape).astype(np.float32)

    def of_values(values):
        return jnp.sum(unpack(dataclasses.replace(packed, values=values)) * slope)

    kept = decode(dataclasses.replace(packed, values=np.ones_like(packed.values))) != 0
    np.testing.assert_array_equal(jax.grad(of_values)(packed.values).ravel(), slope[kept])
    through = jax.grad(lambda w: jnp.sum(unpack(pack(w)) * slope))(jnp.asarray(w))
    np.testing.assert_array_equal(through, np.where(kept, slope, 0))


def test_gradients_pass_through_shard_map():
    w, rows = jnp.asarray(random_24()), jax.P("rows")
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def cubes(w):
        return jnp.sum(pack(w).values ** 3)

    mapped = jax.shard_map(lambda w: cubes(w)[None], mesh=mesh, in_specs=rows, out_specs=rows)
    found = jax.grad(lambda w: mapped(w)[0])(w)
    np.testing.assert_array_equal(found, jax.grad(cubes)(w))


def test_what_is_not_packed_or_has_another_axis_is_refused():
    kernel = pack(random_24((64, 8), axis=-2), axis=-2)
    with pytest.raises(ValueError, match=r"axis -2 is not in values of shape \(32,\)"):
        unpack(jax.tree.map(lambda array: array[0], kernel))
    with pytest.raises(ValueError, match="not packed: give"):
        unpack(jnp.ones((8, 64)))


def test_a_block_with_three_nonzeros_is_named_on_an_explicit_mesh():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="w is not 2:4 along axis -1: 16 blocks"):
        pack(jax.device_put(jnp.ones((2, 32)), jax.NamedSharding(mesh, jax.P(None, "rows"))))


def test_a_cut_within_a_word_is_refused():
    packed = pack(random_24((2, 80)))
    halves = Packed24(packed.values[:, :20], packed.codes[:, :2], remainder=packed.remainder)
    for function in (unpack, to_cutlass, functools.partial(to_arrays, "up")):
        with pytest.raises(ValueError, match="at multiples of 32"):
            function(halves)


# Named arrays


@pytest.mark.parametrize(
    ("dtype", "shape", "axis"), [("float64", (3, 40), -1), ("bfloat16", (64, 3), -2)]
)
def test_safetensors_give_back_what_they_were_given(dtype, shape, axis, tmp_path):
    packed = pack(random_24(shape, axis, dtype), axis)
    save_file(to_arrays("up", packed) | to_arrays("down", packed), tmp_path / "file")
    stored = {name: source.read() for name, source in open_file(tmp_path / "file").items()}
    read = from_arrays("up", stored)
    assert jax.tree.structure(read) == jax.tree.structure(packed)
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(packed), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(bits(ours), bits(theirs))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("values", lambda a: None, "up.values is missing"),
        ("values", lambda a: a.astype(np.int32), "up.values is int32"),
        ("values", lambda a: a[:, :-1], "even last axis"),
        ("values", lambda a: a[0, 0], "shape ()"),
        ("values", lambda a: a[:, :-4], "expected is uint32 of shape (3, 1)"),
        ("codes", lambda a: a.astype(np.int32), "up.codes is int32"),
        ("codes", lambda a: a[:-1], "up.codes is uint32 of shape (2, 2)"),
        ("axis", lambda a: a.astype(np.int64), "up.axis"),
        ("axis", lambda a: a - 2, "up.axis"),
        ("codes", lambda a: a & np.uint32(0xFFFFF0FF), "the code 0 of block (0, 2)"),
        ("codes", lambda a: a | np.array([0, 1 << 8], np.uint32), "the code 1 of block (0, 10)"),
    ],
)
def test_damaged_arrays_are_named(part, change, words):
    stored = to_arrays("up", pack(random_24()))
    changed = change(stored.pop(f"up.{part}"))
    if changed is not None:
        stored[f"up.{part}"] = np.asarray(changed)
    with pytest.raises(CheckpointError) as error:
        from_arrays("up", stored)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_values_that_jax_would_round_are_refused():
    given = random_24().astype(np.float64)
    stored = to_arrays("up", pack(given))
    assert from_arrays("up", stored).dtype == np.float64
    with jax.enable_x64(False), pytest.raises(CheckpointError, match=r"up.values is float64"):
        from_arrays("up", stored)
    with jax.enable_x64(False), pytest.raises(ValueError, match="w is float64, which JAX rounds"):
        pack(given)


# Other libraries


@pytest.mark.parametrize(
    ("shape", "dtype"), [((32, 64), "float16"), ((64, 192), "bfloat16"), ((96, 128), "float16")]
)
def test_pytorch_reads_the_layout_of_cutlass_bit_for_bit(shape, dtype):
    torch = pytest.importorskip("torch")
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    dense = random_24(shape, dtype=dtype)
    dense[::3, ::5] = 0  # blocks with fewer nonzeros
    values, metadata = (torch.from_dlpack(array) for array in to_cutlass(pack(dense)))
    read = conversions.sparse_semi_structured_to_dense_cutlass(values, metadata)
    np.testing.assert_array_equal(read.view(torch.int16).numpy().view(np.uint16), bits(dense))


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "words"),
    [
        ((32, 64), -1, "float32", "float16 or bfloat16, not float32"),
        ((30, 64), -1, "float16", r"multiples of 32 and 64, not \(30, 64\)"),
        ((32, 32), -1, "float16", r"multiples of 32 and 64, not \(32, 32\)"),
        ((2, 32, 64), -1, "float16", r"shape \(2, 32, 64\) packed along axis -1"),
        ((64, 32), -2, "float16", "packed along axis -2"),
    ],
)
def test_what_cutlass_cannot_hold_is_refused(shape, axis, dtype, words):
    with pytest.raises(ValueError, match=words):
        to_cutlass(pack(jnp.zeros(shape, dtype), axis))
