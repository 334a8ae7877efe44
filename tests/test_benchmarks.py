"""The benchmarks run, show no speed without accuracy, and time rivals that do what they say."""

import csv
import importlib.util
import json
import runpy
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prox24.pipeline import collect, prune
from reference import brute_force_prox, largest, prox_objective, sparsegpt
from test_solvers import make_problem
from tiny import tokens, write_tiny

from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.core.masks import is_sparse
from prox24.jobs.perplexity import perplexity
from prox24.solvers.problem import LayerProblem, Status
from prox24.solvers.scores import Wanda
from prox24.solvers.solve import solve
from prox24.solvers.sparsegpt import SparseGPT

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RIVALS = runpy.run_path(str(BENCHMARKS / "rivals.py"))
sys.path.append(str(BENCHMARKS))  # as for a script there

from baselines import ALPS, Boza  # noqa: E402

FORMS = {"prox24.prox", "prox24.prox, rows of one block", "prox24.planes.prox"}


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=BENCHMARKS.parent, timeout=300
    )


def figures(path, *arguments):
    sizes = ("--blocks", 1024, "--repetitions", 1, "--json", path)
    outcome = run("benchmarks/prox.py", *sizes, *arguments)
    assert outcome.returncode == 0, outcome.stderr
    rows = json.loads(path.read_text())["rows"]
    printed = [line.split()[1] for line in outcome.stdout.splitlines() if line.startswith("│")]
    assert len(printed) == len(rows), outcome.stdout
    return rows


def test_no_block_of_prox_is_worse_than_that_of_the_best_rival(tmp_path):
    pytest.importorskip("torch")
    rows = figures(tmp_path / "figures.json")
    names = [row["contender"] for row in rows if row["lam"] == 0.3]
    assert names == [
        "copy",
        "prox24.prox",
        "prox24.prox, rows of one block",
        "prox24.planes.prox",
        "alternating minimisation",
        "alternating minimisation, tuned",
        "gradient descent",
    ]
    assert len(rows) == 3 * len(names)
    for row in rows:
        if row["contender"] in FORMS:
            assert 0 <= row["mean_excess"] <= row["worst_excess"] <= 1e-6


def test_the_forms_of_prox_are_compared_without_pytorch(tmp_path):
    rows = figures(tmp_path / "figures.json", "--skip-rivals")
    assert {row["contender"] for row in rows} == FORMS | {"copy"}
    for row in rows:
        assert row["ratio_to_alternating_minimisation"] is row["ratio_to_tuned"] is None


@pytest.mark.parametrize(("option", "value"), [("--blocks", 100), ("--repetitions", 0)])
def test_a_size_that_cannot_be_measured_is_one_line_with_its_name(option, value):
    outcome = run("benchmarks/prox.py", option, value)
    assert outcome.returncode == 2
    assert f"{option} {value}" in outcome.stderr.splitlines()[-1]


def alternating_minimisation(y, lam, name="alternating_minimisation"):
    torch = pytest.importorskip("torch")
    return RIVALS[name](torch.from_numpy(y), lam).numpy()


def tuned_alternating_minimisation(y, lam):
    return alternating_minimisation(y, lam, "tuned_alternating_minimisation")


def gradient_descent(y, lam):
    return np.asarray(RIVALS["gradient_descent"](jnp.asarray(y), lam))


rivals = pytest.mark.parametrize(
    "rival", [alternating_minimisation, tuned_alternating_minimisation, gradient_descent]
)


def blocks(count=512):
    return np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)


@rivals
def test_rivals_reach_the_minimum_where_the_objective_is_strongly_convex(rival):
    y = blocks()
    # The rows of the Hessian's off-diagonal part sum to at most 6 max(y) lam, here 1/2.
    y *= 0.5 / (6 * 0.3 * np.abs(y).max(axis=-1, keepdims=True))
    best = brute_force_prox(y, 0.3)
    value = prox_objective(rival(y, 0.3), y, 0.3)
    assert np.all(value <= best + 1e-6 * np.maximum(best, 1e-6 * np.sum(y**2, axis=-1)))


