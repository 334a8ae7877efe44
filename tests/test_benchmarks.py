"""The benchmarks run, and their rivals do what they say."""

import csv
import importlib
import importlib.util
import itertools
import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import brute_force_prox, prox_objective, sparsegpt
from tiny import write_tiny

from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.jobs.perplexity import perplexity

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RIVALS = runpy.run_path(str(BENCHMARKS / "rivals.py"))
FORMS = {"prox24.prox", "prox24.prox, rows of one block", "prox24.planes.prox"}


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=BENCHMARKS.parent, timeout=300
    )


@pytest.fixture
def benchmark(tmp_path, monkeypatch, capsys):
    """Imports a benchmark and runs it on a tiny model, two texts and an output folder."""
    write_tiny(tmp_path / "model")
    calibration, text = tmp_path / "calibration.txt", tmp_path / "text.txt"
    calibration.write_text("Text of which a model reads the bytes. " * 60)
    text.write_text("And what it never read, is this text. " * 60)
    monkeypatch.syspath_prepend(BENCHMARKS)
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "fetch_model", lambda cache: tmp_path / "model")

    def load(name, **settings):
        module = importlib.import_module(name)
        for setting, value in settings.items():
            monkeypatch.setattr(module, setting, value)
        return module

    def main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        # Users have these modes, and Optax's optimizers need them.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            module.main()
        return capsys.readouterr().out

    load.main = main
    return load


# Rivals


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


@rivals
def test_rivals_reach_the_minimum_where_the_objective_is_strongly_convex(rival):
    y = np.random.default_rng(0).normal(size=(512, 4)).astype(np.float32)
    # The rows of the Hessian's off-diagonal part sum to at most 6 max(y) lam, here 1/2.
    y *= 0.5 / (6 * 0.3 * np.abs(y).max(axis=-1, keepdims=True))
    best = brute_force_prox(y, 0.3)
    value = prox_objective(rival(y, 0.3), y, 0.3)
    assert np.all(value <= best + 1e-6 * np.maximum(best, 1e-6 * np.sum(y**2, axis=-1)))


@rivals
def test_rivals_choose_each_support_size_where_it_is_the_minimum(rival):
    y = np.array([[-1.0, 0.4, 0.8, -0.6]], np.float32)
    known = {0: y[0], 0.3: (-0.911, 0.021, 0.681, -0.404), 0.4: (-0.904, 0, 0.671, -0.357)}
    for lam, w in (known | {1.0: (-1, 0, 0.8, 0), 1e3: (-1, 0, 0.8, 0)}).items():
        np.testing.assert_allclose(rival(y, lam)[0], w, rtol=0, atol=1e-3)


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


# Scripts


def test_no_block_of_prox_is_worse_than_that_of_the_best_rival(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "figures.json"
    outcome = run("benchmarks/prox.py", "--blocks", 1024, "--repetitions", 1, "--json", path)
    assert outcome.returncode == 0, outcome.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3 * (1 + len(FORMS) + 3)
    for row in rows:
        if row["contender"] in FORMS:
            assert 0 <= row["mean_excess"] <= row["worst_excess"] <= 1e-6


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("prox", "--blocks", 100),
        ("prox", "--repetitions", 0),
        ("sparsegpt", "--shapes", "64"),
        ("sparsegpt", "--shapes", "8x6"),
    ],
)
def test_a_size_that_cannot_be_measured_is_one_line_with_its_name(
    name, option, value, benchmark, capsys
):
    if name == "sparsegpt":
        pytest.importorskip("torch")
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(benchmark(name), option, value)
    last = capsys.readouterr().err.splitlines()[-1]
    assert option in last
    assert str(value) in last


