"""The benchmarks run, and their rivals do what they say."""

import base64
import csv
import functools
import gzip
import hashlib
import importlib
import importlib.util
import json
import re
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT, run
from reference import (
    assert_close,
    brute_force_prox,
    damped,
    eps_of,
    largest,
    prox_objective,
    solve_roundings,
    sparsegpt,
)
from tiny import config_dict, random_weights, write_folder, write_tiny

import prox24

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(tmp_path, monkeypatch, capsys):
    """Imports a benchmark and runs it on a tiny model, two texts and an output folder."""
    config = config_dict(max_position_embeddings=512)  # the length of their windows
    write_folder(tmp_path / "model", config, random_weights(config))
    calibration, text = tmp_path / "calibration.txt", tmp_path / "text.txt.gz"
    calibration.write_text("Text of which a model reads the bytes. " * 60)
    text.write_bytes(gzip.compress(b"And what it never read, is this text. " * 60))
    monkeypatch.syspath_prepend(BENCHMARKS)
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "fetch_model", lambda cache: tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def load(name, **settings):
        if name in ("parity", "prox", "rivals", "sparsegpt"):
            pytest.importorskip("torch")
        module = importlib.import_module(name)
        for setting, value in settings.items():
            monkeypatch.setattr(module, setting, value)
        return module

    def main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        # Users have these modes, and Optax's optimizers need them.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            module.main()
        return capsys.readouterr().out

    load.main = main
    given = "--calibration calibration.txt --texts text.txt.gz --evaluation-windows 2"
    load.given = given.split()
    return load


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=["alternating_minimisation", "tuned_alternating_minimisation", "descent"])
def rival(request, benchmark):
    """A rival of the proximal operator, on arrays."""
    rivals = benchmark("rivals")
    if request.param == "descent":
        return lambda y, lam: np.asarray(rivals.gradient_descent(jnp.asarray(y), lam))
    torch, function = importlib.import_module("torch"), getattr(rivals, request.param)
    return lambda y, lam: function(torch.from_numpy(y), lam).numpy()


def test_rivals_reach_the_minimum_where_it_is_known(rival):
    y = np.random.default_rng(0).normal(size=(512, 4)).astype(np.float32)
    # The rows of the Hessian's off-diagonal part sum to at most 6 max(y) lam, here 1/2: the
    # objective is strongly convex.
    y *= 0.5 / (6 * 0.3 * np.abs(y).max(axis=-1, keepdims=True))
    best, value = brute_force_prox(y, 0.3), prox_objective(rival(y, 0.3), y, 0.3)
    # Eight roundings, as in core/test_prox.py.
    excess = (value - best) / np.maximum(best, 1e-6 * np.sum(y**2, axis=-1))
    assert excess.max() <= 8 * eps_of("float32")
    # Each size of the support is the minimum somewhere.
    y = np.array([[-1.0, 0.4, 0.8, -0.6]], np.float32)
    known = {0: y[0], 0.3: (-0.911, 0.021, 0.681, -0.404), 0.4: (-0.904, 0, 0.671, -0.357)}
    for lam, w in (known | {1.0: (-1, 0, 0.8, 0), 1e3: (-1, 0, 0.8, 0)}).items():
        np.testing.assert_allclose(rival(y, lam)[0], w, rtol=0, atol=1e-3)  # three digits


def test_sparsegpt_in_pytorch_equals_the_columnwise_reference(benchmark):
    rivals, torch = benchmark("rivals"), importlib.import_module("torch")
    rng, dead = np.random.default_rng(0), 5
    weight, tokens = rng.normal(size=(16, 200)), rng.normal(size=(300, 200)).cumsum(axis=1)
    tokens[:, dead] = 0
    gram = tokens.T @ tokens
    found, mask = rivals.sparsegpt(torch.from_numpy(weight), torch.from_numpy(gram), 0.01)
    weight[:, dead], gram[dead, dead] = 0, 1
    choose = functools.partial(largest, kept=2, group=4)
    expected, expected_mask = sparsegpt(weight, gram, choose, 4, 0.01)
    np.testing.assert_array_equal(mask.numpy(), expected_mask)
    assert_close(found.numpy(), expected, solve_roundings(damped(gram, 0.01)))


# Layers of random numbers


