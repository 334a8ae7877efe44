import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import ROOT, run
from reference import assert_close, least_loss_by_enumeration, solve_roundings
from smollm2 import write_first_layers
from tiny import tokens, write_tiny
from transformers import AutoModelForCausalLM

import prox24
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._cli.main import main

pytestmark = pytest.mark.slow


def run_with_figure(name, figure, *arguments):
    """What the example prints, after a check of the figure it writes."""
    output = run(f"examples/{name}", *arguments, "--output", figure)
    assert_figure(figure)
    return output


def assert_figure(path):
    assert path.read_text().startswith("<?xml")
    assert path.stat().st_size < 100_000


def rows(table):
    return [re.split(r" {2,}", line.strip()) for line in table.splitlines()]


def example(name):
    return runpy.run_path(str(ROOT / f"examples/{name}.py"))


def test_pruning_one_layer(tmp_path):
    output = run_with_figure("prune_a_layer.py", tmp_path / "losses.svg")
    lines = [line.split() for line in output.splitlines()]
    losses = {line[0]: float(line[-1]) for line in lines}
    assert sorted(losses, key=losses.get)[:2] == ["ADMM", "ProximalGradient"]


PAGES = "../README getting-started packed solvers refine optax whole-job accelerators"
SMALL = {  # in place of what a page has for a real model
    "HuggingFaceTB/SmolLM2-135M-Instruct": "DIR",
    "HuggingFaceTB/SmolLM2-135M": "DIR",
    "samples=64, sequence_length=512": "samples=8, sequence_length=32",
    'Text("b.txt")': 'Text("b.txt", sequence_length=32)',
    'perplexity("smol-2of4")': 'perplexity("smol-2of4", prox24.Text(None, 4, 32))',
}


@pytest.mark.parametrize("page", PAGES.split())
@pytest.mark.usefixtures("standard_promotion")
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    write_tiny(tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("It is a truth universally acknowledged, that a single man " * 300)
    text = (ROOT / f"docs/{page}.md").read_text()
    for real, small in SMALL.items():
        text = text.replace(real, small)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict = {"__name__": "__main__"}
    with jax.enable_x64(False):
        exec("\n".join(blocks), names)
    if page == "../README":
        printed = capsys.readouterr().out
        for said in ("mean relative loss", "perplexity", "loss 0.", "SPARSE 0.5"):
            assert said in printed
        assert Path("smol-trained/prox24.json").exists()
    if page == "refine":
        assert prox24.is_sparse(names["merged"]["first"], axis=0)
    if page == "getting-started":
        assert "\n2 of 2 leaves to prune are 2:4" in capsys.readouterr().out
        assert prox24.report(names["trained"]).sparse
    if page == "optax":
        printed = "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
        assert capsys.readouterr().out == printed


# The path of the prox


def test_path_of_the_prox_switches_where_known_and_jumps_only_near_ties(tmp_path):
    output = run_with_figure("prox_path.py", tmp_path / "path.svg")
    assert output in (ROOT / "docs/gallery/prox_path.md").read_text()
    switches = {
        (name, kept): (float(lam), float(jump)) for name, lam, kept, jump in rows(output)[1:]
    }
    assert len(switches) == 6
    # Three nonzeros end continuously at lam y1 y2 = y3 if y1 y2 is large enough against y3.
    # Four digits are printed.
    assert switches["distinct", "3 to 2"][0] == pytest.approx(0.75, abs=1e-4)
    assert switches["equal", "3 to 2"][0] == pytest.approx((1 + 2**0.5) / 2, abs=1e-4)
    for name in ("distinct", "nearly equal", "equal"):
        (first, jump), (second, other) = (switches[name, kept] for kept in ("4 to 3", "3 to 2"))
        assert 0 < first < second
        assert max(jump, other) <= 1e-3 if name == "distinct" else min(jump, other) >= 0.1


# Correlated features


def test_regret_on_correlated_features_is_least_for_prox(tmp_path):
    output = run_with_figure("correlated_regression.py", tmp_path / "regret.svg")
    _, header, *table = rows(output)
    assert header == ["features", "rho", "wanda", "SparseGPT", "prox", "prox, slower", "ADMM"]
    assert {row[0] for row in table} == {"equicorrelated", "Toeplitz"}
    for _, rho, *regrets in table:
        wanda, sparsegpt, *ours = regrets = [float(regret) for regret in regrets]
        assert min(regrets) >= 0
        if float(rho) == 0:
            assert max(regrets[:-1]) == 0
            assert ours[-1] <= 0.1
        else:
            assert max(ours) < min(wanda, sparsegpt)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.99])
def test_best_losses_of_the_example_are_those_of_a_direct_enumeration(rho):
    names = example("correlated_regression")
    weight = np.random.default_rng(1).normal(size=(5, names["WIDTH"]))
    for gram in names["GRAMS"].values():
        expected = [least_loss_by_enumeration(row, gram(rho)) for row in weight]
        assert_close(names["best_losses"](weight, gram(rho)), expected, solve_roundings(gram(rho)))


