import itertools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import best_mask_by_enumeration
from tiny import (
    byte_tokenizer,
    config_dict,
    random_weights,
    seen_by_linears,
    write_folder,
    write_tiny,
)

import prox24
from prox24.cli.inspect_grams import reading
from prox24.cli.main import main
from prox24.core.diagnostics import GramDiagnostics, diagnose
from prox24.jobs.forward import layer_linears
from prox24.jobs.text import spread_windows, tokenize
from prox24.models.families import config_from_hf

COUNTS = {"dead_features", "kruskal_lower", "kruskal_upper"}
FLOATS = [name for name in GramDiagnostics._fields if name not in COUNTS]
EPS = {np.float32: 2.0**-23, np.float64: 2.0**-52}

compiled = jax.jit(diagnose)


@pytest.mark.parametrize("shape", [(), (4,), (0, 0), (2, 3), (2, 2, 2)], ids=str)
def test_what_is_no_gram_by_its_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"is not \(in, in\)"):
        diagnose(jnp.zeros(shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_a_gram_of_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=f"the gram is {dtype.dtype}"):
        diagnose(jnp.eye(4, dtype=dtype))


def figures_of(gram, dtype=np.float64) -> dict:
    figures = compiled(jnp.asarray(gram, dtype))
    return {name: value.item() for name, value in figures._asdict().items()}


def kruskal_rank(features: np.ndarray) -> int:
    """The definition, by enumeration of every set of columns."""
    width = features.shape[1]
    rank = 0
    for size in range(1, width + 1):
        for chosen in itertools.combinations(range(width), size):
            if np.linalg.matrix_rank(features[:, chosen]) < size:
                return rank
        rank = size
    return rank


def restricted_isometry(unit: np.ndarray) -> float:
    """The constant of order 2 from the singular values of every pair of unit columns."""
    values = [
        abs(np.linalg.svd(unit[:, pair], compute_uv=False) ** 2 - 1).max()
        for pair in itertools.combinations(range(unit.shape[1]), 2)
    ]
    return max(values, default=0.0)


def expected_floats(features: np.ndarray) -> dict:
    """The floating figures from the singular values of the features, in float64."""
    width = features.shape[1]
    live = features[:, np.abs(features).sum(0) > 0]
    unit = live / np.linalg.norm(live, axis=0)
    squares = np.zeros(width)
    singular_values = np.linalg.svd(features, compute_uv=False)
    squares[: len(singular_values)] = singular_values**2
    shares = squares[squares > 1e-14 * squares.max()] / squares.sum() if squares.any() else []
    scaled = np.zeros(live.shape[1])
    if live.size:
        scaled[: min(live.shape)] = np.linalg.svd(unit, compute_uv=False) ** 2
    cosines = unit.T @ unit
    off = cosines - np.diag(np.diag(cosines))
    return {
        "condition_number": ratio(squares),
        "effective_rank": math.exp(-sum(p * math.log(p) for p in shares)) if len(shares) else 0,
        "scaled_condition_number": ratio(scaled) if live.size else 1.0,
        "off_diagonal_mass": (off**2).sum() / (cosines**2).sum() if live.size else 0.0,
        "coherence": abs(off).max(initial=0),
        "restricted_isometry": restricted_isometry(unit),
    }


def ratio(values: np.ndarray) -> float:
    return math.inf if values.min() <= 1e-14 * values.max() else values.max() / values.min()


@st.composite
def small_features(draw):
    """Features of small integers, often dependent, equal up to a factor, or dead."""
    width, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    entries = st.lists(st.integers(-2, 2), min_size=width * tokens, max_size=width * tokens)
    return np.array(draw(entries), np.float64).reshape(tokens, width)


# The figures


@given(small_features())
def test_figures_are_those_of_the_features_by_independent_means(features):
    found = figures_of(features.T @ features)
    for name, value in expected_floats(features).items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-7), name
    assert found["dead_features"] == (~features.any(axis=0)).sum()