def test_no_block_of_prox_is_worse_than_that_of_the_best_rival(benchmark):
    y = np.random.default_rng(0).standard_normal((4, 1024), np.float32)
    seconds, excess = benchmark("prox").measure(y, 0.3, 1)
    assert len(seconds) == len(excess) + 1 == 7
    worst = [values.max() for name, values in excess.items() if name.startswith("prox24.")]
    assert len(worst) == 3
    assert max(worst) <= 8 * eps_of("float32")  # as in core/test_prox.py


def test_sparsegpt_of_prox24_and_of_pytorch_lose_the_same(benchmark):
    module = benchmark("sparsegpt")
    assert "24x200" in benchmark.main(module, "--shapes", "24x200", "--repetitions", 1)
    (_, loss, same), (_, original, _) = module.measure(16, 64, 1).values()
    # Rounding decides near ties, which change later ones: at most five of 1024.
    assert loss == pytest.approx(original, rel=5 / 512)
    assert same >= 1 - 5 / 1024


@pytest.mark.usefixtures("standard_promotion")
def test_descent_reaches_the_objectives_of_scikit_learn(benchmark):
    rows = benchmark("descent").measure(60, 20)
    assert [row[:2] for row in rows[::2]] == [["lasso", "prox24"], ["logistic", "prox24"]]
    assert max(float(row[2]) for row in rows) < 1e-6


@pytest.mark.usefixtures("standard_promotion")
def test_transforms_are_timed_on_trees_and_a_row_that_is_there_is_skipped(benchmark, tmp_path):
    trees = benchmark("trees", WIDTH=8, TURNS=1)
    found = trees.measure("proximal", 3, 2)
    assert min(found["first"], found["step"]) > 0
    assert trees.measure("check", 2, 1)["first"] > 0
    assert trees.measure_model("sequential", 3)["programs"] > 0
    assert trees.measure_model("check a model", 1)["programs"] > 0
    line = {"leaves": 1, "shapes": 1, "first": 1, "step": 1, "scratch_bytes": 0, "programs": ""}
    names = (*trees.OPTIMIZERS, "check")
    trees.common.write_rows(tmp_path / "trees.csv", [{"row": name} | line for name in names])
    printed = benchmark.main(trees, "--leaves", 1, "--shapes", 1)
    assert printed.count("1000.00") == 4


def test_inverses_are_inverses(benchmark):
    with jax.enable_x64(False):
        rows = benchmark("inverse").measure(24, 1)
    assert rows[0][3] == "1.00"
    assert max(float(row[4]) for row in rows[1:4]) <= 24 * 5 * eps_of("float32")  # as above


def test_three_tf32_passes_are_nearly_float32_and_three_bfloat16_passes_are_not(
    benchmark, monkeypatch
):
    # Only Grams are compared. The default solver would be compiled for each product.
    quick = functools.partial(prox24.solve, solver=prox24.Wanda(), refit=None)
    monkeypatch.setattr(prox24, "solve", quick)
    kinds = ("float32", "tf32x3", "bf16x3", "tf32x3, tensor cores")
    module = benchmark("products", LINEARS=("k_proj",), KINDS=kinds)
    given = ["--layer", 0, "--samples", 1, "--calibration", "calibration.txt"]
    lines = [line.split("│") for line in benchmark.main(module, *given).splitlines()]
    grams = {line[2].strip(): float(line[3]) for line in lines if line[1:2] == [" k_proj "]}
    assert tuple(grams) == kinds
    assert grams["tf32x3"] < 2 * grams["float32"] < grams["bf16x3"]
    assert grams["tf32x3"] < grams["tf32x3, tensor cores"]


def test_packed_products_are_compared_if_correct_and_what_was_scaled_is_said(benchmark, tmp_path):
    shapes = {"one": (64, 64), "other": (64, 96)}
    matmul = benchmark("matmul", SHAPES=shapes, NEGATED_BYTES=1 << 12, PEAK_WIDTH=16)
    printed = benchmark.main(matmul, "--batches", "1,3", "--repetitions", 1, "--seconds", 1e-9)
    assert "scaled by 0.5" in printed
    rows = table(tmp_path / "matmul.csv")
    assert {row["contender"] for row in rows} >= {"dense x W^T", "unpack"}
    cases = {(linear, batch) for linear in shapes for batch in ("1", "3")}
    assert {(row["linear"], row["batch"]) for row in rows} == cases
    assert max(float(row["error"]) for row in rows) < 96 * eps_of("float32")  # terms of a sum
    assert (tmp_path / "matmul.png").stat().st_size > 0


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
@pytest.mark.parametrize("name", ["layer_tpu", "matmul_tpu"])
def test_compiling_for_tpus_without_libtpu_is_one_line_that_says_what_to_install(name, benchmark):
    with pytest.raises(SystemExit, match=r"^libtpu.* is missing: pip install .jax\[tpu\].$"):
        benchmark(name).main()


