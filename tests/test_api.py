"""The public names of `prox24`: each list of them holds the same, and each can be imported."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from reference import eps_of
from tiny import write_tiny

import prox24
from prox24._checkpoints.unfinished import sha256
from prox24._jobs.output import Report

ROOT = Path(__file__).parents[1]
NAMES = """
    ADMM BlockRefinement Calibration Candidate ConjugateGradients DenseTargets Descended Descent
    Exponential GradientSteps HeadBasis LayerProblem LeastSquares Magnitude ModelRefinement
    Normalized Pattern Patterns ProximalGradient PrunedParams Recipe Refit Refitted Solution
    Solver SparseGPT Status Swaps Text Unstructured Wanda calibrate correct_inputs
    count_violations distill from_torch hyperparameters is_sparse load mask_of penalty
    perplexity plan planes prox proximal_gradient prune prune_params report solve tap top_mask
    verify
"""
BASIS = "Part learn objective orthogonal places_of turned"
OPTAX = """
    KeepPatternState Leaf ProximalState by_path check describe keep_pattern kept_entries proximal
"""
PACKED = "Packed24 from_arrays matmul pack to_arrays to_cutlass unpack"
REFINE = """
    BlockRefinement ModelRefinement Outcome Refined Training divergence feature_weights
    relative_error train_block train_model
"""


def names_for_type_checkers():
    tree = ast.parse(Path(prox24.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        f"{statement.module.removeprefix('prox24.')}.{alias.name}"
        for statement in block.body
        for alias in statement.names
    }


def test_every_public_name_is_imported_when_it_is_used_and_known_to_type_checkers():
    places = {
        *(f"{place}.{name}" for place, names in prox24._PLACES.items() for name in names),
        "prox24.planes",
    }
    assert names_for_type_checkers() == places
    assert set(prox24.__all__) == {place.split(".")[-1] for place in places}
    for name in [*prox24.__all__, *prox24._SUBMODULES]:
        assert getattr(prox24, name) is not None
        assert name in dir(prox24)
    with pytest.raises(AttributeError, match="no attribute 'prune_in_order'"):
        prox24.prune_in_order  # noqa: B018


FILES, FOLDERS = {"basis", "errors", "lm_eval", "lora", "planes"}, {"optax", "packed", "refine"}


def test_every_other_module_is_private():
    package = Path(prox24.__file__).parent
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    public = {path for path in modules if not any(part.startswith("_") for part in path.parts)}
    assert {path.with_suffix("").as_posix() for path in public} == FILES
    packages = {path.parent.as_posix() for path in modules if path.name == "__init__.py"}
    assert {name for name in packages if "_" not in name} == {".", *FOLDERS}


def test_without_transformers_the_names_that_need_it_are_not_listed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "prox" in dir(prox24)
    assert "prune" not in dir(prox24)


def test_the_names_of_public_modules_are_these():
    assert prox24.basis.__all__ == BASIS.split()
    assert prox24.optax.__all__ == OPTAX.split()
    assert prox24.refine.__all__ == REFINE.split()
    assert prox24.packed.__all__ == PACKED.split()
    assert prox24.__all__ == NAMES.split()


def test_every_public_function_and_class_has_a_docstring_of_its_arguments():
    for name in prox24.__all__:
        public = getattr(prox24, name)
        if inspect.isfunction(public) and inspect.signature(public).parameters:
            sections = inspect.getdoc(public)
            assert "Args:" in sections, name
            assert "Returns:" in sections, name


def test_the_changelog_names_this_version():
    assert f"## {prox24.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_load_gives_the_function_of_the_forward_pass(tmp_path):
    write_tiny(tmp_path / "model", "gpt2")
    apply, params, tokenizer = prox24.load(tmp_path / "model")
    tokens = np.asarray(tokenizer(["It is a truth"])["input_ids"], np.int32)
    logits = apply(params, tokens)
    assert logits.shape == (*tokens.shape, 260)
    windows = np.repeat(tokens, 2, axis=0)
    expected = prox24.perplexity(tmp_path / "model", windows).perplexity
    scores = np.asarray(logits, np.float64)[0, :-1]
    largest = scores.max(axis=-1, keepdims=True)
    normaliser = largest[:, 0] + np.log(np.exp(scores - largest).sum(axis=-1))
    loss = np.mean(normaliser - scores[np.arange(len(scores)), tokens[0, 1:]])
    # A mean of float32 numbers of its own size, of logits that are sums of 32 terms, in two layers.
    assert np.log(expected) == pytest.approx(loss, rel=2 * 32 * eps_of("float32"))


def test_a_loaded_model_is_pruned_like_any_function(tmp_path):
    write_tiny(tmp_path / "model")
    apply, params, _ = prox24.load(tmp_path / "model")
    batches = [np.random.default_rng(0).integers(0, 260, (4, 32)).astype(np.int32)]
    pruned = prox24.prune_params(apply, params, batches, prox24.Recipe.wanda())
    names = {report.name for report in pruned.reports}
    assert names == {name for name in params if re.search(r"layers\.\d\.(mlp|self_attn)", name)}
    assert all(prox24.is_sparse(pruned.params[name]) for name in names)


def test_reports_are_dataclasses_that_json_holds(tmp_path):
    write_tiny(tmp_path / "model")
    windows = np.random.default_rng(0).integers(0, 260, (4, 32))
    report = prox24.prune(
        tmp_path / "model", tmp_path / "out", prox24.Recipe.magnitude(), calibration=windows
    )
    found = prox24.verify(tmp_path / "out", tmp_path / "model")
    assert found.ok
    plan = prox24.plan(tmp_path / "model", samples=4, sequence_length=32)
    for each in (report, found, plan):
        assert isinstance(each, Report)
        assert dataclasses.is_dataclass(each)
        assert each.to_json().startswith("{")
        assert "━" in str(each)
    assert len(report.linears) == 14
    assert report.calibration == {
        "text": "tokens",
        "windows": 4,
        "sequence_length": 32,
        "tokens": 128,
        "sha256": sha256(windows.astype(np.int32)),
    }