@given(small_features())
def test_the_kruskal_rank_lies_within_its_bounds(features):
    found = figures_of(features.T @ features)
    live = features[:, features.any(axis=0)]
    rank = np.linalg.matrix_rank(live) if live.size else 0
    assert found["kruskal_lower"] <= kruskal_rank(live) <= found["kruskal_upper"] == rank
    assert found["kruskal_lower"] >= min(live.shape[1], 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_figures_of_a_real_sized_gram_are_within_rounding(dtype, seed):
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((300, 96)) @ generator.standard_normal((96, 96))
    features *= generator.lognormal(size=96)
    features = features.astype(np.float32).astype(np.float64)
    expected = expected_floats(features)
    found = figures_of(features.T @ features, dtype)
    tolerance = 96 * EPS[dtype]
    # An eigenvalue's error is relative to the largest one.
    for name in ("condition_number", "scaled_condition_number"):
        if expected[name] * tolerance < 0.1:
            assert found[name] == pytest.approx(expected[name], rel=expected[name] * tolerance)
    for name in ("effective_rank", "off_diagonal_mass", "coherence"):
        assert found[name] == pytest.approx(expected[name], rel=10 * tolerance)
    assert found["restricted_isometry"] == found["coherence"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 2, 4, 33])
def test_the_identity(dtype, width):
    assert figures_of(3 * np.eye(width), dtype) == {
        "dead_features": 0,
        "condition_number": 1,
        "effective_rank": pytest.approx(width, rel=1e-5),
        "scaled_condition_number": 1,
        "off_diagonal_mass": 0,
        "coherence": 0,
        "restricted_isometry": 0,
        "kruskal_lower": width,
        "kruskal_upper": width,
    }


def test_a_diagonal_gram_has_the_condition_of_its_scales_and_none_when_scaled():
    found = figures_of(np.diag([1e-3, 1.0, 1e3]))
    assert found["condition_number"] == pytest.approx(1e6)
    assert found["scaled_condition_number"] == pytest.approx(1)
    assert found["off_diagonal_mass"] == found["coherence"] == 0
    assert found["kruskal_lower"] == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("rho", [0.01, 0.3, 0.5, 0.9])
def test_equicorrelated_features(dtype, width, rho):
    scales = np.arange(1, width + 1)
    gram = ((1 - rho) * np.eye(width) + rho) * np.outer(scales, scales)
    found = figures_of(gram, dtype)
    squares = (width - 1) * rho**2
    rel = 1e4 * EPS[dtype]
    largest, smallest = 1 + (width - 1) * rho, 1 - rho
    assert found["scaled_condition_number"] == pytest.approx(largest / smallest, rel=rel)
    assert found["off_diagonal_mass"] == pytest.approx(squares / (1 + squares), rel=rel)
    assert found["coherence"] == pytest.approx(rho, rel=rel)
    assert found["kruskal_lower"] == min(width, math.ceil(round(1 / rho, 9)))
    assert found["kruskal_upper"] == width

    p = np.array([largest] + [smallest] * (width - 1)) / width
    unscaled = figures_of((1 - rho) * np.eye(width) + rho, dtype)
    assert unscaled["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=rel)
    assert unscaled["condition_number"] == pytest.approx(largest / smallest, rel=rel)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [2, 3, 4, 6, 7, 11, 50])
def test_both_bounds_of_the_kruskal_rank_meet_on_a_simplex(dtype, width):
    # Every two of these unit vectors have the product -1 / (width - 1), and their sum is zero.
    gram = (np.eye(width) * width - 1) / (width - 1)
    found = figures_of(gram, dtype)
    assert found["kruskal_lower"] == found["kruskal_upper"] == width - 1
    assert found["condition_number"] == found["scaled_condition_number"] == math.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rank_one(dtype):
    x = np.array([1.0, -2.0, 0.5, 3.0])
    found = figures_of(np.outer(x, x), dtype)
    assert found["condition_number"] == found["scaled_condition_number"] == math.inf
    assert found["effective_rank"] == pytest.approx(1, abs=1e-5)
    assert found["off_diagonal_mass"] == pytest.approx(3 / 4)
    assert found["coherence"] == pytest.approx(1)
    assert found["kruskal_lower"] == found["kruskal_upper"] == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_zero_gram(dtype):
    assert figures_of(np.zeros((3, 3)), dtype) == {
        "dead_features": 3,
        "condition_number": math.inf,
        "effective_rank": 0,
        "scaled_condition_number": 1,
        "off_diagonal_mass": 0,
        "coherence": 0,
        "restricted_isometry": 0,
        "kruskal_lower": 0,
        "kruskal_upper": 0,
    }


def test_dead_features_are_counted_and_left_out():
    features = np.random.default_rng(0).standard_normal((20, 5))
    alone = figures_of(features.T @ features)
    spread = np.zeros((20, 8))
    spread[:, [0, 2, 3, 5, 7]] = features
    found = figures_of(spread.T @ spread)
    assert found.pop("dead_features") == 3
    assert found.pop("condition_number") == math.inf
    for name, value in found.items():
        assert value == pytest.approx(alone[name], rel=1e-12), name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 1)])