def test_memory_of_plans_is_tabled(benchmark):
    tiny = {"tiny": benchmark("common").llama(64, 64, 1, 8, vocab_size=256)}
    plan = benchmark("plan", LLAMAS=tiny, MACHINES={"a machine": (1, 2, True)})
    printed = benchmark.main(plan, "--models", "tiny", "--samples", 2, "--sequence-length", 16)
    assert "a machine" in printed
    assert "yes" in printed


def test_memory_is_measured_in_a_process_of_its_own(benchmark):
    memory = benchmark("memory")
    assert "0.128" in benchmark.main(memory, "--layers", 1, "--samples", 1)


# Layers and models


def test_the_texts_of_a_clone_are_those_of_the_tables(benchmark):
    common = benchmark("common")
    parser = common.parser_of("")
    common.add_texts(parser)
    given = parser.parse_args([])
    said = (BENCHMARKS / "data/README.md").read_text()
    for text in (given.calibration, *given.texts):
        assert hashlib.sha256(gzip.decompress(text.read_bytes())).hexdigest() in said
    for row in table(ROOT / "docs/figures/model-main.csv"):
        assert row["calibration"] == common.name_of(given.calibration)
        assert [*row][-2:] == [common.name_of(text) for text in given.texts]


def test_windows_of_a_seed_do_not_overlap_and_fewer_are_a_subset_of_more(benchmark):
    drawn = benchmark("common").drawn_windows
    windows = np.arange(1000).reshape(100, 10)
    many, few, other = drawn(windows, 64, 0), drawn(windows, 8, 0), drawn(windows, 8, 1)
    assert len(np.unique(many)) == many.size == 640
    assert np.array_equal(many[:8], few)
    assert not np.array_equal(few, other)
    with pytest.raises(SystemExit, match="100 windows of 10 tokens, not 101"):
        drawn(windows, 101, 0)


def test_lines_of_a_table_keep_to_its_columns(benchmark, tmp_path):
    common, path = benchmark("common"), tmp_path / "table.csv"

    def runs(*names):
        return [({"run": name, "size": 1}, (name,)) for name in names]

    def measure(name):
        return {} if name == "b" else {"first": len(name)}

    titles = ["run", "size", "first", "second"]
    rows = common.completed(path, titles, runs("aa", "b"), measure)
    assert rows[0] == {"run": "aa", "size": "1", "first": "2", "second": ""}
    assert rows[1] == {"run": "b", "size": "1", "first": "", "second": ""}
    # A line that is there is not measured again.
    more = common.completed(path, titles[::-1], runs("aa", "b", "ccc"), lambda name: {"second": 9})
    assert more[:2] == rows
    assert more[2] == {"run": "ccc", "size": "1", "first": "", "second": "9"}
    with pytest.raises(
        SystemExit, match=r"table\.csv has run, size, first, second, not run, third"
    ):
        common.completed(path, ["run", "third"], [], measure)


@pytest.mark.parametrize("name", ["main", "growth"])
def test_the_model_benchmark_measures_pruned_models_and_goes_on(benchmark, tmp_path, name):
    model = benchmark("model", EVALUATION_LENGTH=32)
    for runs in (make() for make in model.TABLES.values()):
        assert len({(run.method, *run.varied.items()) for run in runs}) == len(runs)
    wanda = model.Run("wanda", prox24.Recipe.wanda(), {"growth": 1.1})
    runs = [wanda._replace(method="dense", recipe=None), wanda, model.growth_table()[0]]
    model = benchmark("model", TABLES={name: lambda: runs})
    options = name, *benchmark.given, "--windows", 4, "--length", 32, "--seeds", 0, 1
    printed = benchmark.main(model, *options)
    assert printed.count("±") == 3 * 3 - 1  # dense has no loss
    path = tmp_path / f"model-{name}.csv"
    before = path.read_text()
    assert benchmark.main(model, *options) == printed
    assert path.read_text() == before
    assert path.with_suffix(".png").stat().st_size > 5000


