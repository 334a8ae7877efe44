"""The loop with a basis for each attention head."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference import eps_of
from tiers import rest
from tiny import (
    assert_close,
    config_dict,
    jax_logits,
    pruned_by,
    random_weights,
    seen_by_linears,
    tokens,
    write_tiny,
)

from prox24 import BlockRefinement, DenseTargets, HeadBasis, Recipe, Unstructured
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._core.masks import is_sparse
from prox24._jobs.native import native_runner
from prox24._pruning import loop, turns
from prox24._pruning.loop import check, prune_stages, pruned_together
from prox24._pruning.runner import Inputs
from prox24._solvers.solve import solve

WINDOWS = tokens(batch=8, length=32)
WANDA = dataclasses.replace(Recipe.wanda(), basis=HeadBasis(20))


def runner_of(folder, recipe):
    return native_runner(open_checkpoint(folder), WINDOWS, recipe)


def pruned(folder, recipe, **options):
    return pruned_by(runner_of(folder, recipe), recipe, **options)


def only_turned(folder, recipe):
    """Heads get their basis for the pattern; the solver then keeps all weights."""

    def keep_all(*given, pattern, **options):
        return solve(*given, pattern=(4, 4), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "solve", keep_all)
        return pruned(folder, recipe)


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "source"
    write_tiny(folder, request.param)
    return request.param, folder


def test_a_turned_model_is_the_dense_one_and_biases_are_handed_out_with_it(model):
    variant, folder = model
    weights = random_weights(config_dict(variant))
    turned = only_turned(folder, WANDA).tensors
    changed = {n for n, values in turned.items() if not np.array_equal(values, weights[n])}
    parts = {"qwen2": ["v_proj.weight", "v_proj.bias", "o_proj.weight"]}
    parts["gpt2"] = ["c_attn.weight", "c_attn.bias", "attn.c_proj.weight"]
    assert len(changed) == 2 * 3
    assert all(name.endswith(tuple(parts[variant])) for name in changed)
    found = jax_logits(config_dict(variant), weights | turned, tokens())
    assert_close(found, jax_logits(config_dict(variant), weights, tokens()))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", rest("float32", "bfloat16"))
def test_dense_targets_and_training_start_from_the_turned_model(tmp_path, dtype):
    weights = write_tiny(tmp_path / "source", "qwen2", dtype=dtype)
    refine = BlockRefinement(passes=1, rate=1e-30, linears_only=True, held_out=0.25)
    recipe = dataclasses.replace(WANDA, targets=DenseTargets(), refine=refine)
    found = only_turned(tmp_path / "source", recipe)
    assert sum(name.endswith("v_proj.bias") for name in found.tensors) == 2
    # Nothing is pruned and nothing trained: errors are those of rounding.
    config = config_dict("qwen2")
    logits = jax_logits(config, weights | found.tensors, tokens())
    expected = jax_logits(config, weights, tokens())
    if dtype == "float32":
        assert_close(logits, expected)
    else:  # Weights are rounded twice, by 2^-9, in two layers of four products.
        assert np.linalg.norm(logits - expected) <= 2 * 8 * 2.0**-9 * np.linalg.norm(expected)


def test_a_gram_with_one_huge_direction_stays_symmetric():
    rng = np.random.default_rng(0)
    direction = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    x = rng.standard_normal((512, 64)) + 3000 * direction[0]
    gram = jnp.asarray(x.T @ x, jnp.float32)
    turn = jnp.asarray(direction.T[None], jnp.float32)
    found = turns._turned_inputs(Inputs(gram, 512, gram), turn)
    np.testing.assert_array_equal(found.gram, found.gram.T)
    expected = direction @ (x.T @ x) @ direction.T
    for each in (found.gram, found.cross):
        # Two products of 64 terms.
        assert (
            np.abs(np.asarray(each) - expected).max()
            <= 2 * 64 * eps_of("float32") * np.abs(expected).max()
        )


def test_losses_are_those_of_the_turned_weights_and_lower_than_without(model):
    variant, folder = model
    weights = random_weights(config_dict(variant))
    turned = only_turned(folder, WANDA)
    found, plain = (
        pruned(folder, each) for each in (WANDA, dataclasses.replace(WANDA, basis=None))
    )
    seen = seen_by_linears(config_dict(variant), weights | turned.tensors, WINDOWS, 0)
    runner = runner_of(folder, WANDA)
    tied = pruned_together(runner, 0, WANDA, check(runner, WANDA))
    lower = {report.name: report.statistics.relative_loss for report in plain.reports}
    for report in found.reports:
        name, loss = report.name, report.statistics.relative_loss
        values, before = (
            each.tensors[name].astype(np.float64).reshape(weights[name].shape)
            for each in (found, turned)
        )
        if variant == "gpt2":
            values, before = values.T, before.T
        assert is_sparse(jnp.asarray(values))
        if ".0." not in name:
            continue  # Their inputs differ.
        if name in seen:
            x = seen[name]
            expected = np.sum(((values - before) @ x.T) ** 2) / np.sum((before @ x.T) ** 2)
            # Squares of sums of 256 tokens and 64 features, after a layer of seven products.
            assert loss == pytest.approx(expected, rel=2 * (256 + 64 + 7 * 64) * eps_of("float32"))
        assert (loss < lower[name]) == (name in tied)


@pytest.mark.parametrize(
    "change",
    [
        {"skip": "o_proj"},
        {"keep_dense": 2},
        {"pattern": Unstructured(0.5)},
        {"pattern": (2, 16)},  # blocks that reach beyond heads of width 8
        {"pattern": (("o_proj", Unstructured(0.5)), ("", (2, 4)))},
    ],
)
def test_only_heads_that_patterns_of_both_linears_fit_are_turned(tmp_path, change):
    write_tiny(tmp_path / "source", "qwen2")
    dense = [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)]
    options = {"dense": dense} if "keep_dense" in change else {}
    recipes = (dataclasses.replace(WANDA, basis=each, **change) for each in (HeadBasis(), None))
    found, plain = (pruned(tmp_path / "source", each, **options).tensors for each in recipes)
    assert found.keys() == plain.keys()
    assert all(np.array_equal(found[name], plain[name]) for name in plain)


def test_a_run_that_goes_on_turns_linears_of_one_basis_together(model):
    _, folder = model
    whole = pruned(folder, WANDA).tensors

    @dataclasses.dataclass
    class Stored:
        values: np.ndarray

        def read(self):
            return self.values

    names = list(whole)
    for count in range(1, len(names)):
        done = {name: Stored(whole[name]) for name in names[:count]}
        rest = {
            tensor.name: tensor.values
            for tensor in prune_stages(runner_of(folder, WANDA), WANDA, finished=done)
        }
        assert rest.keys() | done.keys() == whole.keys()
        for name, values in rest.items():
            np.testing.assert_array_equal(values, whole[name])