@rivals
def test_rivals_keep_the_two_largest_under_a_large_penalty(rival):
    y = blocks()
    expected = np.where(largest(np.abs(y), 2, 4), y, 0)
    np.testing.assert_array_equal(rival(y, 1e3), expected)


@rivals
def test_rivals_choose_each_support_size_where_it_is_the_minimum(rival):
    y = np.array([[-1.0, 0.4, 0.8, -0.6]] * 3, np.float32)
    expected = [(-0.911, 0.021, 0.681, -0.404), (-0.904, 0, 0.671, -0.357), (-1, 0, 0.8, 0)]
    for row, lam, w in zip(y, (0.3, 0.4, 1.0), expected, strict=True):
        np.testing.assert_allclose(rival(row[None], lam)[0], w, rtol=0, atol=1e-3)


@rivals
def test_rivals_change_nothing_without_a_penalty(rival):
    y = blocks()
    np.testing.assert_array_equal(rival(y, 0.0), y)


@rivals
def test_rivals_keep_dtype_and_signs(rival):
    y = blocks()
    w = rival(y, 0.3)
    assert w.dtype == np.float32
    assert np.all(w * y >= 0)
    assert np.all(np.abs(w) <= np.abs(y))


def test_gradient_descent_reaches_the_minimum_of_every_normal_block():
    y = blocks()
    for lam in (0.1, 0.3, 1.0):
        best = brute_force_prox(y, lam)
        scale = np.maximum(best, 1e-6 * np.sum(y**2, axis=-1))
        assert np.all(prox_objective(gradient_descent(y, lam), y, lam) <= best + 1e-6 * scale)


