"""Proximal gradient descent against scikit-learn, enumeration and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from sklearn.linear_model import Lasso

import prox24
from prox24 import Descent, proximal_gradient

pytestmark = pytest.mark.usefixtures("standard_promotion")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 20)) @ np.diag(np.linspace(0.2, 3, 20))
TRUE = RNG.normal(size=20) * (np.arange(20) % 3 == 0)
Y = X @ TRUE + 0.1 * RNG.normal(size=60)


def soft(w, lam, scaling):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - lam * scaling, 0)


def squares(w, x=X, y=Y):
    return jnp.sum((x @ w - y) ** 2) / (2 * len(y))


@pytest.mark.parametrize("options", [{}, {"momentum": False}, {"step": 0.05}])
def test_the_lasso_is_that_of_scikit_learn(options):
    found = proximal_gradient(
        squares, jnp.zeros(20), soft, 0.1, tolerance=1e-9, max_steps=20_000, **options
    )
    expected = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X, Y).coef_
    assert found.outcome is Descent.CONVERGED
    if not options:
        plain = proximal_gradient(
            squares, jnp.zeros(20), soft, 0.1, tolerance=1e-9, max_steps=20_000, momentum=False
        )
        assert found.steps < plain.steps / 2
    objective = [float(squares(w) + 0.1 * jnp.abs(w).sum()) for w in (found.params, expected)]
    assert objective[0] == pytest.approx(objective[1], rel=1e-12)
    np.testing.assert_array_equal(found.params != 0, expected != 0)


@pytest.mark.parametrize("momentum", [True, False])
def test_rounding_of_the_value_does_not_lengthen_the_steps(momentum):
    origin = jnp.asarray(Y[:32], jnp.float32)

    def far_from_zero(w):
        return jnp.sum((w - origin) ** 2) / 2 + jnp.float32(1e4)

    start = jnp.zeros(32, jnp.float32)
    found = proximal_gradient(far_from_zero, start, soft, 0.1, momentum=momentum)
    assert found.outcome is Descent.CONVERGED
    # Entries round to 1e-7 of their size. The tolerance is 1e-5.
    np.testing.assert_allclose(found.params, soft(origin, 0.1, 1), rtol=1e-6, atol=2e-5)


def test_steps_grow_from_a_start_that_is_far_too_short():
    x, y = jnp.asarray(1e-4 * X, jnp.float32), jnp.asarray(Y, jnp.float32)

    def identity(w, lam, scaling):
        return w

    found = proximal_gradient(
        lambda w: squares(w, x, y), jnp.zeros(20, jnp.float32), identity, tolerance=1e-8
    )
    assert found.outcome is Descent.CONVERGED
    least = np.linalg.lstsq(np.asarray(X), np.asarray(Y), rcond=None)[0]
    assert float(squares(found.params, x, y)) == pytest.approx(float(squares(least)), rel=1e-2)


def test_a_layer_under_the_penalty_has_the_least_loss_of_its_mask():
    gram = X[:, :4].T @ X[:, :4]
    origin = jnp.asarray([1.0, -0.9, 0.3, 0.2])

    def of_penalty(w, lam, scaling):
        return prox24.prox(w, lam * scaling)

    def found(origin):
        def loss(w):
            return (w - origin) @ gram @ (w - origin) / 2

        return proximal_gradient(loss, origin, of_penalty, 1e4, tolerance=1e-11)

    params = found(origin).params
    assert found(origin).outcome is Descent.CONVERGED
    assert prox24.is_sparse(params)
    kept = np.flatnonzero(params)
    inverse = np.zeros((4, 4))  # of the least squares on the mask
    inverse[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], gram[kept])
    np.testing.assert_allclose(params, inverse @ origin, rtol=0, atol=1e-8)
    jacobian = jax.jacrev(lambda origin: found(origin).params)(origin)
    np.testing.assert_allclose(jacobian, inverse, rtol=0, atol=1e-6)


def test_derivatives_are_those_of_finite_differences():
    def solution(lam, y):
        found = proximal_gradient(
            squares, jnp.zeros(20), soft, lam, X, y, tolerance=1e-11, max_steps=50_000
        )
        return jnp.sum(found.params**2)

    for argument, given in enumerate((jnp.asarray(0.1), jnp.asarray(Y))):
        gradient = jax.grad(solution, argument)(jnp.asarray(0.1), jnp.asarray(Y))
        direction = jnp.asarray(RNG.normal(size=given.shape))
        both = [[jnp.asarray(0.1), jnp.asarray(Y)] for _ in range(2)]
        for sign, point in zip((1, -1), both, strict=True):
            point[argument] = point[argument] + sign * 1e-4 * direction
        expected = (solution(*both[0]) - solution(*both[1])) / 2e-4
        assert float(jnp.sum(gradient * direction)) == pytest.approx(float(expected), rel=1e-5)


def test_a_start_of_integers_is_refused():
    with pytest.raises(ValueError, match="params has int64, which is not floating-point"):
        proximal_gradient(squares, jnp.zeros(20, int), soft, 0.1)


def test_numbers_may_be_traced():
    def solve(step, tolerance, most):
        found = proximal_gradient(
            squares, jnp.zeros(20), soft, 0.1, step=step, tolerance=tolerance, max_steps=most
        )
        return found.steps

    few, many, one = jax.vmap(solve)(
        jnp.full(3, 1e-3), jnp.array([1e-2, 1e-4, 1e-4]), jnp.array([1000, 1000, 1])
    )
    assert 1 == one < few < many


def test_under_jit_and_vmap_the_outcome_is_a_number():
    lams = jnp.asarray([0.01, 0.1, 1.0])

    def solve(lam):
        return proximal_gradient(squares, jnp.zeros(20), soft, lam, tolerance=1e-7)

    found = jax.jit(jax.vmap(solve))(lams)
    assert found.outcome.tolist() == [Descent.CONVERGED] * 3
    for lam, params in zip(lams, found.params, strict=True):
        np.testing.assert_allclose(params, solve(lam).params, rtol=0, atol=1e-6)


def test_a_value_may_have_fewer_digits_than_the_parameters():
    found = proximal_gradient(lambda x: squares(x).astype("bfloat16"), jnp.zeros(20), soft, 0.1)
    assert found.params.dtype == jnp.zeros(20).dtype
    assert 0 < jnp.count_nonzero(found.params) < 20


def test_a_value_may_have_more_digits_than_the_parameters():
    start = jnp.zeros(20, jnp.float32)
    found = proximal_gradient(lambda w: squares(w.astype(X.dtype)), start, soft, 0.1)
    assert (found.params.dtype, found.value.dtype) == (start.dtype, X.dtype)
    assert 0 < jnp.count_nonzero(found.params) < 20


def test_params_may_have_several_dtypes_and_large_squares():
    start = {"a": jnp.zeros(4000, jnp.float16), "b": jnp.zeros(3, jnp.float32)}

    def distance(p):
        return sum(jnp.sum((x.astype(jnp.float32) - 20) ** 2) for x in p.values()) / 2

    def same(p, lam, scaling):
        return p

    found = proximal_gradient(distance, start, same, step=0.5)
    assert found.outcome is Descent.CONVERGED
    assert {name: x.dtype for name, x in found.params.items()} == {"a": "float16", "b": "float32"}
    for x in found.params.values():
        np.testing.assert_allclose(x, 20, rtol=2**-10)


def test_derivatives_pass_through_shard_map():
    mesh, rows = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,)), jax.P("rows")

    def moved(w):
        return proximal_gradient(lambda z: jnp.sum((z - w) ** 2), w * 0, soft, 0.1).params

    w = jnp.linspace(-1, 1, 8, dtype=jnp.float32)
    mapped = jax.shard_map(moved, mesh=mesh, in_specs=rows, out_specs=rows)
    slopes = [jax.grad(lambda w, own=own: jnp.sum(own(w)))(w) for own in (mapped, moved)]
    np.testing.assert_array_equal(*slopes)


def test_trees_and_what_does_not_end():
    tree = {"w": jnp.zeros(20), "b": jnp.zeros(())}

    def fun(tree):
        return squares(tree["w"], X, Y - tree["b"])

    def of_tree(tree, lam, scaling):
        return {"w": soft(tree["w"], lam, scaling), "b": tree["b"]}

    def of_zero(tree, lam, scaling):
        return {"w": soft(tree["w"], lam, scaling), "b": 0.0}

    assert proximal_gradient(fun, tree, of_zero, 0.1).outcome is Descent.CONVERGED
    assert proximal_gradient(fun, tree, of_tree, 0.1).outcome is Descent.CONVERGED
    short = proximal_gradient(fun, tree, of_tree, 0.1, max_steps=3)
    assert (short.outcome, int(short.steps)) == (Descent.MAX_STEPS, 3)

    def cliff(w):
        return jnp.where(jnp.any(w < -0.5), jnp.nan, 1.0) * jnp.sum(w)

    fallen = proximal_gradient(cliff, jnp.zeros(2), soft, 0.0, step=1.0)
    assert fallen.outcome is Descent.NONFINITE
    # The first step leads over the cliff.
    np.testing.assert_array_equal(fallen.params, jnp.zeros(2))


def test_hyperparameters_need_not_be_arrays():
    def prox(w, hyperparams, scaling):
        lam, pattern = hyperparams
        return prox24.prox(w, lam * scaling, pattern)

    found = proximal_gradient(squares, jnp.zeros(20), prox, (1e4, "2:4"))
    assert prox24.is_sparse(found.params)


def test_params_may_be_of_a_class_without_equality():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(eq=False)
    class Weights:
        w: jax.Array

    found = proximal_gradient(
        lambda own: squares(own.w),
        Weights(jnp.zeros(20)),
        lambda own, lam, scaling: Weights(soft(own.w, lam, scaling)),
        0.1,
    )
    assert found.outcome is Descent.CONVERGED


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 0.0}, "step 0.0 is not positive"),
        ({"tolerance": -1.0}, "tolerance -1.0 is negative"),
        ({"max_steps": 0}, "max_steps 0 is not positive"),
        ({"fun": lambda w: jnp.log(-1.0 - jnp.sum(w**2))}, "fun is nan at the start"),
        ({"fun": lambda w: w}, r"fun gives \(20,\)"),
        ({"prox": prox24.prox}, r"prox\(x, hyperparams, scaling\) .* it fails with"),
        ({"prox": lambda w, lam: w}, r"prox\(x, hyperparams, scaling\) .* it fails with"),
        ({"prox": lambda w, lam, scaling: w[:3]}, "another tree, or other shapes"),
    ],
)
def test_what_is_refused_is_a_sentence(changes, said):
    given = {"fun": squares, "prox": soft} | changes
    fun, prox = given.pop("fun"), given.pop("prox")
    with pytest.raises(ValueError, match=said):
        proximal_gradient(fun, jnp.zeros(20), prox, 0.1, **given)
