"""The precision of products, as traced: nothing is computed."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny import config_dict

import prox24
from prox24._core.precision import check_products, einsum, matmul, products
from prox24._jobs.observe import observe_layer
from prox24._models import spec
from prox24._models.families import config_from_hf
from prox24._pruning.grams import empty_gram
from prox24.errors import RecipeError

TF32X3, HIGHEST = "TF32_TF32_F32_X3", "Precision.HIGHEST"
FORMS = {
    "matmul": matmul,
    "einsum": lambda x, y: einsum("ij,jk->ik", x, y),
    "three": lambda x, y: einsum("ij,jk,kl->il", x, y, x),
    "gradient": jax.grad(lambda x, y: matmul(x, y).sum()),
}


def precisions(function, *arguments):
    """Of all products of a function; "" for JAX's default."""
    text = str(jax.make_jaxpr(function)(*arguments))
    found = re.findall(r"dot_general\[\s+dimension_numbers=.*\s+(?:precision=\(?([\w.]+))?", text)
    assert len(found) == text.count("dot_general[") > 0
    return set(found)


@pytest.mark.parametrize("form", FORMS)
def test_float32_matrices_are_multiplied_as_chosen(form):
    x = jnp.ones((4, 4), jnp.float32)
    with products("tf32x3"):
        assert precisions(FORMS[form], x, x) == {TF32X3}
    assert precisions(FORMS[form], x, x) == {HIGHEST}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_matrices_of_other_dtypes_are_multiplied_as_ever(dtype):
    x = jnp.ones((4, 4), dtype)
    with products("tf32x3"):
        assert precisions(matmul, x, x) == {HIGHEST}
        assert matmul(x, x).dtype == dtype


def test_a_low_default_of_jax_does_not_change_the_products():
    x = jnp.ones((4, 4), jnp.float32)
    with jax.default_matmul_precision("bfloat16"):
        assert precisions(matmul, x, x) == {HIGHEST}
        with products("tf32x3"):
            assert precisions(matmul, x, x) == {TF32X3}


def test_the_choice_does_not_change_the_products_of_others():
    x = jnp.ones((4, 4), jnp.float32)
    with products("tf32x3"):
        assert precisions(jnp.matmul, x, x) == {""}


SOLVED = {
    "default": (prox24.ADMM(), prox24.ConjugateGradients()),
    "prox": (prox24.ProximalGradient(), prox24.GradientSteps()),
    "sparsegpt": (prox24.SparseGPT(), None),
    "wanda": (prox24.Wanda(), prox24.LeastSquares()),
}


@pytest.mark.parametrize("methods", SOLVED.values(), ids=SOLVED)
def test_every_product_of_a_solver_is_as_chosen(methods):
    weight, gram = jnp.ones((8, 64), jnp.float32), jnp.eye(64, dtype=jnp.float32)

    def solve(weight, gram):
        corrected = prox24.correct_inputs(weight, gram, gram)
        return prox24.solve(corrected, gram, *methods)

    with products("tf32x3"):
        assert precisions(solve, weight, gram) == {TF32X3}


def test_every_product_of_a_layer_and_its_grams_is_as_chosen():
    layer = config_from_hf(config_dict()).layers[0]
    shapes = spec.layer_shapes(layer)
    weights = {name: jnp.ones(shape, jnp.float32) for name, shape in shapes.items()}
    hidden = jnp.ones((2, 8, layer.hidden), jnp.float32)
    sums = {"attention_input": empty_gram(layer.hidden)}

    def observe(weights, hidden):
        return observe_layer(layer, weights, hidden, hidden, sums, sums)

    with products("tf32x3"):
        assert precisions(observe, weights, hidden) == {TF32X3}


@pytest.mark.parametrize(
    "device",
    [{}, {"compute_capability": "7.5"}, {"compute_capability": "gfx942"}],
    ids=["no GPU", "before A100", "AMD"],
)
def test_products_that_a_device_lacks_are_refused_by_name(monkeypatch, device):
    device = SimpleNamespace(device_kind="this one", **device)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    check_products("float32")
    with pytest.raises(RecipeError, match=r"'tf32x3' need an NVIDIA GPU .* is this one: choose"):
        check_products("tf32x3")


@pytest.mark.parametrize("capability", ["8.0", "9.0", "12.1"])
def test_products_that_a_device_has_are_taken(monkeypatch, capability):
    device = SimpleNamespace(device_kind="this one", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    check_products("tf32x3")