def test_layers_are_solved_by_every_contender_that_is_asked_for(benchmark, tmp_path):
    layers, baselines = benchmark("layers"), ["admm, Boza", "admm, ALPS"]
    options = "--layers", 0, "--calibration", "calibration.txt", "--samples", 2
    assert "sparsegpt" in benchmark.main(layers, *options, "--only", ";".join(baselines))
    rows, names = table(tmp_path / "layers.csv"), [layers.REFERENCE, *baselines, layers.DEFAULT]
    assert [row["contender"] for row in rows] == names * 7
    assert {row["status"] for row in rows} == {"sparse"}
    assert {name for curve in layers.CURVES.values() for name in curve} < set(layers.contenders())


def test_refined_models_are_made_once_and_evaluated_again(benchmark, tmp_path, monkeypatch):
    def alone(function, *arguments, **more):
        return function(*arguments, **more)

    benchmark("common", alone=alone)
    refine = benchmark("refine", LENGTH=64, WINDOWS=8)
    every = refine.runs()
    assert len({(run.name, run.distinct_tokens) for run in every}) == len(every)
    assert {run.base for run in every} == {"dense", *refine.BASES}
    blocks = "sparsegpt + refit + block, bfloat16, passes: 5"
    model = refine.Run("sparsegpt + model", "sparsegpt", 8, refine.ModelRefinement(), 1)
    monkeypatch.setattr(refine, "runs", lambda: [*every[:2], refine.Run(blocks, blocks), model])
    options = *benchmark.given, "--windows", 8, "--cache", tmp_path
    printed = benchmark.main(refine, *options)
    assert "0.00)" in printed  # of dense
    assert "(1.00)" in printed  # of SparseGPT
    assert "0% of what is evaluated of text is in calibration.txt" in printed
    for function in ("prune", "distill"):
        monkeypatch.setattr(prox24, function, None)
    assert benchmark.main(refine, *options) == printed
    assert benchmark.main(refine, *options, "--evaluation-windows", 1) != printed
    tokens = [int(row["tokens"]) for row in table(tmp_path / "refine.csv")]
    # Of 8 windows, and of 9 with the model's own, one is held out.
    assert tokens == 2 * [0, 0, 5 * 7 * 64, 8 * 64]


def test_the_gap_is_drawn_from_the_measured_lines(tmp_path):
    figure = tmp_path / "gap.svg"
    printed = run("benchmarks/gap.py", ROOT / "docs/figures/refine.csv", "--output", figure)
    assert printed in (ROOT / "docs/gallery/gap.md").read_text()
    assert figure.read_text().startswith("<?xml")


def test_windows_that_are_in_the_calibration_are_left_out(benchmark, tmp_path):
    refine, dense = benchmark("refine", LENGTH=64), tmp_path / "model"
    seen, other = ("so many words that " * 10)[:180], ("and others that it has not, " * 10)[:180]
    assert refine.share_seen(seen + other, f"before {seen}".replace(" ", "\n")) == 0.5
    calibration, path = tmp_path / "calibration.txt", tmp_path / "both.txt"
    path.write_text(calibration.read_text()[:64] + "And what it never read, is this text. " * 5)
    every, unseen = (
        refine.evaluated_windows(dense, path, 2, calibration, unseen) for unseen in (False, True)
    )
    np.testing.assert_array_equal(every[1], unseen[0])
    with pytest.raises(SystemExit, match="has 2 windows that are not in"):
        refine.evaluated_windows(dense, path, 3, calibration, True)


def test_generation_is_measured_for_each_form_of_the_weights(benchmark, tmp_path):
    generate = benchmark("generate", PROMPT=4)
    found = {form: generate.measure(form, tmp_path / "model", 4) for form in generate.FORMS}
    sizes = {form: size for form, (size, *_) in found.items()}
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert sizes["float32, packed"] < sizes["float32"]
    ceiling = sizes["float32"] / sizes["float32, packed"]
    assert generate.cells(found, "float32, packed")[-1] == f"{ceiling:.2f}"
    assert generate.cells(found, "float32")[-2:] == ("", "")


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
    patched = f"common.fetch_model = lambda cache: Path({str(tmp_path / 'model')!r})"
    code = f"import sys; from pathlib import Path; sys.path.insert(0, {str(BENCHMARKS)!r})"
    code = f"{code}; import common; {patched}; import {name}"
    fewer = "; devices.CASES = [(8, 4)]" if name == "devices" else ""
    code = f"{code}{fewer}; {name}.main()"
    assert printed in run("-c", code, *options)


