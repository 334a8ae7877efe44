import argparse
import dataclasses
import hashlib
import json
import os
import re
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import ANY

import jax
import numpy as np
import programs
import pytest
from commands import (
    TEXT,
    calibrated,
    contents,
    error_line,
    files,
    printed_json,
    run,
    write_workspace,
)
from tiers import slow
from tiny import (
    Q_PROJ,
    assert_same,
    config_dict,
    load_folder,
    random_weights,
    write_folder,
    write_tiny,
)

import prox24
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._cli import eval as eval_command
from prox24._cli.main import parser
from prox24._cli.options import recipe_of, text_of
from prox24._cli.options import size as parse_size
from prox24._jobs.output import table
from prox24._jobs.text import calibration_windows


@pytest.fixture
def workspace(tmp_path):
    return write_workspace(tmp_path, dtype="bfloat16")


def prune(workspace, *choices, destination="out"):
    places = [workspace / "model", workspace / destination]
    return run("prune", *places, *calibrated(workspace), *choices)


def test_prune_verify_and_eval(workspace, capsys):
    source, out, report = workspace / "model", workspace / "out", workspace / "report.json"
    logs = ["--log-file", workspace / "log.txt", "--metrics", workspace / "metrics.jsonl"]
    options = [*calibrated(workspace), *logs, "--report", report, "--json"]
    assert run("prune", source, out, *options) == 0
    pruned = capsys.readouterr()
    lines = (workspace / "log.txt").read_text()
    assert pruned.err == lines  # no terminal: a line for each layer
    assert re.findall(r"prune (./.) layers\.(.), loss 0\.\d+", lines) == [
        ("1/2", "0"),
        ("2/2", "1"),
    ]
    metrics = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text().splitlines()]
    assert [each.pop("event") for each in metrics] == ["linear"] * 14
    printed = json.loads(pruned.out)
    assert printed == json.loads(report.read_text())
    recipe = printed["recipe"]
    assert recipe == prox24.Recipe().to_dict()
    assert recipe["solver"]["name"] == "ADMM"
    assert recipe["solver"]["rho"] == {"name": "Exponential", "first": 0.55, "growth": ANY}
    assert recipe["pattern"] == "2:4"
    assert recipe["refit"] == {"name": "ConjugateGradients", "steps": 20, "tolerance": 3e-3}
    assert recipe["targets"] == {"name": "DenseTargets", "pull": 1}
    size = {"windows": 8, "sequence_length": 32, "tokens": 8 * 32, "sha256": ANY}
    assert printed["calibration"] == {"text": str(workspace / "text.txt"), **size}
    manifest = json.loads((out / "prox24.json").read_text())
    assert manifest["calibration"] == {"text": "text.txt", **size}
    assert printed["versions"].keys() > {"python", "jax", "prox24"}
    assert printed["peak_memory_bytes"] > 1e8
    assert [{k: v for k, v in each.items() if k != "time"} for each in metrics] == printed[
        "linears"
    ]
    assert len(printed["linears"]) == 14
    sizes = {name: values.size for name, values in load_folder(source).items()}
    for linear in printed["linears"]:
        assert (linear["status"], linear["sparsity"]) == ("sparse", 0.5)
        assert linear["parameters"] == sizes[linear["name"]]
        assert 0 < linear["relative_loss"] < 1
        assert linear["steps"] > 10
        assert linear["seconds"] > 0
    losses = [linear["relative_loss"] for linear in printed["linears"]]
    parameters = sum(linear["parameters"] for linear in printed["linears"])
    assert printed["totals"] == {
        "linears": 14,
        "parameters": parameters,
        "zeros": parameters / 2,
        "mean_relative_loss": pytest.approx(np.mean(losses)),
        "largest_relative_loss": max(losses),
    }
    assert list(printed["stages"]) == ["check", "gather", "basis", "solve", "write", "run"]
    assert min(printed["stages"].values()) > 0
    assert sum(printed["stages"].values()) == pytest.approx(printed["seconds"])
    # The solver's are a part of them.
    assert (
        sum(linear["seconds"] for linear in printed["linears"]) < 1.1 * printed["stages"]["solve"]
    )
    counts = json.loads(programs.run("-m", "prox24", "verify", out, "--json"))
    assert (counts["linears"], counts["sparsity"], counts["violations"]) == (14, 0.5, {})
    text = ["--text", workspace / "text.txt", "--sequence-length", "64"]
    result = printed_json(capsys, "eval", out, *text)
    assert result["context_length"] == 64
    assert result["windows"] == len(TEXT) // 64
    assert result["predicted_tokens"] == result["windows"] * 63
    assert 1 < result["perplexity"] < 1e6
    (workspace / "records.jsonl").write_text(json.dumps({"body": TEXT}))
    more = [*text, "--text", workspace / "records.jsonl", "--text-field", "body"]
    rows = printed_json(capsys, "eval", out, *more)["rows"]
    assert rows[0]["perplexity"] == rows[1]["perplexity"]
    models = [workspace / "model", out]
    several = printed_json(capsys, "eval", *models, *text, *text[:2])["rows"]
    assert several[2:] == [result, result]
    assert several[0] == several[1] != result
    os.mkfifo(workspace / "pipe")  # which can be read once
    piped = ["--text", workspace / "pipe"]
    with ThreadPoolExecutor() as pool:
        pool.submit((workspace / "pipe").write_text, TEXT)
        first, _ = printed_json(capsys, "eval", out, *piped, *text)["rows"]
    assert first["perplexity"] == result["perplexity"]
    assert "pipe can be read once" in error_line(capsys, "eval", *models, *piped)
    assert run("eval", *models, *text) == 0
    table = capsys.readouterr().out
    assert all(f"{row['perplexity']:.3f}" in table for row in several)
    prompts = ["--prompt", "Once", "--prompt", "Two", "--tokens", "3"]
    rows = printed_json(capsys, "generate", *models, *prompts)["rows"]
    # The continuations of a prompt stand together.
    assert [(row["prompt"], row["model"]) for row in rows] == [
        (prompt, str(model)) for prompt in ("Once", "Two") for model in models
    ]
    assert run("generate", *models, *prompts) == 0
    shown = [f"--- {row['model']}\n{row['prompt']}{row['text']}\n" for row in rows]
    assert capsys.readouterr().out == "".join(shown)