def test_a_gram_that_is_not_finite_gives_nan_and_bounds_that_hold(bad, place):
    gram = np.eye(3)
    gram[place] = bad
    found = figures_of(gram)
    assert all(math.isnan(found[name]) for name in FLOATS)
    assert (found["kruskal_lower"], found["kruskal_upper"]) == (0, 3)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_figures_do_not_depend_on_the_unit(factor):
    features = np.random.default_rng(1).standard_normal((30, 6))
    gram = features.T @ features
    for name, value in figures_of(gram * factor).items():
        assert value == pytest.approx(figures_of(gram)[name], rel=1e-9), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_diagnose_is_traceable_and_keeps_the_dtype(dtype):
    features = np.random.default_rng(2).standard_normal((3, 30, 6)).astype(dtype)
    grams = jnp.asarray(np.einsum("kti,ktj->kij", features, features))
    together = jax.jit(jax.vmap(diagnose))(grams)
    for index, gram in enumerate(grams):
        alone = diagnose(gram)
        for name, value in alone._asdict().items():
            assert value.shape == ()
            assert value.dtype == (dtype if name in FLOATS else jnp.int32)
            np.testing.assert_allclose(getattr(together, name)[index], value, rtol=1e-4)


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_wanda_is_within_the_scaled_condition_number_of_the_best_mask(seed, correlated):
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((40, 8)) * generator.lognormal(size=8)
    gram = features.T @ features
    gram = gram if correlated else np.diag(np.diag(gram))
    weight = generator.standard_normal((6, 8))
    problem = prox24.LayerProblem(jnp.asarray(weight), jnp.asarray(gram))
    removed = np.asarray(prox24.solve(problem, prox24.Wanda()).weight) - weight
    losses = np.einsum("oi,ij,oj->o", removed, gram, removed)
    best = np.array([best_mask_by_enumeration(row, gram)[1] for row in weight])
    factor = figures_of(gram)["scaled_condition_number"]
    assert factor == pytest.approx(1) if not correlated else 1 < factor < 50
    assert np.all(best <= losses * (1 + 1e-9))
    assert np.all(losses <= factor * best * (1 + 1e-9))


# The command

TEXT = "Calibration text for a model that reads bytes. " * 60


@pytest.fixture
def workspace(tmp_path):
    write_tiny(tmp_path / "model", variant="grouped_heads")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def command(workspace, *more, model="model"):
    options = ["--calibration", workspace / "text.txt", "--samples", 8, "--sequence-length", 32]
    return [
        str(argument) for argument in ["inspect", workspace / model, "--grams", *options, *more]
    ]


def inputs_by_tap(index: int) -> dict:
    """What the linears of a layer of the tiny model see, (tokens, in), in float64."""
    config = config_dict("grouped_heads")
    windows = spread_windows(tokenize(byte_tokenizer(), TEXT, 260), 8, 32)
    seen = seen_by_linears(config, random_weights(config), windows, index)
    linears = layer_linears(config_from_hf(config), index)
    return {linear.input: seen[linear.tensor] for linear in linears}