FAKE_LLM_COMPRESSOR = {
    "datasets.py": "class Dataset:\n    from_dict = dict\n",
    "llmcompressor/__init__.py": """
import json, shutil
def oneshot(model, recipe, output_dir, **given):
    shutil.copytree(model, output_dir)
    with open("given.json", "w") as file:
        json.dump(given | {"recipe": recipe}, file)
""",
    "llmcompressor/modifiers/__init__.py": "",
    "llmcompressor/modifiers/pruning.py": "SparseGPTModifier = WandaPruningModifier = dict",
    "llmcompressor-0.14.dist-info/METADATA": "Name: llmcompressor\nVersion: 0.14\n",
}


def test_llm_compressor_prunes_the_windows_of_prox24_in_another_environment(
    benchmark, tmp_path, monkeypatch
):
    for name, text in FAKE_LLM_COMPRESSOR.items():
        (tmp_path / "fake" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fake" / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}:{ROOT}")
    module, common = benchmark("llm_compressor"), benchmark("common")
    sizes = ["--windows", 2, "--length", 32, "--rows", "dense", "llm-compressor sparsegpt"]
    given = [*benchmark.given, *sizes, "prox24 wanda"]
    benchmark.main(module, "--python", sys.executable, *given)
    dense, copied, pruned = table(tmp_path / "llm_compressor.csv")
    assert copied["version"] == "0.14"
    assert copied["text"] == dense["text"] != pruned["text"]
    assert float(copied["zeros"]) == 0 < float(pruned["zeros"]) < 0.5
    assert dense["seconds"] == "" != copied["seconds"]
    assert int(copied["peak_bytes"]) < int(pruned["peak_bytes"])
    told = json.loads((tmp_path / "given.json").read_text())
    assert told["recipe"]["mask_structure"] == "2:4"
    every = common.windows_of(tmp_path / "model", tmp_path / "calibration.txt", None, 32)
    windows = common.drawn_windows(every, 2, 0)
    np.testing.assert_array_equal(told["dataset"]["input_ids"], windows)


@pytest.mark.parametrize("python", [sys.executable, "no-python"])
def test_a_python_without_llm_compressor_is_one_line(benchmark, tmp_path, python):
    module = benchmark("llm_compressor")
    if importlib.util.find_spec("llmcompressor") is not None and python == sys.executable:
        pytest.skip("llm-compressor is installed")
    with pytest.raises(SystemExit, match=f"{python} runs no llm-compressor"):
        benchmark.main(module, *benchmark.given, "--python", python)
    assert not (tmp_path / "llm_compressor.csv").exists()


def test_an_answer_is_chosen_by_the_likelihood_of_its_text_alone(benchmark, tmp_path):
    choice = benchmark("multiple_choice", BATCH=4)
    model, rng = prox24.load(tmp_path / "model"), np.random.default_rng(0)
    texts = [rng.integers(1, 260, length).tolist() for length in (3, 17, 9, 2, 20)]
    for text, loss in zip(texts, choice.text_losses(model, texts), strict=True):
        alone = prox24.perplexity(tmp_path / "model", np.array([text])).perplexity
        # Sums of 32 terms in two layers of seven products.
        rel = 2 * 7 * 32 * eps_of("float32")
        assert loss / (len(text) - 1) == pytest.approx(np.log(alone), rel=rel)
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
    tokens = [model.tokenizer(text)["input_ids"] for text in question.texts]
    right = float(np.argmin(choice.text_losses(model, tokens)) == 1)
    assert choice.accuracies(tmp_path / "model", questions) == dict.fromkeys(questions, right)


def test_a_step_computes_no_product_of_the_head_again(benchmark, tmp_path, standard_promotion):
    cost = benchmark("step_cost")
    model = cost.forward.load_model(cost.open_checkpoint(tmp_path / "model"))
    counts = {
        name: cost.operations(program.trace(*given).jaxpr.jaxpr)
        for name, (program, *given) in cost.parts(model, 256).items()
    }
    # Forward: the logits of both models. The gradient adds one product of the size of each. The
    # sums over the vocabulary count too, but little.
    ratio = counts["head and loss, with gradient"] / counts["head and loss, forward"]
    assert 1.5 <= ratio < 1.6
    assert counts["both, with gradient"] == counts["step"] > counts["layers, forward"]