def test_python_options_and_recipe_files_write_the_same_bytes(workspace, capsys):
    recipe = dataclasses.replace(prox24.Recipe.wanda(), pattern=(4, 8), only="self_attn")
    text = prox24.Text(workspace / "text.txt", samples=8, sequence_length=32)
    report = prox24.prune(workspace / "model", workspace / "python", recipe, calibration=text)
    expected = contents(workspace / "python")
    given = ["--method", "wanda", "--pattern", "4:8", "--only", "self_attn", "--json"]
    assert prune(workspace, *given) == 0
    printed = json.loads(capsys.readouterr().out)
    assert contents(workspace / "out") == expected
    names = {linear["name"] for linear in printed["linears"]}
    assert names == {linear.name for linear in report.linears}
    assert printed.keys() == report.to_dict().keys()
    recipe.save(workspace / "recipe.json")
    # As people write it: for YAML 1.1, 4:8 would be a number and 1e-2 would be text.
    written = (
        "recipe: 1\nsolver: {name: Wanda}\nrefit:\npattern: 4:8\ndamping: 1e-2\n"
        "targets: null\nbasis: null\n"
    )
    (workspace / "recipe.yaml").write_text(written)
    for file, more in (("recipe.json", []), ("recipe.yaml", ["--only", "self_attn"])):
        assert prune(workspace, "--recipe", workspace / file, *more, destination=file + "-out") == 0
        assert contents(workspace / f"{file}-out") == expected
    card = (workspace / "out" / "README.md").read_text()
    (written,) = card.split("```json\n")[1:]
    assert prox24.Recipe.from_json(written.split("```")[0]) == recipe
    assert "were pruned by prox24 0." in card
    totals = report.totals
    for key, label in (("linears", "linears"), ("parameters", "their weights")):
        assert f"\n| {label} | {totals[key]} |\n" in card
    for kind in ("mean", "largest"):
        assert f"\n| {kind} relative loss | {totals[f'{kind}_relative_loss']:.4f} |\n" in card
    assert "\ntags:\n- prox24\n- sparse\n- '4:8'\n" in card
    assert "Calibration: 8 windows of 32 tokens from text.txt.\n" in card


