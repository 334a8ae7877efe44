import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import jax
import numpy as np
import pytest
from prox24.cli.output import print_table
from tiny import config_dict, random_weights, write_folder, write_tiny

from prox24.cli import evaluate
from prox24.cli.main import main

TEXT = "Calibration text for a model that reads bytes. " * 60


@pytest.fixture
def workspace(tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def options(workspace, samples=8):
    length = ["--sequence-length", "32", "--samples", str(samples)]
    return ["--calibration", str(workspace / "text.txt"), *length]


def run_process(*arguments):
    command = [sys.executable, "-m", "prox24", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_prune_verify_and_eval_as_processes(workspace):
    source, out, report = workspace / "model", workspace / "out", workspace / "report.json"
    pruned = run_process("prune", source, out, "--report", report, "--json", *options(workspace))
    assert pruned.returncode == 0, pruned.stderr
    printed = json.loads(pruned.stdout)
    assert printed == json.loads(report.read_text())
    assert printed["solver"]["name"] == "ADMM"
    assert printed["solver"]["rho"] == {"name": "Exponential", "first": 0.5, "growth": ANY}
    assert printed["arguments"]["pattern"] == "2:4"
    assert printed["refit"] == {"name": "ConjugateGradients", "steps": 20, "tolerance": 1e-4}
    assert printed["pull"] == 1
    assert printed["arguments"]["samples"] == 8
    assert printed["calibration_tokens"] == 8 * 32
    assert printed["versions"].keys() > {"python", "jax", "prox24"}
    assert printed["peak_memory_bytes"] > 1e8
    assert len(printed["linears"]) == 14
    for linear in printed["linears"]:
        assert linear["status"] == "sparse"
        assert linear["sparsity"] == 0.5
        assert 0 < linear["relative_loss"] < 1
        assert linear["steps"] > 10
        assert linear["seconds"] > 0

    verified = run_process("verify", out, "--json")
    assert verified.returncode == 0, verified.stderr
    counts = json.loads(verified.stdout)
    assert counts["linears"] == 14
    assert counts["sparsity"] == 0.5
    assert counts["violations"] == {}

    evaluated = run_process(
        "eval", out, "--text", workspace / "text.txt", "--sequence-length", "64", "--json"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout)
    assert result["context_length"] == 64
    assert result["windows"] == len(TEXT) // 64
    assert result["predicted_tokens"] == result["windows"] * 63
    assert 1 < result["perplexity"] < 1e6


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_half_of_the_weights_without_a_pattern(workspace, capsys, method):
    half = ["--pattern", "50%"]
    planned = ["plan", str(workspace / "model"), "--method", method, *half, "--rate", "1e12"]
    assert main([*planned, "--samples", "8", "--sequence-length", "32"]) == 0
    out = workspace / "out"
    command = ["prune", str(workspace / "model"), str(out), "--method", method, *half]
    assert main([*command, *options(workspace), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["verify", str(out), *half, "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["pattern"] == "50%"
    assert verified["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert main(["verify", str(out), "--pattern", "2:4", "--quiet"]) == 1
    capsys.readouterr()
    assert main(["inspect", str(workspace / "model"), *half, "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected["pattern"] == "50%"
    assert inspected["bytes"] / 2 < inspected["sparse_bytes"] < inspected["bytes"]


def test_the_demo_compares_the_methods_and_leaves_the_models(workspace, monkeypatch, capsys):
    monkeypatch.setattr("prox24.cli.demo.fetch_model", lambda cache: workspace / "model")
    command = ["demo", "--cache", workspace / "cache", "--output", workspace / "models"]
    command += ["--text", workspace / "text.txt", *options(workspace, 4)]
    assert main([*map(str, command), "--evaluation-samples", "4", "--json"]) == 0
    dense, *rows = json.loads(capsys.readouterr().out)["rows"]
    assert dense["method"] == "dense"
    methods = ["magnitude", "wanda", "sparsegpt", "admm + refit, dense targets"]
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert 0 < row["mean_relative_loss"] < 1
        assert main(["verify", row["folder"], "--quiet"]) == 0


def test_a_name_that_is_no_unicode_is_one_line(workspace):
    name = os.fsencode(workspace) + b"/t\xe9xt.txt"
    try:
        Path(os.fsdecode(name)).write_text(TEXT)
    except OSError:
        pytest.skip("the file system has no such names")
    options = ["--sequence-length", "32", "--samples", "4"]
    command = [sys.executable, "-m", "prox24", "prune", workspace / "model", workspace / "out"]
    ended = subprocess.run(
        [*map(str, command), "--calibration", name, *options], capture_output=True, timeout=300
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.decode(errors="replace").splitlines()
    assert line.startswith("prox24: error: text that is no Unicode: ")


def test_verify_exits_1_and_names_the_tensor(workspace, capsys):
    assert main(["verify", str(workspace / "model")]) == 1
    assert "model.layers.0.self_attn.q_proj.weight: 256 blocks" in capsys.readouterr().out


def test_every_command_prints_for_people_too(workspace, capsys):
    out = workspace / "out"
    arguments = ["prune", str(workspace / "model"), str(out), "--method", "wanda"]
    assert main([*arguments, *options(workspace)]) == 0
    printed = capsys.readouterr().out
    for row in ("mean relative loss", "calibration tokens", "peak memory", "no runtime skips them"):
        assert row in printed
    assert main(["verify", str(out)]) == 0
    assert "50.00%" in capsys.readouterr().out
    text = ["--text", str(workspace / "text.txt"), "--sequence-length", "32"]
    assert main(["eval", str(out), *text]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_quiet_prints_nothing(workspace, capfd):
    arguments = ["prune", str(workspace / "model"), str(workspace / "out"), "--quiet"]
    assert main([*arguments, "--method", "magnitude", *options(workspace)]) == 0
    assert capfd.readouterr().out == ""


def test_refit_and_pattern_choices(workspace, capsys):
    arguments = ["prune", str(workspace / "model"), str(workspace / "out"), "--json"]
    choices = ["--method", "sparsegpt", "--refit", "gradient", "--pattern", "4:8"]
    assert main([*arguments, *choices, *options(workspace)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["refit"] == {"name": "GradientSteps", "transform": None, "steps": 1000}
    for linear in printed["linears"]:
        assert linear["relative_loss"] <= linear["relative_loss_before_refit"] * 1.0001
    assert main(["verify", str(workspace / "out"), "--pattern", "4:8"]) == 0


@pytest.mark.parametrize(
    ("choices", "pull"),
    [
        (["--method", "prox"], 1),
        (["--method", "prox", "--targets", "pruned"], None),
        (["--method", "sparsegpt"], None),
        (["--method", "sparsegpt", "--targets", "dense"], 1),
        (["--method", "wanda", "--targets", "dense", "--pull", "0.5"], 0.5),
        (["--method", "admm", "--pull", "3"], 3),
    ],
    ids=str,
)
def test_targets_are_dense_by_default_but_for_baselines(workspace, capsys, choices, pull):
    out = workspace / "out"
    arguments = ["prune", str(workspace / "model"), str(out), "--json"]
    assert main([*arguments, *choices, *options(workspace)]) == 0
    assert json.loads(capsys.readouterr().out)["pull"] == pull
    card = "pruned" if pull is None else f"dense, pull {pull}"
    assert f"- targets: {card}\n" in (out / "README.md").read_text()


def missing_source(workspace):
    return ["prune", workspace / "nowhere", workspace / "out"], "nowhere"


def existing_destination(workspace):
    (workspace / "out").mkdir()
    (workspace / "out" / "precious").write_text("x")
    return ["prune", workspace / "model", workspace / "out"], "--overwrite"


def no_parent(workspace):
    return ["prune", workspace / "model", workspace / "a" / "out"], "does not exist"


def no_folder_for_the_report(workspace):
    report = workspace / "a" / "report.json"
    return ["prune", workspace / "model", workspace / "out", "--report", report], "report.json"


def short_text(workspace):
    return [
        "prune", workspace / "model", workspace / "out", *options(workspace, samples=1000)
    ], "1000 windows of 32 need 32000"  # fmt: skip


def missing_text(workspace):
    return ["eval", workspace / "model", "--text", workspace / "none.txt"], "none.txt"


def text_that_is_not_utf8(workspace):
    (workspace / "binary").write_bytes(b"\xff\xfe\x00")
    return ["eval", workspace / "model", "--text", workspace / "binary"], "not UTF-8"


def truncated_shard(workspace):
    shard = workspace / "model" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    return ["verify", workspace / "model"], "model.safetensors"


def pattern_prox_cannot_do(workspace):
    arguments = ["prune", workspace / "model", workspace / "out", "--pattern", "3:4"]
    return [*arguments, *options(workspace)], "supports 1:M and 2:M, not 3:4"


def width_not_divisible(workspace):
    arguments = ["prune", workspace / "model", workspace / "out", "--pattern", "2:5"]
    return [*arguments, *options(workspace), "--method", "wanda"], "q_proj.weight"


def width_not_divisible_within_a_memory(workspace):
    arguments, named = width_not_divisible(workspace)
    return [*arguments, "--memory", "1GB"], named


def report_that_is_a_folder(workspace):
    return ["verify", workspace / "model", "--report", workspace], "is a folder"


def nan_weight(workspace):
    weights = random_weights(config_dict())
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    write_folder(workspace / "broken", config_dict(), weights)
    arguments = ["prune", workspace / "broken", workspace / "out", *options(workspace)]
    return arguments, "model.layers.1.mlp.up_proj.weight"


def pull_without_dense_targets(workspace):
    arguments = ["prune", workspace / "model", workspace / "out", *options(workspace)]
    return [*arguments, "--method", "wanda", "--pull", "2"], "--pull is for --targets dense"


def missing_tokenizer(workspace):
    for file in (workspace / "model").glob("tokenizer*"):
        file.unlink()
    return ["eval", workspace / "model"], "tokenizer"


ERRORS = [
    missing_source,
    existing_destination,
    no_parent,
    no_folder_for_the_report,
    short_text,
    missing_text,
    text_that_is_not_utf8,
    truncated_shard,
    pattern_prox_cannot_do,
    width_not_divisible,
    width_not_divisible_within_a_memory,
    report_that_is_a_folder,
    nan_weight,
    pull_without_dense_targets,
    missing_tokenizer,
]


@pytest.mark.parametrize("make", ERRORS)
def test_an_error_is_one_line_and_leaves_nothing_behind(workspace, capsys, make):
    arguments, named = make(workspace)
    before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*")}
    assert main([str(argument) for argument in [*arguments, "--quiet"]]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("prox24: error: ")
    assert named in printed.err
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*")} == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
            "a device fails: RE",
        ),
        (RuntimeError("Unable to initialize backend 'cuda': no driver\nmore"), "'cuda': no driver"),
        (MemoryError("cannot allocate 8 GB"), "out of memory: cannot allocate 8 GB"),
        (PermissionError(13, "Permission denied", "/root/model"), "denied: '/root/model'"),
    ],
)
def test_what_the_machine_refuses_is_one_line(workspace, monkeypatch, capsys, error, said):
    def fail(arguments):
        raise error

    monkeypatch.setattr(evaluate, "run", fail)
    assert main(["eval", str(workspace / "model")]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_path_is_printed_as_it_is(capsys):
    names = ["llama[wanda]", "out[/b]", "x:smile:"]
    print_table(["written", names[0]], [["a", names[1]], ["b", names[2]]])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_has_ended_is_no_error(workspace, form, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "prox24", "inspect", str(workspace / "model"), *form]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    outcome = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, timeout=300, env=environment
    )
    os.close(write)
    assert outcome.returncode == 128 + signal.SIGPIPE
    assert outcome.stderr == b""


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--pattern", "2to4"),
        ("--pattern", "5:4"),
        ("--samples", "0"),
        ("--samples", str(2**63)),
        ("--sequence-length", "1"),
        ("--damping", "-1"),
        ("--damping", "inf"),
        ("--damping", "much"),
        ("--method", "none"),
    ],
)
def test_bad_values_of_options_exit_2(workspace, capsys, option, value):
    arguments = ["prune", str(workspace / "model"), str(workspace / "out"), option, value]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert option in capsys.readouterr().err


def test_an_error_of_a_process_has_exit_code_2_and_no_traceback(workspace):
    outcome = run_process("verify", workspace / "nowhere")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("prox24: error: ")
    assert "Traceback" not in outcome.stderr