def test_the_basis_is_a_line_beside_the_same_method_without_it(benchmark, tmp_path):
    module = benchmark("basis")
    module.RECIPES["distilled"] = module.RECIPES["wanda"]  # whose programs are there
    module.DISTILLED_WINDOWS = 4
    given = [*benchmark.given, "--windows", 4, "--length", 32, "--rows", "wanda", "distilled"]
    given += ["--output", tmp_path / "new" / "folder"]
    printed = benchmark.main(module, *given)
    without, turned, *trained = table(tmp_path / "new" / "folder" / "basis.csv")
    assert (without["steps"], turned["steps"]) == ("0", "50")
    assert float(turned["values_loss"]) < float(without["values_loss"])
    assert f"{float(turned['text']):.2f}" in printed
    # The weights are trained after the losses of layers were measured.
    assert trained[1]["values_loss"] == turned["values_loss"]
    assert trained[1]["text"] != turned["text"]


def test_times_of_whole_models_are_sums_over_layers_windows_and_linears(benchmark, tmp_path):
    counts = {"layer": 1, "layer, dense too, and Grams": 2, "other": 1e6}
    shapes = ["(32, 64)", "(64, 64)", "(96, 64)", "(64, 96)"]
    counts |= {f"default, {shape}": 10**i for i, shape in enumerate(shapes)}
    counts |= {f"correction, {shape}": 3 for shape in shapes}
    rows = [f'chip,"tiny: {name}",{1e3 * seconds}' for name, seconds in counts.items()]
    (tmp_path / "counts.csv").write_text("\n".join(["chip,program,ms", *rows]))
    config = benchmark("common").llama(64, 96, 5, 16, head_dim=4)
    models = benchmark(
        "compiled_models", LLAMAS={"tiny": config, "none": config}, COUNTS=tmp_path / "counts.csv"
    )
    (line,) = (
        line for line in benchmark.main(models, "--windows", 4).splitlines() if "tiny" in line
    )
    # Two linears of each shape, and one of the last.
    times = [4 * 5 * (1 + 2), 5 * (2 + 20 + 200 + 1000), 5 * 7 * 3]
    assert re.findall(r"[\d,]+", line) == [f"{seconds:,}" for seconds in (*times, sum(times))]