DEFAULT, WANDA = prox24.Recipe(), prox24.Recipe.wanda()
TUNED = dataclasses.replace(prox24.Recipe.best(), damping=0.5)
DENSE, REFINEMENT = prox24.DenseTargets, prox24.BlockRefinement
OPTIONS = [
    ("", DEFAULT, {}),
    ("--method paper", prox24.Recipe.paper(), {}),
    ("--method prox --targets pruned", prox24.Recipe.proximal(), {"targets": None}),
    ("--method wanda --targets dense", WANDA, {"targets": DENSE()}),
    ("--method wanda --targets dense --pull 3", WANDA, {"targets": DENSE(3.0)}),
    ("--pull 3", DEFAULT, {"targets": DENSE(3.0)}),
    ("--refit gradient", DEFAULT, {"refit": prox24.GradientSteps()}),
    ("--refit none", DEFAULT, {"refit": None}),
    ("--skip q_proj --keep-dense 0.1", DEFAULT, {"skip": "q_proj", "keep_dense": 0.1}),
    ("--keep-dense 3 --dtype float16", DEFAULT, {"keep_dense": 3, "dtype": "float16"}),
    ("--products tf32x3", DEFAULT, {"products": "tf32x3"}),
    ("--refine block", DEFAULT, {"refine": REFINEMENT()}),
    (
        "--refine-rate 0.5 --refine-linears-only --method best",
        DEFAULT,
        {"refine": REFINEMENT(rate=0.5, linears_only=True)},
    ),
    ("--recipe tuned.json", TUNED, {}),
    ("--recipe tuned.json --damping 1 --refine none", TUNED, {"damping": 1.0, "refine": None}),
]


@pytest.mark.parametrize(("choices", "recipe", "changes"), OPTIONS)
def test_options_change_parts_of_a_recipe(tmp_path, monkeypatch, choices, recipe, changes):
    monkeypatch.chdir(tmp_path)
    TUNED.save(Path("tuned.json"))
    given = ["inspect", "model", *choices.split()]
    assert recipe_of(parser(given).parse_args(given)) == dataclasses.replace(recipe, **changes)


@pytest.mark.parametrize(
    ("choices", "passes"),
    [
        ("", 5),
        ("--samples 64 --sequence-length 128", 20),
        ("--calibration generate:128", 2),
        ("--calibration a.txt --calibration generate:256", 1),
        ("--calibration ids.npy", 2),
        ("--calibration ids.npy --samples 64", 5),
        ("--calibration flat.npy", 18_204),  # The command refuses its shape later.
    ],
)
def test_best_takes_fewer_passes_over_more_tokens(tmp_path, monkeypatch, choices, passes):
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.zeros((128, 512), np.int32))
    np.save("flat.npy", np.zeros(9, np.int32))
    given = ["prune", "model", "out", "--method", "best", *choices.split()]
    assert recipe_of(parser(given).parse_args(given)).refine.passes == passes


@pytest.mark.parametrize(
    ("choices", "pattern", "linears"),
    [
        (r"wanda --skip layers\.0\. --keep-dense 1", "2:4", 6),
        slow("wanda --pattern 4:8 --shard-size 20KB", "4:8", 14),
        slow("sparsegpt --pattern 50%", "50%", 14),
        slow("wanda --pattern 2:4x2", "2:4x2", 14),
    ],
)
def test_verify_takes_the_recipe_of_the_manifest(workspace, capsys, choices, pattern, linears):
    options = ["--method", *choices.split(), "--report", workspace / "report.json"]
    assert prune(workspace, *options) == 0
    effect = json.loads((workspace / "report.json").read_text())["kept_dense_effect"]
    rows = [row for row in capsys.readouterr().out.splitlines() if "their effect" in row]
    assert len(rows) == bool(effect) == ("--keep-dense" in choices)
    for row in rows:
        assert effect["mean_loss_all_pruned"] > effect["mean_loss"] > 0
        assert all(f"{value:.4f}" in row for name, value in effect.items() if "loss" in name)
        assert f"{effect['share_of_weights']:.1%} of the weights" in row
    verify = ["verify", workspace / "out"]
    verified = printed_json(capsys, *verify, "--source", workspace / "model")
    assert (verified["pattern"], verified["linears"]) == (pattern, linears)
    # Of a row of 32 or 48 weights, half are kept.
    assert verified["sparsity"] == 0.5
    sharded = (workspace / "out" / "model.safetensors.index.json").exists()
    assert sharded == ("--shard-size" in choices)
    # One that is given holds for every linear.
    assert run(*verify, "--pattern", "2:4", "--quiet") == 1


