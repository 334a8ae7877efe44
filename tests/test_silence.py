"""Wrong calls that would give a wrong answer in silence: each is refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import write_tiny

import prox24
from prox24.errors import CalibrationError, RecipeError
from prox24.optax import check, describe, keep_pattern, proximal


def apply(params, x):
    return x @ params["kernel"]


KERNEL = jax.random.normal(jax.random.key(0), (8, 4))
BATCH = jax.random.normal(jax.random.key(1), (32, 8))


def trained(params):
    batches = [BATCH, BATCH]
    targets = [apply({"kernel": KERNEL}, batch) for batch in batches]
    return prox24.refine.train_block(apply, params, batches, targets, optax.sgd(0.1))


def test_a_tree_whose_paths_fit_no_gram_is_refused():
    grams = prox24.calibrate(
        lambda tree, x: apply(tree["params"], x), {"params": {"kernel": KERNEL}}, [BATCH]
    )
    with pytest.raises(
        CalibrationError, match=r"Grams are of params/kernel, the leaves are kernel"
    ):
        prox24.prune_params(apply, {"kernel": KERNEL}, grams=grams)


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
@pytest.mark.parametrize("batches", [BATCH, np.asarray(BATCH)], ids=["jax", "numpy"])
def test_one_array_is_not_taken_for_batches_of_its_rows(order, batches):
    with pytest.raises(CalibrationError, match=r"one array of shape \(32, 8\); give a list"):
        prox24.prune_params(apply, {"kernel": KERNEL}, batches, order=order)


def test_windows_beyond_the_positions_of_a_model_are_refused(tmp_path):
    write_tiny(tmp_path / "model")
    long = prox24.Text(None, samples=2, sequence_length=256)
    said = r"windows of 256 tokens are longer than the model's 128 positions"
    with pytest.raises(CalibrationError, match=said):
        prox24.perplexity(tmp_path / "model", long)
    with pytest.raises(CalibrationError, match=said):
        prox24.prune(tmp_path / "model", tmp_path / "out", calibration=long)
    with pytest.raises(CalibrationError, match=said):
        prox24.perplexity(tmp_path / "model", np.zeros((1, 256), np.int32))
    assert not (tmp_path / "out").exists()


def test_negative_penalties_are_refused():
    with pytest.raises(ValueError, match="lam is -1; a penalty is nonnegative"):
        prox24.prox(jnp.ones(4), -1)
    with pytest.raises(ValueError, match=r"lam is -1\.0, not a nonnegative number"):
        proximal(-1.0)
    with pytest.raises(ValueError, match="learning_rate is -2, not a nonnegative number"):
        proximal(1.0, learning_rate=-2)


def test_a_recipe_that_prunes_no_leaf_is_refused():
    with pytest.raises(
        RecipeError, match=r"only 'mlp' is found in none of the 1 linears; their names are kernel"
    ):
        prox24.prune_params(apply, {"kernel": KERNEL}, [BATCH], prox24.Recipe(only="mlp"))
    recipe = prox24.Recipe(pattern=[("kernel", "dense"), ("mlp", "2:4")])
    with pytest.raises(RecipeError, match=r"pattern 'mlp' is found in none of the 1 linears"):
        prox24.prune_params(apply, {"kernel": KERNEL}, [BATCH], recipe)
    recipe = prox24.Recipe(pattern=[("kernel", "dense")])
    with pytest.raises(RecipeError, match=r"prunes none of the 1 linears; .* kernel"):
        prox24.prune_params(apply, {"kernel": KERNEL}, [BATCH], recipe)


def test_a_value_that_is_traced_is_named():
    optimizer = optax.chain(optax.sgd(0.1), proximal(10.0))
    for name, call in (
        ("report", prox24.report),
        ("optax.check", lambda params: check(optimizer, params)),
        ("prune_params", lambda params: prox24.prune_params(apply, params, [BATCH]).params),
        ("calibrate", lambda params: prox24.calibrate(apply, params, [BATCH]).grams),
        ("refine", lambda params: trained(params).params),
    ):
        with pytest.raises(ValueError, match=rf"kernel is traced .* call prox24.{name} outside"):
            jax.jit(call)({"kernel": KERNEL})


def test_a_tree_with_what_is_no_array_is_named():
    with pytest.raises(ValueError, match="params has no arrays: give a pytree of arrays"):
        prox24.report({"model": object()})
    with pytest.raises(ValueError, match="params has no arrays"):
        prox24.prune_params(lambda params, x: x, {"scale": 2}, [BATCH])
    with pytest.raises(ValueError, match="params has no arrays"):
        trained({})
    module = {"layer": {"kernel": KERNEL, "activation": jax.nn.relu}}
    optimizer = optax.chain(optax.sgd(0.1), proximal(10.0))
    for call in (lambda: check(optimizer, module), lambda: keep_pattern(optimizer).init(module)):
        with pytest.raises(ValueError, match=r"layer/activation is no array .* eqx.filter"):
            call()
    with pytest.raises(ValueError, match=r"dropout is no array of numbers: .* nnx.state"):
        check(optimizer, {"kernel": KERNEL, "dropout": jax.random.key(0)})
    (activation, _) = describe(module)
    assert activation.reason == "no array"


def test_a_label_on_a_head_counts_more_than_its_name_but_biases_stay_dense():
    params = {"body": jnp.ones((8, 4)), "head": jnp.ones((8, 4))}
    assert [leaf.pruned for leaf in describe(params)] == [True, False]
    transform = optax.partition(
        {"prune": proximal(1e30), "keep": optax.identity()},
        {"body": "keep", "head": "prune", "query": "prune"},
    )
    params = {"body": jnp.ones((4, 8)), "head": jax.random.normal(jax.random.key(2), (4, 8))}
    params["query"] = {"bias": jnp.ones((2, 8))}  # of heads
    updates = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(updates, transform.init(params), params)
    stepped = optax.apply_updates(params, updates)
    assert prox24.is_sparse(stepped["head"])
    assert not prox24.is_sparse(stepped["body"])
    assert not prox24.is_sparse(stepped["query"]["bias"])