# Correlations in a model


def test_quantities_of_known_grams():
    diagnose = example("gram_diagnostics")["diagnose"]
    rho, width = 0.5, 4
    gram = np.pad((1 - rho) * np.eye(width) + rho, (0, 2))
    spectrum = np.array([1 + (width - 1) * rho] + [1 - rho] * (width - 1)) / width
    expected = {
        "condition": (1 + (width - 1) * rho) / (1 - rho),
        "effective rank": np.exp(-np.sum(spectrum * np.log(spectrum))),
        "off diagonal": (width - 1) * rho**2 / (1 + (width - 1) * rho**2),
        "coherence": rho,
        "dead": 2,
    }
    assert diagnose(gram) == pytest.approx(expected)
    assert diagnose(np.ones((3, 3), np.float32))["condition"] == np.inf
    assert diagnose(np.zeros((3, 3)))["dead"] == 3


def test_grams_of_a_model_are_printed_and_drawn(tmp_path, monkeypatch, capsys):
    write_tiny(tmp_path / "model")
    options = f"{tmp_path}/model --samples 4 --sequence-length 32 --output {tmp_path}/grams.svg"
    monkeypatch.setattr(sys, "argv", ["gram_diagnostics.py", *options.split()])
    with jax.enable_x64(False):
        example("gram_diagnostics")["main"]()
    assert_figure(tmp_path / "grams.svg")
    header, *table, summary = rows(capsys.readouterr().out)
    assert header[:3] == ["layer", "input", "condition"]
    inputs = {"attention_input", "attention_output", "mlp_input", "mlp_activation"}
    assert {(row[0], row[1]) for row in table} == {(i, name) for i in "01" for name in inputs}
    assert "off the diagonal on average" in summary[0]


# Digits


def test_digits_are_pruned_to_the_pattern_and_retraining_recovers_accuracy(tmp_path):
    header, *table, _ = rows(run_with_figure("digits.py", tmp_path / "digits.svg"))
    assert header == ["method", "accuracy", "spread", "zeros", "2:4"]
    pattern = {row[0]: row[4] for row in table}
    assert pattern == {"dense": "no", "one-shot": "yes", "fine-tuned": "yes", "prox": "yes"}
    pruned = [row for row in table if row[0] != "dense"]
    accuracy, zeros = ({row[0]: float(row[i].rstrip("%")) for row in pruned} for i in (1, 3))
    assert min(zeros.values()) >= 50
    assert min(accuracy.values()) == accuracy["one-shot"]


# Fine-tuning what was pruned


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory):
    """A tiny pruned model, and a text to learn."""
    folder = tmp_path_factory.mktemp("finetune")
    write_tiny(folder / "model", "llama1", "bfloat16")
    (folder / "text.txt").write_text("One sentence that is to be learned by heart. " * 60)
    text = prox24.Text(folder / "text.txt", samples=2, sequence_length=32)
    prox24.prune(folder / "model", folder / "pruned", prox24.Recipe.magnitude(), calibration=text)
    return folder


@pytest.mark.parametrize("options", [[], ["--lora", "4"]], ids=["kept", "lora"])
def test_fine_tuning_learns_the_text_and_keeps_the_pattern(
    pruned_folder, options, tmp_path, monkeypatch
):
    source, destination = pruned_folder / "pruned", tmp_path / "tuned"
    options = [*options, "--text", pruned_folder / "text.txt", "--sequence-length", "32"]
    options += ["--steps", "20", "--rate", "0.01", "--output", tmp_path / "losses.svg"]
    output = run("examples/finetune.py", source, destination, *options)
    assert_figure(tmp_path / "losses.svg")
    tokens, table = output.strip().split("\n\n")
    assert tokens == "2432 tokens to train on, 256 held out"
    _, before, after = rows(table)
    assert before[2:] == after[2:] == ["50.00%", "yes"]
    assert float(after[1]) < 0.5 * float(before[1])
    assert main(["verify", str(destination), "--quiet"]) == 0
    if "--lora" not in options:
        again = map(str, ["finetune.py", source, destination, *options])
        monkeypatch.setattr(sys, "argv", list(again))
        with pytest.raises(SystemExit) as refused:
            runpy.run_path(str(ROOT / "examples/finetune.py"), run_name="__main__")
        said = f"{destination} exists; pass overwrite=True, or --overwrite, to replace it"
        assert refused.value.code == f"error: {said}"
    given, tuned = open_checkpoint(source), open_checkpoint(destination)
    for name in given.tensors:
        assert np.array_equal(given.read(name) == 0, tuned.read(name) == 0)
        changed = np.any(given.read(name) != tuned.read(name))
        trained = "layers" in name and ("--lora" not in options or "norm" not in name)
        assert changed == trained, name