@pytest.mark.parametrize(
    ("variant", "line"), [("qwen2", "2 layers"), slow("olmoe", "0 layers: a linear")]
)
def test_heads_that_were_turned_are_a_line_and_verify_knows_their_biases(
    tmp_path, capsys, variant, line
):
    write_workspace(tmp_path, variant)
    assert prune(tmp_path, "--method", "wanda", "--basis", "heads", "--basis-steps", "5") == 0
    (row,) = [row for row in capsys.readouterr().out.splitlines() if "learnt bases" in row]
    assert line in row
    verified = printed_json(capsys, "verify", tmp_path / "out", "--source", tmp_path / "model")
    biases = [f"model.layers.{i}.self_attn.v_proj.bias" for i in range(2)]
    assert verified["refined"] == (biases if variant == "qwen2" else [])


@pytest.mark.slow  # five whole runs
def test_the_demo_compares_the_methods_and_leaves_the_models(workspace, monkeypatch, capsys):
    monkeypatch.setattr("prox24._cli.demo_model.fetch_model", lambda cache: workspace / "model")
    command = ["demo", "--cache", workspace / "cache", "--output", workspace / "models"]
    command += ["--full", "--text", workspace / "text.txt", *calibrated(workspace, 4)]
    dense, *rows = printed_json(capsys, *command, "--evaluation-samples", "4")["rows"]
    assert dense["method"] == "dense"
    methods = ["magnitude", "wanda", "sparsegpt", "default, heads not turned", "default"]
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert 0 < row["mean_relative_loss"] < 1
        assert run("verify", row["folder"], "--quiet") == 0
    shown = (workspace / "models" / "report.html").read_text()
    assert all(f"{row['perplexity']:.2f}" in shown for row in rows)


def test_a_name_that_is_no_unicode_is_one_line(workspace, capfd):
    name = os.fsdecode(os.fsencode(workspace) + b"/t\xe9xt.txt")
    try:
        Path(name).write_text(TEXT)
    except OSError:
        pytest.skip("the file system has no such names")
    command = ["prune", workspace / "model", workspace / "out", *calibrated(workspace)]
    said = error_line(capfd, *command, "--calibration", name)
    assert said.startswith("prox24: error: text that is no Unicode: ")


def test_verify_exits_1_and_names_the_tensor(workspace, capsys):
    assert run("verify", workspace / "model") == 1
    assert f"{Q_PROJ}: 256 blocks" in capsys.readouterr().out
    assert run("verify", workspace / "model", "--quiet") == 1
    assert capsys.readouterr().out.count("256 blocks") == 8  # a line for each problem, no table


def test_every_command_prints_for_people_or_is_quiet(workspace, capfd):
    file = workspace / "text.txt"
    windows = calibration_windows(open_checkpoint(workspace / "model"), prox24.Text(file, 8, 32))
    sha256 = hashlib.sha256(windows.tobytes()).hexdigest()[:16]
    rows = ["mean relative loss", str(file), "256, 8 windows of 32", sha256, "peak memory"]
    rows.append("no runtime skips them")
    wanda = ["--method", "wanda", "--overwrite"]
    text = ["--text", file, "--sequence-length", "32"]
    for command, said in (
        (lambda *quiet: prune(workspace, *wanda, *quiet), rows),
        (lambda *quiet: run("verify", workspace / "out", *quiet), ["50.00%"]),
        (lambda *quiet: run("eval", workspace / "out", *text, *quiet), ["plexity"]),
    ):
        assert command() == 0
        printed = capfd.readouterr().out
        assert all(row in printed for row in said)
        assert command("--quiet") == 0
        assert capfd.readouterr() == ("", "")


