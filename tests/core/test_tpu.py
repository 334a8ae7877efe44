"""The TPU kernel, interpreted on the CPU and compiled ahead of time; nothing runs on a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from programs import output_of
from reference import assert_close, inverse_hessian

import prox24
from prox24._core import tpu

pytestmark = [pytest.mark.optimized, pytest.mark.slow]

PATTERNS = [(2, 4), (1, 4), (2, 8), (1, 2)]


def hard_blocks(shape, group):
    """Normal entries, and rows of ties, zeros, both ends of the range, NaN and infinities."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=shape).astype(np.float32)
    blocks = y.reshape(shape[0], -1, group)
    blocks[:4] *= 1e37
    blocks[4:8] *= 1e-37
    blocks[8:12] = 0
    blocks[12:16] = -1
    blocks[16:24] = np.round(2 * blocks[16:24]) / 2
    blocks[24:32] *= 10.0 ** rng.integers(-30, 30, size=blocks[24:32].shape)
    blocks[32, ::3, 1] = np.nan
    blocks[33, ::3, 0] = np.inf
    blocks[34] = -0.0
    return y


@pytest.mark.parametrize(
    ("pattern", "dtype", "columns"),
    [
        *((pattern, jnp.float32, 512) for pattern in [(2, 4), (1, 4), (1, 2)]),
        ((2, 4), jnp.bfloat16, 512),
        ((2, 4), jnp.float32, tpu.COLUMNS + 256),
    ],
)
def test_the_kernel_equals_the_planar_form_to_the_last_digit(pattern, dtype, columns):
    # Rows, and in the last case columns, that do not fill the last tile.
    y = jnp.asarray(hard_blocks((130, columns), pattern[1]), dtype)
    kernel = jax.jit(lambda y, lam: tpu.kernel(y, lam, *pattern, interpret=True))
    planar = jax.jit(lambda y, lam: tpu.planar(y, lam, *pattern))
    for lam in (0.0, 1e-30, 0.1, 0.5, 1.0, 30.0, np.inf, np.nan):
        expected, w = planar(y, jnp.float32(lam)), kernel(y, jnp.float32(lam))
        assert w.dtype == dtype
        w, expected = (np.asarray(x, np.float32) for x in (w, expected))
        # Near the smallest normal number, whether a product is flushed depends on what is fused.
        limits = {"rtol": float(jnp.finfo(dtype).eps), "atol": 2 * np.finfo(np.float32).tiny}
        np.testing.assert_allclose(w, expected, **limits)


@pytest.mark.parametrize(
    ("shape", "dtype", "lam", "served"),
    [
        ((128, 256), jnp.float32, 0.3, True),
        ((2, 3, 64, 256), jnp.bfloat16, 0.3, True),
        ((128, 256), jnp.float16, 0.3, False),
        ((64, 256), jnp.float32, 0.3, False),
        ((128, 260), jnp.float32, 0.3, False),
        ((128, 256), jnp.float32, np.full((128, 1), 0.3, np.float32), False),
    ],
)
def test_what_the_kernel_serves_is_what_is_lowered_for_a_tpu(shape, dtype, lam, served):
    program = jax.jit(lambda y: prox24.prox(y, lam))
    exported = export.export(program, platforms=["tpu"])(jax.ShapeDtypeStruct(shape, dtype))
    assert ("tpu_custom_call" in exported.mlir_module()) == served


def test_an_exported_program_may_serve_several_platforms_and_shapes():
    program = jax.jit(lambda y: prox24.prox(y, 0.3))
    y = jax.ShapeDtypeStruct((128, 256), jnp.float32)
    text = export.export(program, platforms=["cpu", "tpu"])(y).mlir_module()
    assert "tpu_custom_call" in text
    (rows,) = export.symbolic_shape("rows")
    y = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    assert "tpu_custom_call" not in export.export(program, platforms=["tpu"])(y).mlir_module()


@pytest.mark.parametrize("axes", [(1, None), (None, 0), (0, 0)])
def test_vmap_equals_separate_calls(axes):
    y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 128, 256)), jnp.float32)
    y, lam = y if axes[0] is not None else y[0], jnp.asarray([0.1, 0.4])
    y = y if y.ndim == 4 else y[0]
    mapped = jax.vmap(prox24.prox, axes)(y, lam if axes[1] == 0 else lam[0])
    for i in range(2):
        one = y if axes[0] is None else jnp.take(y, i, axes[0])
        expected = prox24.prox(one, lam[i] if axes[1] == 0 else lam[0])
        # Another program: M for an entry, grown by the inverse Hessian.
        grown = inverse_hessian(np.asarray(expected).reshape(-1, 4), lam[i if axes[1] == 0 else 0])
        assert_close(mapped[i], expected, 4 * grown)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is missing")
def test_compiled_for_tpus_it_moves_the_least_and_keeps_shardings():
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    found = output_of("compiled_tpu.py", JAX_PLATFORMS="cpu", **optimized)
    assert found["matmul"] == 2 * 4 * [{"kernels": 1, "collectives": []}]
    reports = found["prox"]
    assert len(reports) == 2 * (len(PATTERNS) + 1 + 7)
    assert [report for report in reports if report["kernels"] != report["expected"]] == []
    assert [report for report in reports if report["collectives"] or not report["kept"]] == []