def test_sparsegpt_in_pytorch_equals_the_columnwise_reference():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    width, dead = 200, 5
    weight, tokens = rng.normal(size=(16, width)), rng.normal(size=(300, width)).cumsum(axis=1)
    tokens[:, dead] = 0
    gram = tokens.T @ tokens
    found, mask = RIVALS["sparsegpt"](torch.from_numpy(weight), torch.from_numpy(gram), 0.01)
    weight[:, dead], gram[dead, dead] = 0, 1
    expected, expected_mask = sparsegpt(weight, gram, 2, 4, 0.01)
    np.testing.assert_array_equal(mask.numpy(), expected_mask)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_sparsegpt_of_prox24_and_of_pytorch_lose_the_same(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "figures.json"
    sizes = ("--shapes", "16x64,24x200", "--repetitions", 1, "--json", path)
    outcome = run("benchmarks/sparsegpt.py", *sizes)
    assert outcome.returncode == 0, outcome.stderr
    rows = json.loads(path.read_text())["rows"]
    names = [(row["shape"], row["contender"]) for row in rows]
    assert names == [(s, c) for s in ("16x64", "24x200") for c in ("prox24", "PyTorch")]
    for ours, original in zip(rows[::2], rows[1::2], strict=True):
        assert ours["relative_loss"] == pytest.approx(original["relative_loss"], rel=0.01)
        assert ours["mask_agreement"] >= 0.995


def test_inverses_are_timed_in_products_and_are_inverses():
    outcome = run("benchmarks/inverse.py", "--widths", 24, "--repetitions", 1)
    assert outcome.returncode == 0, outcome.stderr
    rows = [line.split("│")[1:-1] for line in outcome.stdout.splitlines() if line.startswith("│")]
    names = [name.strip() for name, *_ in rows]
    assert names == ["product", "sweeps", "Cholesky", "LU", "eigenvectors"]
    assert rows[0][3].strip() == "1.00"
    for row in rows[1:4]:
        assert float(row[4]) <= 1e-5


@pytest.mark.parametrize(
    ("option", "value"), [("--shapes", "64"), ("--shapes", "8x6"), ("--repetitions", 0)]
)
def test_a_layer_that_cannot_be_measured_is_one_line_with_its_name(option, value):
    pytest.importorskip("torch")
    outcome = run("benchmarks/sparsegpt.py", option, value)
    assert outcome.returncode == 2
    last = outcome.stderr.splitlines()[-1]
    assert option in last
    assert str(value) in last


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
@pytest.mark.parametrize("name", ["prox_tpu", "layer_tpu", "matmul_tpu"])
def test_compiling_for_tpus_without_libtpu_is_one_line_that_says_what_to_install(name):
    outcome = run(f"benchmarks/{name}.py")
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert "pip install libtpu" in line


# Layers and models


def test_windows_of_a_seed_do_not_overlap_and_fewer_are_a_subset_of_more():
    drawn = runpy.run_path(str(BENCHMARKS / "model.py"))["drawn_windows"]
    ids = np.arange(1003)
    many, few, other = drawn(ids, 64, 10, 0), drawn(ids, 8, 10, 0), drawn(ids, 8, 10, 1)
    assert len(np.unique(many)) == many.size == 640
    assert np.array_equal(many[:8], few)
    assert not np.array_equal(few, other)


def test_a_run_of_the_model_benchmark_measures_the_pruned_model(tmp_path):
    benchmark = runpy.run_path(str(BENCHMARKS / "model.py"))
    write_tiny(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    windows = {"text": tokens(4, 32)}
    dense = benchmark["Run"]("dense", None)
    wanda = benchmark["Run"]("wanda", Wanda())
    rows = [benchmark["measure"](run, checkpoint, tokens(4, 32), windows) for run in (dense, wanda)]
    assert rows[0]["text"] == pytest.approx(perplexity(checkpoint, windows["text"]).perplexity)
    assert rows[1]["text"] != rows[0]["text"]
    pruned = collect(prune(checkpoint, tokens(4, 32), Wanda(), None))
    losses = [report.statistics.relative_loss for report in pruned.reports]
    assert rows[1]["mean_relative_loss"] == pytest.approx(np.mean(losses))
    replaced = benchmark["with_tensors"](checkpoint, pruned.tensors)
    assert rows[1]["text"] == pytest.approx(perplexity(replaced, windows["text"]).perplexity)


def test_the_tables_of_the_model_benchmark_name_each_run_once():
    for table in runpy.run_path(str(BENCHMARKS / "model.py"))["TABLES"].values():
        runs = [(run.method, *run.varied.items()) for run in table()]
        assert len(set(runs)) == len(runs)


def test_an_ablation_varies_a_column_and_is_drawn_with_the_mean_over_seeds(tmp_path, capsys):
    benchmark = runpy.run_path(str(BENCHMARKS / "model.py"))
    rows = [
        {"run": "prox", "growth": value, "text": text, "mean_relative_loss": "", "seed": seed}
        | {"solver_seconds": "1"}
        for value, text, seed in (("1.5", "20", "0"), ("1.1", "10", "0"), ("1.1", "12", "1"))
    ]
    for table, (column, title) in benchmark["VARIED"].items():
        assert all(column in run.varied for run in benchmark["TABLES"][table]())
        assert title
    benchmark["print_table"](rows, ["text"], "growth")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "1.1" in line]
    assert "11.00 ± 1.00" in line
    benchmark["draw"](rows, ["text"], "growth", "growth of lambda", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000
    benchmark["draw_methods"](rows, ["text"], tmp_path / "main.png")
    assert (tmp_path / "main.png").stat().st_size > 5000


def test_gaps_of_refined_models_are_shares_and_drawn_by_tokens_and_seconds(
    tmp_path, monkeypatch, capsys
):
    benchmark = runpy.run_path(str(BENCHMARKS / "refine.py"))
    runs = benchmark["runs"]()
    assert len({(run.name, run.distinct_tokens) for run in runs}) == len(runs)
    assert {run.base for run in runs} == {"dense", *benchmark["BASES"]}

    def row(run, seed):
        dense, sparsegpt = (run.name == name for name in ("dense", "sparsegpt"))
        return {
            "run": run.name,
            "distinct_tokens": str(run.distinct_tokens),
            "seed": seed,
            "calibration": "text",
            "evaluation_windows": "16",
            "tokens": str(run.windows * 480),
            "seconds": "10.0",
            "peak_memory_bytes": "1000000000",
            "text": str(np.exp(3.0 if dense else 5.0 if sparsegpt else 4.0)),
            "right_answers": "0.25",
        }

    rows = [row(run, "0") for run in runs]
    found = dict(zip((run.name for run in runs), benchmark["gaps"](rows, ["text"]), strict=True))
    assert (found.pop("dense"), found.pop("sparsegpt")) == (0, 1)
    np.testing.assert_allclose(list(found.values()), 0.5)
    # Each seed has its own dense model and SparseGPT; here it has none.
    assert np.isnan(benchmark["gaps"]([*rows, row(runs[-1], "1")], ["text"])[-1])
    benchmark["print_table"](rows, ["text"])
    printed = capsys.readouterr().out
    assert "25.0%" in printed
    assert f"{np.exp(4):.2f} (0.50)" in printed
    drawn, plt = [], benchmark["plt"]
    kept = types.SimpleNamespace(subplots=plt.subplots, close=drawn.append)
    monkeypatch.setitem(benchmark["draw"].__globals__, "plt", kept)
    benchmark["draw"](rows, ["text"], tmp_path / "refine.png")
    by_tokens, by_seconds = drawn[0].axes
    lines = {line.get_label(): line.get_xdata().tolist() for line in by_tokens.lines}
    whole = "sparsegpt + refit + model, rate 0.0005, bfloat16"
    assert lines[whole] == [0, 64 * 480, 256 * 480, 1024 * 480]
    assert set(lines) == {run.line for run in runs if run.before not in (None, "dense")}
    seconds = {line.get_label(): line.get_xdata().tolist() for line in by_seconds.lines}
    assert seconds[whole] == [10, 20, 20, 20]
    assert seconds["sparsegpt + refit + block, bfloat16"] == [10, 10, 10, 10]
    both = "admm, dense targets + block, passes: 5 + model, rate 0.0005, bfloat16"
    assert lines[both] == [0, 64 * 480, 256 * 480, 1024 * 480]
    assert seconds[both] == [10, 20, 20, 20]
    plt.close(drawn[0])


def test_contenders_of_the_layers_are_compiled_by_one_step_and_measured_in_full():
    benchmark = runpy.run_path(str(BENCHMARKS / "layers.py"))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    problem = LayerProblem(jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), x.T @ x)
    field = benchmark["contenders"]()
    names = [benchmark[name] for name in ("DEFAULT", "REFERENCE", "PAPER")]
    for name in (*names, "admm, ALPS", "admm, Boza"):
        contender = field[name]
        solution, seconds = benchmark["measure"](contender, problem)
        assert seconds > 0
        assert solution.status is Status.SPARSE
        expected = solve(problem, contender.solver, contender.refit)
        assert np.array_equal(solution.weight, expected.weight)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_the_published_forms_of_admm_lose_less_than_sparsegpt(pattern):
    problem = make_problem("power_law")
    rival = solve(problem, SparseGPT(), pattern=pattern).statistics.relative_loss
    for solver in (ALPS(), Boza()):
        solution = solve(problem, solver, pattern=pattern)
        assert solution.status is Status.SPARSE
        assert bool(is_sparse(solution.weight, pattern))
        assert 3 < solution.statistics.steps < 300
        assert solution.statistics.relative_loss < rival


def test_generation_is_measured_for_each_form_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path / "model")
    benchmark = runpy.run_path(str(BENCHMARKS / "generate.py"))
    rows = [benchmark["measure"](form, tmp_path / "model", 4, 4) for form in benchmark["FORMS"]]
    sizes = {row["form"]: row["weights_bytes"] for row in rows}
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert sizes["float32, packed"] < sizes["float32"]
    for row in rows:
        assert min(row["resident_bytes"], row["peak_bytes"]) > row["weights_bytes"]
        assert row["tokens_per_second"] > 0
    faster = rows[0] | {"tokens_per_second": 3 * rows[0]["tokens_per_second"]}
    assert benchmark["median_of"]([faster, rows[0], rows[0]]) == rows[0]
    share = benchmark["ratio"](rows, rows[1], "weights_bytes")
    assert share == sizes["float32, packed"] / sizes["float32"]
    assert np.isnan(benchmark["ratio"](rows, rows[0], "weights_bytes"))
    assert np.isnan(benchmark["ratio"](rows[1:], rows[1], "weights_bytes"))


