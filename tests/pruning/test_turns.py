"""The loop with a basis for each attention head."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference import eps_of
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

from prox24 import HeadBasis, Recipe, Unstructured
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._core.masks import is_sparse
from prox24._jobs.native import native_runner
from prox24._pruning.loop import check, prune_stages, pruned_together
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import Candidate
from prox24._solvers.protocol import Patterns

WINDOWS = tokens(batch=8, length=32)
WANDA = dataclasses.replace(Recipe.wanda(), basis=HeadBasis(20))


@hyperparameters
class Dense:
    """Prunes nothing: what is left is the basis."""

    patterns, needs_definite, shares_columns = Patterns.ANY, False, True

    def __call__(self, problem, pattern, damping):
        return Candidate.of(problem.weight, jnp.ones(problem.weight.shape, bool), damping)


DENSE = dataclasses.replace(WANDA, solver=Dense())


def runner_of(folder, recipe):
    return native_runner(open_checkpoint(folder), WINDOWS, recipe)


def pruned(folder, recipe, **options):
    return pruned_by(runner_of(folder, recipe), recipe, **options)


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "source"
    write_tiny(folder, request.param)
    return request.param, folder


def test_a_turned_model_is_the_dense_one_and_biases_are_handed_out_with_it(model):
    variant, folder = model
    weights = random_weights(config_dict(variant))
    turned = pruned(folder, DENSE).tensors
    changed = {n for n, values in turned.items() if not np.array_equal(values, weights[n])}
    parts = {"qwen2": ["v_proj.weight", "v_proj.bias", "o_proj.weight"]}
    parts["gpt2"] = ["c_attn.weight", "c_attn.bias", "attn.c_proj.weight"]
    assert len(changed) == 2 * 3
    assert all(name.endswith(tuple(parts[variant])) for name in changed)
    found = jax_logits(config_dict(variant), weights | turned, tokens())
    assert_close(found, jax_logits(config_dict(variant), weights, tokens()))


def test_losses_are_those_of_the_turned_weights_and_lower_than_without(model):
    variant, folder = model
    weights = random_weights(config_dict(variant))
    turned, found, plain = (
        pruned(folder, recipe) for recipe in (DENSE, WANDA, dataclasses.replace(WANDA, basis=None))
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
        tied = pruned_together(
            runner_of(folder, WANDA), 0, WANDA, check(runner_of(folder, WANDA), WANDA)
        )
        assert (loss < lower[name]) == (name in tied)


@pytest.mark.parametrize(
    "change",
    [
        {"skip": "o_proj"},
        {"pattern": Unstructured(0.5)},
        {"pattern": (("o_proj", Unstructured(0.5)), ("", (2, 4)))},
    ],
)
def test_only_linears_that_are_both_pruned_to_a_pattern_are_turned(tmp_path, change):
    write_tiny(tmp_path / "source", "qwen2")
    found, plain = (
        pruned(tmp_path / "source", dataclasses.replace(WANDA, basis=basis, **change)).tensors
        for basis in (HeadBasis(), None)
    )
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