def test_sparsegpt_of_prox24_and_of_pytorch_lose_the_same(benchmark, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "figures.json"
    sizes = "--shapes", "16x64,24x200", "--repetitions", 1, "--json", path
    benchmark.main(benchmark("sparsegpt"), *sizes)
    rows = json.loads(path.read_text())["rows"]
    for ours, original in zip(rows[::2], rows[1::2], strict=True):
        assert ours["relative_loss"] == pytest.approx(original["relative_loss"], rel=0.01)
        assert ours["mask_agreement"] >= 0.995


def test_inverses_are_inverses(benchmark):
    with jax.enable_x64(False):
        rows = benchmark("inverse").measure(24, 1)
    assert rows[0][3] == "1.00"
    assert max(float(row[4]) for row in rows[1:4]) <= 1e-5


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
@pytest.mark.parametrize("name", ["prox_tpu", "layer_tpu", "matmul_tpu"])
def test_compiling_for_tpus_without_libtpu_is_one_line_that_says_what_to_install(name):
    outcome = run(f"benchmarks/{name}.py")
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert "pip install libtpu" in line


@pytest.mark.slow
def test_memory_of_plans_is_tabled(benchmark):
    common = benchmark("common")
    tiny = {"tiny": common.llama(64, 64, 1, 8, vocab_size=256)}
    machines = {"a machine": ["--memory", "1GB"]}
    plan = benchmark("plan", MODELS=tiny, MACHINES=machines)
    printed = benchmark.main(plan, "--models", "tiny", "--samples", 2, "--sequence-length", 16)
    assert "a machine" in printed
    assert "yes" in printed


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(benchmark):
    memory = benchmark("memory")
    memory.SHAPE["vocab_size"] = 256
    assert "0.128" in benchmark.main(memory, "--layers", 1, "--samples", 1)


# Layers and models


def test_windows_of_a_seed_do_not_overlap_and_fewer_are_a_subset_of_more(benchmark):
    drawn = benchmark("common").drawn_windows
    ids = np.arange(1003)
    many, few, other = drawn(ids, 64, 10, 0), drawn(ids, 8, 10, 0), drawn(ids, 8, 10, 1)
    assert len(np.unique(many)) == many.size == 640
    assert np.array_equal(many[:8], few)
    assert not np.array_equal(few, other)


def test_lines_of_a_table_keep_to_its_columns(benchmark, tmp_path):
    common, path = benchmark("common"), tmp_path / "table.csv"
    common.add_row(path, {"run": "a", "first": 1})
    rows = common.add_row(path, {"first": 3, "run": "b"})
    assert rows == common.read_rows(path, ["first", "run"])
    assert rows[1] == {"run": "b", "first": "3"}
    assert common.has_row(rows, {"run": "b", "first": 3})
    assert not common.has_row(rows, {"run": "b", "first": 1})
    with pytest.raises(SystemExit, match=r"table\.csv has run, first, not run, second"):
        common.read_rows(path, ["run", "second"])


@pytest.mark.parametrize("table", ["main", "growth"])
def test_the_model_benchmark_measures_pruned_models_and_goes_on(benchmark, tmp_path, table):
    model = benchmark("model", EVALUATION_LENGTH=32)
    for runs in (make() for make in model.TABLES.values()):
        assert len({(run.method, *run.varied.items()) for run in runs}) == len(runs)
    runs = [model.Run("dense", None, varied={"growth": 1.1}), *model.growth_table()[-2:]]
    model = benchmark("model", TABLES={table: lambda: runs})
    options = table, "--calibration", "calibration.txt", "--texts", "text.txt", "--windows", 4
    options = *options, "--length", 32, "--evaluation-windows", 2
    printed = benchmark.main(model, *options, "--seeds", 0, 1)
    assert printed.count("±") == 3 * 3 - 1  # dense has no loss
    path = tmp_path / f"model-{table}.csv"
    before = path.read_text()
    assert benchmark.main(model, *options, "--seeds", 0, 1) == printed
    assert path.read_text() == before
    assert path.with_suffix(".png").stat().st_size > 5000


def test_layers_are_solved_by_every_contender_that_is_asked_for(benchmark, tmp_path):
    layers = benchmark("layers")
    text = "--calibration", "calibration.txt", "--samples", 2
    assert "sparsegpt" in benchmark.main(layers, "--layers", 0, *text, "--only", "wanda")
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["wanda", layers.REFERENCE, layers.DEFAULT]
    assert [row["contender"] for row in rows] == names * 7


def test_refined_models_are_made_once_and_evaluated_again(benchmark, tmp_path, monkeypatch):
    settings = {"alone": lambda function, *arguments: function(*arguments)}
    refine = benchmark("refine", LENGTH=64, WINDOWS=8, **settings)
    every = refine.runs()
    assert len({(run.name, run.distinct_tokens) for run in every}) == len(every)
    assert {run.base for run in every} == {"dense", *refine.BASES}
    given = {"calibration": tmp_path / "calibration.txt", "seed": 0, "cache": tmp_path}
    whole = refine.Run("sparsegpt + model", "sparsegpt", 8, refine.ModelRefinement())
    monkeypatch.setattr(refine, "runs", lambda: [*every[:2], whole])
    texts = "--calibration", "calibration.txt", "--texts", "text.txt", "--evaluation-windows", 2
    printed = benchmark.main(refine, *texts, "--windows", 8, "--cache", tmp_path)
    assert "0.00)" in printed  # of dense
    assert "(1.00)" in printed  # of SparseGPT
    assert "0% of what is evaluated of text is in calibration.txt" in printed
    for function in ("prune", "distill"):
        monkeypatch.setattr(refine.common, function, None)
    assert benchmark.main(refine, *texts, "--windows", 8, "--cache", tmp_path) == printed
    pruned = refine.pruned_model("sparsegpt", **given)
    refined = refine.refined_model(whole, pruned.folder, **given)
    assert (pruned.tokens, refined.tokens) == (0, 7 * 64)
    blocks = refine.BASES["sparsegpt + refit + block, bfloat16, passes: 5"]
    assert blocks.trained_on == 5 * 7 * 64  # of 8 windows one is held out


def test_windows_that_are_in_the_calibration_are_left_out(benchmark, tmp_path):
    refine = benchmark("refine", LENGTH=64)
    seen, other = "so many words that " * 10, "and others that it has not, " * 10
    length = 60 * (min(len(seen), len(other)) // 60)
    text = seen[:length] + other[:length]
    assert refine.share_seen(text, f"before {seen}".replace(" ", "\n")) == 0.5
    calibration, path = tmp_path / "calibration.txt", tmp_path / "both.txt"
    path.write_text(calibration.read_text()[:64] + "And what it never read, is this text. " * 5)
    dense = open_checkpoint(tmp_path / "model")
    every, unseen = (
        refine.evaluated_windows(dense, path, 2, calibration, unseen) for unseen in (False, True)
    )
    np.testing.assert_array_equal(every[1], unseen[0])
    with pytest.raises(SystemExit, match="has 2 windows that are not in"):
        refine.evaluated_windows(dense, path, 3, calibration, True)


def test_generation_is_measured_for_each_form_of_the_weights(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("PROX24_CACHE", str(tmp_path / "cache"))
    generate = benchmark("generate")
    rows = [generate.measure(form, tmp_path / "model", 4, 4) for form in generate.FORMS]
    sizes = {row["form"]: row["weights_bytes"] for row in rows}
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert sizes["float32, packed"] < sizes["float32"]
    assert generate.median_of([rows[0] | {"tokens_per_second": 1e9}, rows[0], rows[0]]) == rows[0]
    share = generate.ratio(rows, rows[1], "weights_bytes")
    assert share == sizes["float32, packed"] / sizes["float32"]
    assert np.isnan(generate.ratio(rows[1:], rows[1], "weights_bytes"))
    assert generate.cells(rows, rows[0])[-2:] == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [
        ("devices", ["--samples", 8, "--length", 32], "columns"),
        ("parity", ["--windows", 2, "--length", 16], "32 of 32"),
    ],
)
def test_devices_and_parity_in_processes_of_their_own(name, options, printed, tmp_path):
    pytest.importorskip("torch")
    write_tiny(tmp_path / "model")
    patched = f"common.fetch_model = lambda cache: {str(tmp_path / 'model')!r}"
    code = f"import sys; sys.path.insert(0, 'benchmarks'); import common; {patched}; "
    outcome = run("-c", f"{code} import {name}; {name}.main()", *options)
    assert outcome.returncode == 0, outcome.stderr
    assert printed in outcome.stdout


def test_an_answer_is_chosen_by_the_likelihood_of_its_text_alone(benchmark, tmp_path):
    choice = benchmark("multiple_choice", BATCH=4)
    checkpoint = open_checkpoint(tmp_path / "model")
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 260, length).tolist() for length in (3, 17, 9, 9, 2, 30)]
    for text, loss in zip(texts, choice.text_losses(checkpoint, texts), strict=True):
        alone = perplexity(checkpoint, np.array([text], np.int32)).perplexity
        assert loss / (len(text) - 1) == pytest.approx(np.log(alone), rel=1e-4)
    archive, path = tmp_path / "bigbench-1.0.0.tar.gz", tmp_path / "task.json"
    example = {"input": "A goal is ", "target_scores": {"this": 0, "that": 1, "it": 0}}
    path.write_text(json.dumps({"examples": [example] * 3}))
    with tarfile.open(archive, "w:gz") as files:
        for folder in choice.TASKS.values():
            files.add(path, f"bigbench-1.0.0/bigbench/benchmark_tasks/{folder}/task.json")
    questions = choice.read_questions(archive, 2)
    assert "mean" in benchmark.main(choice, archive, "model")
    question = questions["goal"][0]
    assert question == (["A goal is this", "A goal is that", "A goal is it"], 1)
    tokens = [checkpoint.load_tokenizer()(text)["input_ids"] for text in question.texts]
    right = float(np.argmin(choice.text_losses(checkpoint, tokens)) == 1)
    assert choice.accuracies(checkpoint, questions) == dict.fromkeys(questions, right)


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