@pytest.fixture
def compiled_cuda(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("compiled_cuda")


PROGRAM = """HloModule program

%body (pair: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %pair = (s32[], f32[8,8]) parameter(0)
  %step = s32[] get-tuple-element(%pair), index=0
  %x = f32[8,8] get-tuple-element(%pair), index=1
  %y = f32[8,8] custom-call(%x, %x), custom_call_target="__cublas$lt$matmul", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}
  ROOT %both = (s32[], f32[8,8]) tuple(%step, %y)
}

%condition (pair.1: (s32[], f32[8,8])) -> pred[] {
  %pair.1 = (s32[], f32[8,8]) parameter(0)
  ROOT %yes = pred[] fusion(%pair.1), kind=kLoop, calls=%compare
}

%compare (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]) parameter(0)
  ROOT %true = pred[] constant(true)
}

%slice (whole: f32[8,8]) -> f32[2,8] {
  %whole = f32[8,8] parameter(0)
  ROOT %part = f32[2,8] slice(%whole), slice={[0:2], [0:8]}
}

ENTRY %main (start: (s32[], f32[8,8])) -> f32[2,8] {
  %start = (s32[], f32[8,8]) parameter(0)
  %counted = (s32[], f32[8,8]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %ended = (s32[], f32[8,8]) while(%counted), condition=%condition, body=%body
  %last = f32[8,8] get-tuple-element(%ended), index=1
  ROOT %cut = f32[2,8] fusion(%last), kind=kLoop, calls=%slice
}
"""  # noqa: E501


def test_launches_bytes_and_products_of_a_program_are_counted(compiled_cuda):
    walk = compiled_cuda.Walk(PROGRAM, (3,))
    product, cut = walk.kernels[0], walk.kernels[-1]
    assert (product.operations, product.precision) == (2 * 8**3, "f32 HIGHEST")
    assert product.moved == 3 * 8 * 8 * 4
    said = '["DEFAULT","DEFAULT"],"algorithm":"ALG_DOT_TF32_TF32_F32"'
    one_pass = compiled_cuda.Walk(PROGRAM.replace('["HIGHEST","HIGHEST"]', said), (3,)).kernels[0]
    assert one_pass.precision == "f32 TF32"
    assert cut.moved == 2 * 2 * 8 * 4, "of a slice, what is sliced"
    # Five turns are known; three are given, after which the host looks at the condition again.
    assert [kernel.times for kernel in walk.kernels] == [5, 3, 4, 1]
    assert walk.looks == 4


PROGRAM_OF_TPU = """HloModule program

%body (pair: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %pair = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%pair), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%step, %one)
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%pair), index=1
  %y = f32[8,8]{1,0:T(8,128)S(1)} convolution(%x, %x), dim_labels=bf_io->bf, operand_precision={highest,highest}
  ROOT %both = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) tuple(%next, %y)
}

%condition (pair.1: (s32[], f32[8,8])) -> pred[] {
  %pair.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %step.1 = s32[]{:T(128)} get-tuple-element(%pair.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%step.1, %limit), direction=LT
}

%scores (q: f32[2,8,4], k: bf16[2,16,4]) -> f32[2,8,16] {
  %q = f32[2,8,4]{2,1,0:T(8,128)} parameter(0)
  %k = bf16[2,16,4]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %qk = f32[2,8,16]{2,1,0:T(8,128)} convolution(%q, %k), window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0oi->0bf, operand_precision={highest,highest}
}

ENTRY %main (whole: f32[8,8], q.1: f32[2,8,4], k.1: bf16[2,16,4], v: f32[2,16,4]) -> f32[2,8,4] {
  %whole = f32[8,8]{1,0:T(8,128)} parameter(0)
  %q.1 = f32[2,8,4]{2,1,0:T(8,128)} parameter(1)
  %k.1 = bf16[2,16,4]{2,1,0:T(8,128)(2,1)} parameter(2)
  %v = f32[2,16,4]{2,1,0:T(8,128)} parameter(3)
  %zero = s32[]{:T(128)} constant(0)
  %going = ((f32[8,8]{1,0:T(8,128)}), f32[4,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%whole), slice={[0:4], [0:8]}
  %here = f32[4,8]{1,0:T(8,128)S(1)} slice-done(%going)
  %start = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) tuple(%zero, %here)
  %loop = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) while(%start), condition=%condition, body=%body
  %fusion = f32[2,8,16]{2,1,0:T(8,128)} fusion(%q.1, %k.1), kind=kOutput, calls=%scores
  ROOT %online-softmax = f32[2,8,4]{2,1,0:T(8,128)} custom-call(%fusion, %v), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"BODY"}}
}
"""  # noqa: E501


def test_of_a_tpu_arrays_on_the_chip_and_scalars_do_not_count(compiled_cuda):
    body = base64.b64encode(b"tpu.matmul {precision = #tpu.contract_precision<fp32>}").decode()
    kernels = compiled_cuda.Walk(PROGRAM_OF_TPU.replace("BODY", body), ()).kernels
    slice_, product, scores, mixed = kernels
    assert slice_.moved == 4 * 8 * 4, "of the memory outside, what is sliced"
    assert (product.times, product.moved, product.operations) == (5, 0, 2 * 8**3)
    assert product.precision == mixed.precision == "f32 HIGHEST"
    assert scores.precision == "f32 x bf16 HIGHEST"
    assert scores.operations == mixed.operations == pytest.approx(2 * 2 * 8 * 16 * 4)
    fast = compiled_cuda.Walk(PROGRAM_OF_TPU.replace("BODY", ""), ()).kernels[-1]
    assert fast.precision == "f32 DEFAULT"


def test_growth_and_lost_precision_are_named(compiled_cuda):
    before = {"chip": "h100", "program": "prox", "launches": "10", "MB": "100", "precision": "f32"}
    assert not list(compiled_cuda.compare([before | {"launches": "11", "MB": "110"}], [before]))
    now = before | {"launches": "12", "MB": "111", "precision": "f32 DEFAULT"}
    worse = list(compiled_cuda.compare([now], [before]))
    assert worse[:2] == ["prox on h100: launches 10 -> 12", "prox on h100: MB 100 -> 111"]
    assert worse[2] == "prox on h100: products were f32, are f32 DEFAULT"


def test_without_its_compiler_one_line_says_what_to_install(compiled_cuda):
    with pytest.raises(SystemExit, match=r"run make .venv-cuda/test.stamp"):
        compiled_cuda.Chip("h100")