@pytest.mark.slow
def test_inspect_as_a_process_measures_what_the_linears_see(workspace):
    figure = workspace / "figure.svg"
    arguments = command(workspace, "--json", "--figure", figure)
    outcome = subprocess.run(
        [sys.executable, "-m", "prox24", *arguments], capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stderr
    assert figure.read_text().startswith("<?xml")
    printed = json.loads(outcome.stdout)
    assert printed["calibration_tokens"] == 256
    assert printed["reading"].startswith("Wanda's masks are optimal for")
    rows = printed["inputs"]
    names = ["attention_input", "attention_output", "mlp_input", "mlp_activation"]
    assert [(row["layer"], row["input"]) for row in rows] == [
        *((0, name) for name in names),
        *((1, name) for name in names),
    ]
    seen = [inputs_by_tap(0), inputs_by_tap(1)]
    for row in rows:
        features = seen[row["layer"]][row["input"]]
        assert row["features"] == features.shape[1]
        assert row["chance_mass"] == (row["features"] - 1) / (row["features"] - 1 + 256)
        expected = expected_floats(features)
        for name in ("effective_rank", "off_diagonal_mass", "coherence"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
        # A float32 Gram resolves no larger condition number, and JSON has no infinity.
        largest = 1 / (features.shape[1] * EPS[np.float32])
        for name in ("condition_number", "scaled_condition_number"):
            if expected[name] < largest / 100:
                assert row[name] == pytest.approx(expected[name], rel=0.05), name
            if expected[name] > largest * 100:
                assert row[name] is None


def test_inspect_prints_a_table_and_its_reading_for_people(workspace, capsys):
    assert main(command(workspace, "--figure", workspace / "figure.png")) == 0
    printed = capsys.readouterr().out
    assert printed.count("│ 1 mlp_activation ") == 1
    assert "effective rank" in printed
    assert "independent features would show up to" in printed
    assert (workspace / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_writes_the_same_figure_from_every_run_and_is_quiet(workspace, capfd):
    figures = [workspace / "first.svg", workspace / "second.svg"]
    for figure in figures:
        assert main(command(workspace, "--quiet", "--figure", figure)) == 0
    assert capfd.readouterr().out == ""
    assert figures[0].read_bytes() == figures[1].read_bytes()


def test_one_layer_with_dead_features_everywhere_can_be_drawn(workspace, capsys):
    config = config_dict(num_hidden_layers=1)
    weights = random_weights(config)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"model.layers.0.{name}.weight"][:] = 0
    write_folder(workspace / "dead", config, weights)
    figure = workspace / "figure.svg"
    assert main(command(workspace, "--json", "--figure", figure, model="dead")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reading"] == "Every Gram is diagonal, so Wanda's masks are optimal."
    assert all(row["features"] == row["kruskal_upper"] == 0 for row in printed["inputs"])
    assert figure.is_file()


def row(layer, mass, factor):
    return {
        "layer": layer,
        "input": "mlp_input",
        "off_diagonal_mass": mass,
        "scaled_condition_number": factor,
        "chance_mass": 0.125,
    }


def test_the_reading_states_the_extremes_and_the_bound():
    text = reading([row(0, 0.25, 2.0), row(1, 0.75, 40.0)], tokens=512)
    assert "50.0%" in text
    assert "from 25.0% (0 mlp_input) to 75.0% (1 mlp_input)" in text
    assert "up to 12.5% in 512 tokens" in text
    assert "Wanda's loss is at most 40 times the least loss" in text


def test_the_reading_claims_no_bound_from_a_singular_gram():
    text = reading([row(0, 0.25, 2.0), row(1, 0.75, math.inf)], tokens=512)
    assert "In 1 of 2 inputs the scaled Gram is singular to rounding" in text
    assert "at most" not in text


def test_the_chance_mass_is_that_of_independent_features():
    generator = np.random.default_rng(0)
    tokens, width = 200, 50
    masses = [
        expected_floats(generator.standard_normal((tokens, width)))["off_diagonal_mass"]
        for _ in range(10)
    ]
    assert np.mean(masses) == pytest.approx((width - 1) / (tokens + width - 1), rel=0.02)


def no_folder_for_the_figure(workspace):
    return ["--figure", workspace / "a" / "figure.svg"], "figure.svg"


def figure_of_another_kind(workspace):
    return ["--figure", workspace / "figure.jpeg"], ".png or .svg"


def figure_that_is_a_folder(workspace):
    (workspace / "folder.svg").mkdir()
    return ["--figure", workspace / "folder.svg"], "is a folder"


@pytest.mark.parametrize(
    "make", [no_folder_for_the_figure, figure_of_another_kind, figure_that_is_a_folder]
)
def test_a_figure_that_cannot_be_written_ends_before_anything_is_read(workspace, capsys, make):
    more, named = make(workspace)
    assert_one_line_error(command(workspace, *more, model="nowhere"), named, capsys)


def test_a_figure_without_matplotlib_ends_before_anything_is_read(workspace, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = command(workspace, "--figure", workspace / "figure.svg", model="nowhere")
    assert_one_line_error(arguments, "pip install 'prox24[examples]'", capsys)


def test_a_missing_model_is_named(workspace, capsys):
    assert_one_line_error(command(workspace, model="nowhere"), "nowhere", capsys)


def test_an_activation_that_is_not_finite_is_named_and_leaves_no_figure(workspace, capsys):
    weights = random_weights(config_dict())
    weights["model.layers.1.input_layernorm.weight"][0] = 1e25  # its square is not a float32
    write_folder(workspace / "broken", config_dict(), weights)
    arguments = command(workspace, "--figure", workspace / "figure.svg", model="broken")
    assert_one_line_error(arguments, "attention_input of layer 1", capsys)
    assert not (workspace / "figure.svg").exists()


def assert_one_line_error(arguments, named, capsys):
    assert main([*arguments, "--quiet"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("prox24: error: ")
    assert named in printed.err