def test_pytorch_multiplies_the_same_numbers_where_it_has_a_gpu(monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    benchmark = runpy.run_path(str(BENCHMARKS / "matmul.py"))
    x, dense = jnp.ones((8, 64), "bfloat16"), jnp.ones((32, 64), "bfloat16")
    assert benchmark["by_pytorch"](x, dense) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Dense:
        from_dense = staticmethod(lambda weight: weight)

    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensorCUTLASS", Dense)
    contenders = benchmark["by_pytorch"](x, dense)
    # The other one finds out that the numbers are on no GPU.
    assert "PyTorch, cuSPARSELt is left out: " in capsys.readouterr().out
    assert list(contenders) == ["PyTorch, CUTLASS"]
    found = contenders["PyTorch, CUTLASS"](3)()
    np.testing.assert_array_equal(found, jnp.full((8, 32), 64, "bfloat16"))


def test_moving_masks_are_compared_with_fixed_ones_on_windows_of_their_own(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    write_tiny(tmp_path / "model")
    benchmark = runpy.run_path(str(BENCHMARKS / "moving_masks.py"))
    module = benchmark["main"].__globals__
    monkeypatch.setitem(module, "fetch_model", lambda cache: tmp_path / "model")
    monkeypatch.setitem(module, "LENGTH", 8)
    monkeypatch.setitem(module, "HELD_OUT", 2)
    monkeypatch.setitem(module, "TESTED", 2)
    layer, other = benchmark["dense_layers"]([0, 1], None, 8, 1)
    assert layer.loss is other.loss
    assert layer.steps_of_pass == 8 - 4
    assert benchmark["error"](layer, layer.weights) < 1e-6
    # Optax's optimizers mix dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pruned = benchmark["pattern"](layer, layer.weights)
        found = [
            benchmark["moving"](layer, layer.weights, 3e-3, 4, 2),
            benchmark["fixed"](layer, pruned, 3e-3, 2),
            benchmark["refined"](layer, pruned, 3e-3, 2),
        ]
        arguments = ["--layers", "0", "--samples", "8", "--passes", "4", "--rates", "1e-3"]
        arguments += ["--step-windows", "2"]
        monkeypatch.setattr(sys, "argv", ["moving_masks.py", *arguments])
        benchmark["main"]()
    errors = [benchmark["error"](layer, weights) for weights in found]
    assert max(errors) < benchmark["error"](layer, pruned)
    for name, values in itertools.chain(*(weights.items() for weights in found)):
        if name in layer.scales:
            assert np.count_nonzero(np.asarray(values).reshape(-1, 4), axis=1).max() == 2
    assert "0, 0.001" in capsys.readouterr().out