# Deployment in PyTorch


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A pruned folder. Its k_proj and v_proj have 16 outputs; up_proj of layer 1 is dense."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("deploy")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1}
    write_tiny(folder / "model", "llama1", "bfloat16", vocab_size=320, **sizes)
    recipe = dataclasses.replace(prox24.Recipe.magnitude(), skip="layers.1.mlp.up_proj")
    text = prox24.Text(samples=2, sequence_length=16)
    prox24.prune(folder / "model", folder / "pruned", recipe, calibration=text)
    return folder / "pruned"


def sparse_names():
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    found = [f"model.layers.{i}.{name}" for i in "01" for name in (*names, "mlp.down_proj")]
    return [name for name in found if name != "model.layers.1.mlp.up_proj"]


def test_linears_that_pytorch_multiplies_sparsely(deployed):
    model = AutoModelForCausalLM.from_pretrained(deployed, dtype="auto")
    model.lm_head.weight.data.zero_()  # 2:4 and of a size that is taken, but the head
    sparse_linears = example("deploy_torch")["sparse_linears"]
    assert list(sparse_linears(model)) == sparse_names()
    assert not sparse_linears(model.float())


def test_a_model_without_such_linears_is_refused(deployed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["deploy_torch.py", str(deployed.parent / "model")])
    with pytest.raises(SystemExit) as stopped:
        example("deploy_torch")["main"]()
    assert stopped.value.code == 2
    assert "model has no 2:4 linear in float16 or bfloat16" in capsys.readouterr().err


def test_without_a_gpu_the_linears_are_listed(deployed, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["deploy_torch.py", str(deployed)])
    example("deploy_torch")["main"]()
    *names, count, _ = capsys.readouterr().out.splitlines()
    assert names == sparse_names()
    assert count == "9 of 15 linears take semi-structured weights"


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_converted_linears_reach_the_sparse_product(deployed, monkeypatch):
    """PyTorch packs, unpacks and dispatches as on a GPU; only the product itself is dense."""
    torch = pytest.importorskip("torch")
    names, products = example("deploy_torch"), []

    def product(self, rows, *, bias=None, should_transpose_dense):
        products.append((self.shape, should_transpose_dense))
        return torch.nn.functional.linear(rows, self.to_dense(), bias)

    cutlass = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(cutlass, "_validate_device_dim_dtype_shape", lambda *_: None)
    monkeypatch.setattr(cutlass, "_mm", product)
    model = AutoModelForCausalLM.from_pretrained(deployed, dtype="auto")
    shapes = [(linear.weight.shape, True) for linear in names["sparse_linears"](model).values()]
    ids = torch.from_numpy(tokens())
    with torch.inference_mode():
        dense = model(ids).logits
        names["convert"](model)
        assert torch.equal(model(ids).logits, dense)
    assert products == shapes


def test_a_whole_job_with_a_real_model(tmp_path):
    model, folder = write_first_layers(tmp_path / "model"), tmp_path / "out"
    sizes = ("--samples", "2", "--sequence-length", "64")
    # Programs as users have them: the products of a real vocabulary take longer than compilation.
    usual = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    printed = run("examples/whole_job.py", model, folder, *sizes, **usual)
    page = (ROOT / "docs/whole-job.md").read_text()
    block = re.search(r"^```console\n(\$ prox24 plan.*?)```", page, re.DOTALL | re.MULTILINE)[1]
    block = re.sub(r" \\\n +", " ", block)
    for shown, given in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)),
        ("--samples 16 --sequence-length 512", " ".join(sizes)),
        ("job/", f"{folder}/"),
    ):
        block = block.replace(shown, given)
    commands = [line for line in printed.splitlines() if line.startswith("$")]
    assert block.splitlines() == list(dict.fromkeys(commands))  # one of them runs twice

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((folder / "report.json").read_text())
    assert 0 < report["resumed_linears"] < len(metrics) == len(report["linears"])
    assert all(name in report["calibration"]["text"] for name in ("a.jsonl", "b.csv", "c.txt"))
    layers = [re.search(r"layers\.\d+", each["name"])[0] for each in report["linears"]]
    logged = (folder / "log.txt").read_text().splitlines()
    assert [re.search(r"layers\.\d+", line)[0] for line in logged] == list(dict.fromkeys(layers))

    header, *table = rows("\n".join(printed.splitlines()[-4:]))
    assert header == ["novel", "speeches", "next sentence"]
    assert [row[0] for row in table] == ["dense", "sparsegpt", "default"]
    assert all(float(perplexity) > 1 for row in table for perplexity in row[1:3])
    AutoModelForCausalLM.from_pretrained(folder / "default", local_files_only=True)
    assert printed.count("It is a truth") == 4  # the command and three continuations