@pytest.mark.slow
def test_packed_products_are_compared_if_correct_and_what_was_scaled_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path / "cache"))
    sizes = ("--scale", 0.02, "--repetitions", 1, "--linears", "8B o,8B down", "--seconds", 1e-4)
    outcome = run("benchmarks/matmul.py", "--batches", "1,3", *sizes, "--output", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    with (tmp_path / "matmul.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["contender"] for row in rows} >= {"dense x W^T", "unpack"}
    assert {(row["linear"], row["batch"]) for row in rows} == {
        (linear, batch) for linear in ("8B o", "8B down") for batch in ("1", "3")
    }
    assert max(float(row["error"]) for row in rows) < 1e-5
    assert "scaled by" in outcome.stdout
    assert (tmp_path / "matmul.png").stat().st_size > 0


def test_an_answer_is_chosen_by_the_likelihood_of_its_text_alone(tmp_path, monkeypatch):
    write_tiny(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    benchmark = runpy.run_path(str(BENCHMARKS / "multiple_choice.py"))
    monkeypatch.setitem(benchmark["text_losses"].__globals__, "BATCH", 4)
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 260, length).tolist() for length in (3, 17, 9, 9, 2, 30)]
    found = benchmark["text_losses"](checkpoint, texts)
    for text, loss in zip(texts, found, strict=True):
        alone = perplexity(checkpoint, np.array([text], np.int32)).perplexity
        assert loss / (len(text) - 1) == pytest.approx(np.log(alone), rel=1e-4)
    archive = tmp_path / "bigbench-1.0.0.tar.gz"
    with tarfile.open(archive, "w:gz") as files:
        for folder in benchmark["TASKS"].values():
            example = {"input": "A goal is ", "target_scores": {"this": 0, "that": 1, "it": 0}}
            path = tmp_path / "task.json"
            path.write_text(json.dumps({"examples": [example] * 3}))
            files.add(path, f"bigbench-1.0.0/bigbench/benchmark_tasks/{folder}/task.json")
    questions = benchmark["read_questions"](archive, 2)
    assert [len(asked) for asked in questions.values()] == [2, 2]
    question = questions["goal"][0]
    assert question == (["A goal is this", "A goal is that", "A goal is it"], 1)
    share = benchmark["accuracies"](checkpoint, questions)
    tokenizer = checkpoint.load_tokenizer()
    losses = benchmark["text_losses"](checkpoint, [tokenizer(t)["input_ids"] for t in question[0]])
    assert share == dict.fromkeys(questions, float(np.argmin(losses) == 1))


def test_lines_of_a_table_keep_to_its_columns(tmp_path):
    benchmark = runpy.run_path(str(BENCHMARKS / "model.py"))
    path = tmp_path / "table.csv"
    benchmark["add_row"](path, {"run": "a", "first": 1, "second": 2})
    rows = benchmark["add_row"](path, {"run": "b", "second": 4, "first": 3})
    assert rows[1] == {"run": "b", "first": "3", "second": "4"}
    with pytest.raises(ValueError, match=r"table\.csv has"):
        benchmark["add_row"](path, {"run": "c", "first": 5})
    assert benchmark["read_rows"](path) == rows
    benchmark["check_columns"](path, rows, "run", ["second", "first"])
    benchmark["check_columns"](path, [], "run", ["other"])
    for names in (["second"], ["first", "second", "third"]):
        with pytest.raises(SystemExit, match=r"table\.csv has first, second, not "):
            benchmark["check_columns"](path, rows, "run", names)


def test_tasks_that_an_archive_lacks_are_named(tmp_path):
    benchmark = runpy.run_path(str(BENCHMARKS / "multiple_choice.py"))
    there, missing = (f"benchmark_tasks/{name}/task.json" for name in benchmark["TASKS"].values())
    path, archive = tmp_path / "task.json", tmp_path / "bigbench.tar.gz"
    path.write_text('{"examples": []}')
    with tarfile.open(archive, "w:gz") as files:
        files.add(path, f"bigbench-1.0.0/bigbench/{there}")
    with pytest.raises(SystemExit, match=f"has no {missing}$"):
        benchmark["read_questions"](archive, 2)


def test_pieces_of_a_text_that_are_in_the_calibration_are_counted(monkeypatch):
    share_seen = runpy.run_path(str(BENCHMARKS / "refine.py"))["share_seen"]
    seen, other = "so many words that " * 10, "and others that it has not, " * 10
    length = 60 * (min(len(seen), len(other)) // 60)
    assert share_seen(seen[:length] + other[:length], f"before {seen}".replace(" ", "\n")) == 0.5
    assert share_seen(other, seen) == 0


def test_a_model_is_made_once_and_evaluated_again(tmp_path, monkeypatch):
    write_tiny(tmp_path / "model")
    calibration, text = tmp_path / "calibration.txt", tmp_path / "text.txt"
    calibration.write_text("Text of which a model reads the bytes. " * 60)
    text.write_text(calibration.read_text()[:64] + "And what it never read, is this text. " * 5)
    benchmark = runpy.run_path(str(BENCHMARKS / "refine.py"))
    module = benchmark["made"].__globals__
    monkeypatch.setitem(module, "fetch_model", lambda cache: tmp_path / "model")
    monkeypatch.setitem(module, "LENGTH", 64)
    monkeypatch.setitem(module, "WINDOWS", 8)
    given = calibration, 0, tmp_path
    pruned = benchmark["pruned_model"]("sparsegpt", *given)
    run = benchmark["Run"]("both", "sparsegpt", 8, benchmark["ModelRefinement"]())
    # Optax's optimizers mix dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        refined = benchmark["refined_model"](run, pruned.folder, *given)
    assert (pruned.tokens, refined.tokens) == (0, 7 * 64)
    for function in ("prune", "distill"):
        monkeypatch.setitem(module, function, None)
    assert benchmark["pruned_model"]("sparsegpt", *given)[:-1] == pruned[:-1]
    assert benchmark["refined_model"](run, pruned.folder, *given) == refined
    windows = {
        unseen: benchmark["evaluated_windows"](text, 2, calibration, unseen, tmp_path)
        for unseen in (False, True)
    }
    np.testing.assert_array_equal(windows[False][1], windows[True][0])
    with pytest.raises(SystemExit, match="has 2 windows that are not in"):
        benchmark["evaluated_windows"](text, 3, calibration, True, tmp_path)
    folders = pruned.folder, refined.folder
    found = [benchmark["evaluate"](one, {"text": windows[True]}, None)[0] for one in folders]
    assert found[0]["text"] != found[1]["text"]
    blocks = benchmark["BASES"]["sparsegpt + refit + block, bfloat16, passes: 5"]
    assert blocks.trained_on == 5 * 7 * 64  # of 8 windows one is held out
