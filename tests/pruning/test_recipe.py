"""`prox24.Recipe`: exact round trips, refusals by name, patterns by tensor, presets."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import optax
import pytest

import prox24
from prox24 import DenseTargets, Recipe
from prox24._core.pattern import Pattern, Unstructured
from prox24._core.precision import products
from prox24._pruning._fields import decode
from prox24._pruning.recipe import PRESETS, with_products
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.refit import ConjugateGradients, GradientSteps, LeastSquares
from prox24._solvers.schedules import Exponential
from prox24._solvers.swaps import Swaps
from prox24.errors import RecipeError
from prox24.refine import BlockRefinement

RECIPES = {
    **{name: make() for name, make in PRESETS.items()},
    "unequal floats": Recipe(prox24.ADMM(rho=Exponential(0.1, 1 / 3), penalty=None), damping=1e-17),
    "refits": Recipe(refit=Swaps(sweeps=3, refit=ConjugateGradients(5, 0.1))),
    "exact refit": Recipe(refit=LeastSquares(), targets=DenseTargets(0.1)),
    "share of zeros": Recipe(prox24.Wanda(), None, pattern=Unstructured(0.3)),
    "by tensor": Recipe(
        pattern=(("mlp.*", (1, 4)), ("o_proj", "dense"), ("", Unstructured(1 / 3)))
    ),
    "choice": Recipe(only="mlp", skip=r"layers\.0\.", keep_dense=0.1, dtype="bfloat16"),
    "three passes": Recipe(products="tf32x3"),
    "turned": Recipe(basis=prox24.HeadBasis(3)),
    "refined": Recipe(refine=BlockRefinement(rate=0.1, linears_only=True)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_json_gives_an_equal_recipe(name):
    recipe = RECIPES[name]
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert repr(again) == repr(recipe)
    assert again.to_json() == recipe.to_json()


def test_a_yaml_file_gives_an_equal_recipe(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "recipe.yaml"
    for recipe in RECIPES.values():
        recipe.save(path)
        assert Recipe.load(path) == recipe


def test_fields_that_are_not_given_have_their_defaults():
    assert Recipe.from_dict({}) == Recipe()
    manifest = {"recipe": Recipe.wanda().to_dict(), "tensors": {}}
    assert Recipe.from_dict(manifest) == Recipe.wanda()
    given = {"solver": {"name": "ADMM", "steps": 8}, "refine": {"passes": 2}, "pattern": [2, 8]}
    expected = Recipe(prox24.ADMM(steps=8), refine=BlockRefinement(passes=2), pattern=Pattern(2, 8))
    assert Recipe.from_dict(given) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": 2}, "version 2 of recipes is unknown; this is 1"),
        ({"recipe": "1"}, "version '1' of recipes is unknown"),
        ({"solvers": None}, "recipe has no field 'solvers'; its fields are solver, refit"),
        ({"solver": {"name": "ADMM", "step": 3}}, "recipe.solver has no field 'step'"),
        ({"solver": {"name": "Simplex"}}, "recipe.solver has the name 'Simplex', .* ADMM"),
        ({"solver": {"steps": 3}}, "recipe.solver has the name None"),
        ({"solver": {"name": "ConjugateGradients"}}, "has the name 'ConjugateGradients'"),
        ({"solver": None}, "recipe.solver is None, not"),
        ({"solver": {"name": "ADMM", "steps": 2.5}}, "recipe.solver.steps is 2.5, not int"),
        ({"solver": {"name": "ADMM", "steps": True}}, "recipe.solver.steps is True, not int"),
        ({"damping": "much"}, "recipe.damping is 'much', not float"),
        ({"damping": 10**400}, "recipe.damping is 10000"),
        ({"damping": {"mean": 0.01}}, "recipe.damping is {'mean': 0.01}, not float"),
        ({"damping": -1}, "damping -1.0 is not a nonnegative number"),
        ({"targets": {"pull": 0}}, "recipe.targets: pull 0.0 is not a positive number"),
        ({"basis": {"steps": 0}}, "recipe.basis: steps 0 is not a positive number"),
        ({"basis": {"steps": 2.5}}, "recipe.basis"),
        ({"refine": {"passes": 0}}, "recipe.refine: passes 0 is not positive"),
        ({"pattern": "5:4"}, "'5:4' is neither N:M"),
        ({"pattern": {"sparsity": 2}}, "sparsity 2.0 is not a fraction"),
        ({"pattern": [["(", "2:4"]]}, r"pattern '\(' is no regular expression"),
        ({"pattern": [["mlp", "3:2"]]}, "the pattern of 'mlp': '3:2' is neither"),
        ({"only": "["}, r"only '\[' is no regular expression"),
        ({"keep_dense": 1.5}, "keep_dense 1.5 is neither a count nor a share"),
        ({"keep_dense": -1}, "keep_dense -1 is neither"),
        ({"products": "tf32"}, "products 'tf32' is not float32 or tf32x3"),
        ({"dtype": "int8"}, "dtype 'int8' is not float32, float16 or bfloat16"),
        ([], r"a recipe is an object of fields, not \[\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"solver": "admm"}, "solver 'admm' is not a solver, such as"),
        ({"solver": prox24.ADMM}, "solver <class .*> is not a solver, such as"),
        ({"damping": "0.01"}, "damping '0.01' is not a number"),
        ({"damping": None}, "damping None is not a number"),
        ({"targets": True}, "targets True is not a prox24.DenseTargets or None"),
        ({"basis": 50}, "basis 50 is not a prox24.HeadBasis or None"),
        ({"pattern": {"mlp": "2:4"}}, "pattern is a dict: give a list of pairs"),
        ({"keep_dense": "3"}, "keep_dense '3' is not a count or a share"),
        ({"keep_dense": float("nan")}, "keep_dense nan is neither a count nor a share"),
        ({"products": ["float32"]}, r"products \['float32'\] is not a name"),
    ],
)
def test_fields_of_another_type_are_refused_by_name(given, said):
    with pytest.raises(RecipeError, match=said):
        Recipe(**given)


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "recipe.json"
    with pytest.raises(RecipeError, match=r"cannot read .*recipe\.json: No such file"):
        Recipe.load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="it is not UTF-8 text"):
        Recipe.load(path)
    path.write_text("{")
    with pytest.raises(RecipeError, match=r"recipe\.json: the recipe is not JSON"):
        Recipe.load(path)
    path.write_text('{"dampin": 1}')
    with pytest.raises(RecipeError, match=r"recipe\.json: recipe has no field 'dampin'"):
        Recipe.load(path)


def test_what_json_cannot_hold_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"recipe\.refit\.transform is a Gradient.*cannot hold"):
        Recipe(refit=GradientSteps(optax.adam(1e-3))).to_json()
    with pytest.raises(RecipeError, match=r"recipe\.solver is a Own, which JSON cannot hold"):
        Recipe(Own()).to_json()  # type: ignore[arg-type]


class Own:
    """Not registered."""

    def __call__(self):
        """As solvers have it."""


@hyperparameters
class Registered:
    """Of another module than prox24's, so that its name holds the module's."""

    rate: float = 0.5
    rates: tuple[float, ...] = (0.5,)

    def __call__(self):
        """As refits have it."""


def test_a_registered_class_of_others_goes_by_its_module():
    refit = Registered(0.25, (0.5, 0.125))
    written = json.loads(Recipe(refit=refit).to_json())["refit"]  # type: ignore[arg-type]
    assert written == {"name": f"{__name__}.Registered", "rate": 0.25, "rates": [0.5, 0.125]}
    assert decode(written, Registered, "refit") == refit


def test_best_trains_on_about_as_many_tokens_whatever_the_text():
    assert Recipe.best() == Recipe(refine=BlockRefinement())
    assert Recipe.best(tokens=8_192).refine == BlockRefinement(passes=20)
    assert Recipe.best(tokens=10**7).refine == BlockRefinement(passes=1)
    with pytest.raises(RecipeError, match="tokens 0 is not a positive number"):
        Recipe.best(0)


def test_a_solver_that_cannot_make_a_pattern_says_so():
    with pytest.raises(RecipeError, match="3:4"):
        Recipe(pattern=[("mlp", "2:4"), ("", "3:4")]).check_supported()


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().damping = 1.0  # type: ignore[misc]


JOBS = {
    "prune": lambda folder, recipe: prox24.prune(folder / "source", folder / "pruned", recipe),
    "plan": lambda folder, recipe: prox24.plan(folder / "source", recipe=recipe),
    "prune_params": lambda folder, recipe: prox24.prune_params(len, {}, (), recipe),
}


@pytest.mark.parametrize("job", JOBS)
def test_products_that_the_device_lacks_are_refused_before_the_work(monkeypatch, tmp_path, job):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="cpu")])
    with pytest.raises(RecipeError, match=r"^products 'tf32x3' need .* and this is cpu: choose"):
        JOBS[job](tmp_path, Recipe(products="tf32x3"))
    assert not list(tmp_path.iterdir())


def test_a_function_runs_with_the_products_of_its_recipe(monkeypatch):
    device = SimpleNamespace(device_kind="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])

    @with_products
    def chosen(model, recipe=Recipe()):
        return products.value

    recipe = Recipe(products="tf32x3")
    assert [chosen(0), chosen(0, recipe), chosen(0, recipe=recipe)] == ["float32", *["tf32x3"] * 2]
    assert products.value == "float32"