def test_the_model_may_write_the_text_to_calibrate_on():
    given = ["prune", "model", "out", "--calibration", "generate:2", "--seed", "3"]
    arguments = parser(given).parse_args(given)
    text = text_of(arguments, arguments.calibration)
    assert text == prox24.Text(["generate:2"], seed=3)


def test_to_flax_and_back_and_what_was_left_out(tmp_path, capsys):
    weights = random_weights(config_dict())
    write_folder(tmp_path / "source", config_dict(), weights | {"model.position_ids": np.arange(4)})
    convert = ["convert", tmp_path / "source", tmp_path / "flax", "--format", "flax"]
    assert printed_json(capsys, *convert) == {
        "source": str(tmp_path / "source"),
        "destination": str(tmp_path / "flax"),
        "format": "flax",
        "tensors": len(weights),
        "left_out": ["model.position_ids"],
        "remark": "zeros are stored like other weights: no runtime skips them by itself",
    }
    assert run(*convert, "--overwrite") == 0
    printed = capsys.readouterr().out
    for said in ("flax", "buffers left out", "no runtime skips them"):
        assert said in printed
    assert run("convert", tmp_path / "flax", tmp_path / "back", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert files(tmp_path / "back") == files(tmp_path / "source")
    assert_same(load_folder(tmp_path / "back"), weights)


def test_dtype_and_shard_size(tmp_path):
    weights = write_tiny(tmp_path / "source")
    options = ["--dtype", "bfloat16", "--shard-size", "20KB", "--quiet"]
    assert run("convert", tmp_path / "source", tmp_path / "out", *options) == 0
    read = load_folder(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert read.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(read[name], values.astype(read[name].dtype))
        assert read[name].dtype.name == "bfloat16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config


def test_sizes():
    assert (parse_size("500 MB"), parse_size("1.5MiB")) == (5 * 10**8, 3 * 2**19)
    for text in ("5", "0GB", "-1GB", "5TB", "9" * 400 + "GB"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
            parse_size(text)


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """A model and a text, and what commands refuse."""
    folder = write_workspace(tmp_path_factory.mktemp("refused"), dtype="bfloat16")
    for name, text in {
        "existing/precious": "x",
        "unnamed.unfinished/precious": "x",
        "filed.unfinished": "x",
        "all/text.txt": TEXT,
        "texts/a.txt": TEXT,
        "links/a.txt": TEXT,
        "recipe.yaml": "a: [",
        "mamba/config.json": '{"model_type": "mamba"}',
        "broken.jsonl": '{"text": "a"}\n\n{"text": ',
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "linked.txt").symlink_to("all/text.txt")
    (folder / "linked").symlink_to("all/model")
    (folder / "links" / "linked").symlink_to(folder / "all")
    (folder / "in.unfinished").mkdir()
    for name in ("all/model", "at.unfinished", "in.unfinished/model", "mute"):
        write_tiny(folder / name)
    write_tiny(folder / "qwen", "qwen2")
    for file in (folder / "mute").glob("tokenizer*"):
        file.unlink()
    return folder


DATA = "--calibration text.txt --sequence-length 32 --samples 8"
PRUNE = f"prune model out {DATA}"
WHOLE_GRAM = "needs the whole Gram on every device"
REFUSED = [
    ("prune nowhere out", "nowhere"),
    ("prune model existing", "exists; pass overwrite=True, or --overwrite, to replace it"),
    ("prune model a/out", "does not exist"),
    ("plan model --pattern 2:5 --method wanda", f"{Q_PROJ} has input width 32, not divisible by 5"),
    (f"{PRUNE} --method wanda --pull 2", "--pull is for --targets dense"),
    (f"{PRUNE} --refine-rate 0.1", "--refine-rate is for --refine block"),
    ("plan model", "windows of 512 tokens are longer than the model's 128 positions"),
    ("plan model --only nothing", "only 'nothing' is found in none of the 14 linears"),
    ("inspect model --only nothing", "only 'nothing' is found in none of the 14 linears"),
    (f"{PRUNE} --refine none --refine-linears-only", "linears-only is for --refine block"),
    ("prune model out --process-id 0", "--process-id are for --distributed"),
    (f"{PRUNE} --recipe recipe.yaml", "recipe.yaml: the recipe is not YAML: "),
    # Texts
    ("eval model --text none.txt --sequence-length 64", "none.txt"),
    ("eval mute --sequence-length 64", "tokenizer"),
    ("generate model --prompt ''", "the prompt is empty"),
    ("eval model nowhere --sequence-length 64 --samples 1", "nowhere"),
    ("eval model --text text.txt --text broken.jsonl --sequence-length 64", "broken.jsonl"),
    ("generate model mamba --prompt Once", "'mamba' is not supported"),
    (f"prune model texts/out {DATA} --calibration texts", "texts/out is in texts, which is read"),
    (f"prune model all/out {DATA} --calibration links", "all/out is in links, which is read"),
    (f"{PRUNE} --calibration texts --metrics texts/m.jsonl", "is or is in texts, which is read"),
    # Places of results
    (f"{PRUNE} --log-file .", "is a folder"),
    ("prune model out --report a/report.json", "report.json"),
    (f"{PRUNE} --push-to-hub name", "'name' is no name for a model of the hub: write OWNER/NAME"),
    (f"{PRUNE} --push-to-hub a/b/c", "'a/b/c' is no name for a model of the hub: Repo id must"),
    (f"{PRUNE} --push-to-hub owner/name", "cannot be uploaded: HF_HUB_OFFLINE is set"),
    (f"{PRUNE} --metrics text.txt", "text.txt is or is in text.txt, which is read"),
    (f"{PRUNE} --report model/new.json", "is or is in model, which is read"),
    ("verify model --report model/config.json", "is or is in model, which is read"),
    (f"{PRUNE} --metrics a --report ./a", "a is named for two outputs"),
    ("distill model existing out --state texts --metrics texts/m", "is or is in texts, which is"),
    (f"{PRUNE} --log-file out", "out is or holds"),
    (f"{PRUNE} --log-file out.unfinished", "is made, is or holds"),
    ("convert model linked --overwrite", "linked is a link to all/model: give the folder itself"),
    ("convert model texts --overwrite", "texts holds files, but no config.json of a model"),
    ("convert model text.txt --overwrite", "text.txt is a file; choose a folder"),
    ("convert model / --overwrite", "/ has no name of its own"),
    ("convert model .. --overwrite", ".. has no name of its own"),
    ("convert model /proc --overwrite", "/proc is a mount point"),
    (f"prune model /proc/out {DATA}", "cannot write /proc/out"),
    (f"prune model dangling {DATA}", "dangling is a link to nowhere: give the folder itself"),
    (f"prune model filed {DATA}", "filed would be made, is a file"),
    (f"prune model unnamed {DATA}", "unnamed would be made, holds precious"),
    ("convert all/model all --overwrite", "all is or holds all/model; choose another"),
    ("convert all/model all/model --overwrite", "is or holds all/model; choose another"),
    (f"prune linked all --overwrite {DATA}", "all is or holds linked"),
    (f"prune model all --overwrite {DATA} --calibration linked.txt", "all is or holds linked.txt"),
    (f"prune at.unfinished at {DATA}", "at is made, is or holds at.unfinished; choose another"),
    (f"prune in.unfinished/model in {DATA}", "in is made, is or holds in.unfinished/model; choose"),
    # Formats
    ("convert qwen out --format flax", "no Flax class"),
    # Devices
    *(
        (f"{command} --shard-grams --method {method}", said)
        for command in (PRUNE, "plan model --sequence-length 32")
        for method, said in {
            "wanda": "shard_grams is for several devices",
            "sparsegpt": f"{WHOLE_GRAM}; magnitude, wanda, admm would share its columns",
            "admm --refit exact": f"{WHOLE_GRAM}; cg would share its columns",
        }.items()
    ),
]


@pytest.mark.parametrize(("command", "said"), REFUSED, ids=[command for command, _ in REFUSED])
def test_what_is_refused_is_one_line_and_changes_nothing(
    refused, monkeypatch, capsys, command, said
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(refused)
    before = {path: path.lstat().st_mtime_ns for path in refused.rglob("*")}
    assert said in error_line(capsys, *shlex.split(command), "--quiet")
    assert {path: path.lstat().st_mtime_ns for path in refused.rglob("*")} == before


@pytest.fixture
def online(workspace, monkeypatch):
    """What the hub is asked for, and by which error it answers."""
    calls, errors = [], []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append((name, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id, folder_path):
            calls.append((repo_id, folder_path))
            for error in errors:
                raise error

    monkeypatch.setattr("prox24._checkpoints.hub.HfApi", Api)
    monkeypatch.setattr("prox24._checkpoints.hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return calls, errors


PUSH = ["--push-to-hub", "owner/name", "--method", "wanda"]


@pytest.mark.parametrize("choices", [[], ["--json"], ["--quiet"]])
def test_a_complete_folder_is_uploaded(workspace, online, capsys, choices):
    assert prune(workspace, *PUSH, *choices) == 0
    assert online[0] == [("owner/name", True), ("owner/name", workspace / "out")]
    said = capsys.readouterr().out
    assert said.endswith("\nuploaded to https://hub/owner/name\n") == (not choices)
    if choices == ["--json"]:
        assert json.loads(said)["destination"] == str(workspace / "out")


def test_a_failed_upload_says_how_to_go_on(workspace, online, capsys):
    online[1].append(OSError("the hub is down\nmore"))
    assert prune(workspace, *PUSH, "--quiet") == 2
    out = workspace / "out"
    assert capsys.readouterr().err == (
        f"prox24: error: {out} is complete, but was not uploaded: the hub is down; "
        f"to try again: hf upload owner/name {out} .\n"
    )
    assert run("verify", out, "--quiet") == 0


def test_a_token_is_needed_before_anything_is_done(workspace, online, monkeypatch, capsys):
    monkeypatch.setattr("prox24._checkpoints.hub.get_token", lambda: None)
    assert prune(workspace, *PUSH) == 2
    assert "without a token: run hf auth login, or set HF_TOKEN" in capsys.readouterr().err
    assert files(workspace) == ["model", "text.txt"]
    assert online[0] == []


OOM = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OOM, "a device fails: RE"),
        (RuntimeError("Unable to initialize backend 'cuda': no driver\nmore"), "'cuda': no driver"),
        (MemoryError("cannot allocate 8 GB"), "out of memory: cannot allocate 8 GB"),
        (PermissionError(13, "Permission denied", "/root/model"), "denied: '/root/model'"),
    ],
)
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, error, said):
    def fail(arguments):
        raise error

    monkeypatch.setattr(eval_command, "run", fail)
    assert said in error_line(capsys, "eval", "model")


def test_a_path_is_printed_as_it_is(capsys):
    names = ["llama[wanda]", "out[/b]", "x:smile:"]
    print(table(["written", names[0]], [["a", names[1]], ["b", names[2]]]))
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


@pytest.mark.parametrize(("form", "buffering"), [([], 1), (["--json"], -1)])
def test_a_reader_that_has_ended_is_no_error(workspace, monkeypatch, capfd, form, buffering):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering) as ended:  # which writes when it closes, as Python's does
        monkeypatch.setattr(sys, "stdout", ended)
        assert run("inspect", workspace / "model", *form) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_the_shell_has_closed_is_no_error(workspace, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    assert run("inspect", workspace / "model") == 0
    getattr(sys, name).close()


BAD_VALUES = {
    "prune model out": """--pattern 2to4, --samples 0, --samples 9223372036854775808,
        --sequence-length 1, --damping -1, --damping inf, --damping much, --refine-rate 0,
        --refine-held-out 1.5, --keep-dense -1, --method none, --dtype int8, --report a.pdf""",
    "generate model --prompt Once": "--tokens 0, --temperature -1, --top-p 0, --top-p 1.5",
}


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, one) for command, options in BAD_VALUES.items() for one in options.split(",")],
)
def test_bad_values_of_options_exit_2(capsys, command, option):
    with pytest.raises(SystemExit, match="2"):
        run(*command.split(), *option.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prox24: error: argument {option.split()[0]}: ")
    assert line.endswith(f"; see prox24 {command.split()[0]} --help")


def test_a_method_and_a_recipe_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        run("prune", "model", "out", "--method", "wanda", "--recipe", "recipe.json")
    assert "--recipe: not allowed with argument --method" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out == f"prox24 {prox24.__version__}\n"
