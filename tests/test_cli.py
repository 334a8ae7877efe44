import dataclasses
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
from tiny import config_dict, random_weights, write_folder, write_tiny

import prox24
from prox24._cli import eval as eval_command
from prox24._cli.main import main, parser
from prox24._cli.options import recipe_of
from prox24._jobs.output import print_table

TEXT = "Calibration text for a model that reads bytes. " * 60


@pytest.fixture
def workspace(tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def options(workspace, samples=8):
    length = ["--sequence-length", "32", "--samples", str(samples)]
    return ["--calibration", str(workspace / "text.txt"), *length]


def prune(workspace, *choices, destination="out"):
    places = [workspace / "model", workspace / destination]
    return main([*map(str, ["prune", *places, *options(workspace), *choices])])


def printed_json(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_process(*arguments):
    command = [sys.executable, "-m", "prox24", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_prune_verify_and_eval(workspace, capsys):
    source, out, report = workspace / "model", workspace / "out", workspace / "report.json"
    pruned = run_process("prune", source, out, "--report", report, "--json", *options(workspace))
    assert pruned.returncode == 0, pruned.stderr
    printed = json.loads(pruned.stdout)
    assert printed == json.loads(report.read_text())
    recipe = printed["recipe"]
    assert recipe == prox24.Recipe().to_dict()
    assert recipe["solver"]["name"] == "ADMM"
    assert recipe["solver"]["rho"] == {"name": "Exponential", "first": 0.5, "growth": ANY}
    assert recipe["pattern"] == "2:4"
    assert recipe["refit"] == {"name": "ConjugateGradients", "steps": 20, "tolerance": 1e-4}
    assert recipe["targets"] == {"name": "DenseTargets", "pull": 1}
    assert printed["calibration"] == {
        "text": str(workspace / "text.txt"),
        "windows": 8,
        "sequence_length": 32,
        "tokens": 8 * 32,
    }
    assert printed["versions"].keys() > {"python", "jax", "prox24"}
    assert printed["peak_memory_bytes"] > 1e8
    assert len(printed["linears"]) == 14
    for linear in printed["linears"]:
        assert linear["status"] == "sparse"
        assert linear["sparsity"] == 0.5
        assert 0 < linear["relative_loss"] < 1
        assert linear["steps"] > 10
        assert linear["seconds"] > 0

    counts = printed_json(capsys, "verify", out)
    assert (counts["linears"], counts["sparsity"], counts["violations"]) == (14, 0.5, {})

    text = ["--text", workspace / "text.txt", "--sequence-length", "64"]
    result = printed_json(capsys, "eval", out, *text)
    assert result["context_length"] == 64
    assert result["windows"] == len(TEXT) // 64
    assert result["predicted_tokens"] == result["windows"] * 63
    assert 1 < result["perplexity"] < 1e6


def test_python_options_and_recipe_files_write_the_same_bytes(workspace, capsys):
    recipe = dataclasses.replace(prox24.Recipe.wanda(), pattern=(4, 8), only="self_attn")
    report = prox24.prune(
        workspace / "model",
        workspace / "python",
        recipe,
        calibration=prox24.Text(workspace / "text.txt", samples=8, sequence_length=32),
    )
    expected = contents(workspace / "python")
    given = ["--method", "wanda", "--pattern", "4:8", "--only", "self_attn", "--json"]
    assert prune(workspace, *given) == 0
    printed = json.loads(capsys.readouterr().out)
    assert contents(workspace / "out") == expected
    assert {linear["name"] for linear in printed["linears"]} == {
        linear.name for linear in report.linears
    }
    assert printed.keys() == report.to_dict().keys()
    recipe.save(workspace / "recipe.json")
    # As people write it: for YAML 1.1, 4:8 would be a number and 1e-2 would be text.
    text = "recipe: 1\nsolver: {name: Wanda}\nrefit:\npattern: 4:8\ndamping: 1e-2\ntargets: null\n"
    (workspace / "recipe.yaml").write_text(text)
    for file, more in (("recipe.json", []), ("recipe.yaml", ["--only", "self_attn"])):
        assert prune(workspace, "--recipe", workspace / file, *more, destination=file + "-out") == 0
        assert contents(workspace / f"{file}-out") == expected
    card = (workspace / "out" / "README.md").read_text()
    (written,) = card.split("```json\n")[1:]
    assert prox24.Recipe.from_json(written.split("```")[0]) == recipe


def recipe_from(*choices):
    given = ["inspect", "model", *choices]
    return recipe_of(parser(given).parse_args(given))


def test_options_change_parts_of_a_recipe(tmp_path):
    dense, replace = prox24.DenseTargets, dataclasses.replace
    default, wanda = prox24.Recipe(), prox24.Recipe.wanda()
    refinement = prox24.BlockRefinement
    tuned = replace(prox24.Recipe.best(), damping=0.5)
    tuned.save(tmp_path / "tuned.json")
    file = ["--recipe", str(tmp_path / "tuned.json")]
    for choices, expected in (
        ([], default),
        (["--method", "paper"], prox24.Recipe.paper()),
        (
            ["--method", "prox", "--targets", "pruned"],
            replace(prox24.Recipe.proximal(), targets=None),
        ),
        (["--method", "wanda", "--targets", "dense"], replace(wanda, targets=dense())),
        (
            ["--method", "wanda", "--targets", "dense", "--pull", "3"],
            replace(wanda, targets=dense(3.0)),
        ),
        (["--pull", "3"], replace(default, targets=dense(3.0))),
        (["--refit", "gradient"], replace(default, refit=prox24.GradientSteps())),
        (["--refit", "none"], replace(default, refit=None)),
        (
            ["--skip", "q_proj", "--keep-dense", "0.1"],
            replace(default, skip="q_proj", keep_dense=0.1),
        ),
        (
            ["--keep-dense", "3", "--dtype", "float16"],
            replace(default, keep_dense=3, dtype="float16"),
        ),
        (["--refine", "block"], replace(default, refine=refinement())),
        (
            ["--method", "best", "--refine-rate", "0.5", "--refine-linears-only"],
            replace(default, refine=refinement(rate=0.5, linears_only=True)),
        ),
        (file, tuned),
        ([*file, "--damping", "1", "--refine", "none"], replace(tuned, damping=1.0, refine=None)),
    ):
        assert recipe_from(*choices) == expected, choices


@pytest.mark.parametrize(
    ("choices", "pattern", "linears"),
    [
        (["--pattern", "4:8", "--method", "wanda"], "4:8", 14),
        (["--method", "wanda", "--skip", r"layers\.0\.", "--keep-dense", "1"], "2:4", 6),
        (["--method", "sparsegpt", "--pattern", "50%"], "50%", 14),
    ],
)
def test_verify_takes_the_recipe_of_the_manifest(workspace, capsys, choices, pattern, linears):
    assert prune(workspace, *choices, "--quiet") == 0
    out = workspace / "out"
    verified = printed_json(capsys, "verify", out, "--source", workspace / "model")
    assert (verified["pattern"], verified["linears"]) == (pattern, linears)
    assert verified["sparsity"] == pytest.approx(0.5, abs=0.01)
    # One that is given holds for every linear.
    assert main(["verify", str(out), "--pattern", "2:4", "--quiet"]) == 1


def test_the_demo_compares_the_methods_and_leaves_the_models(workspace, monkeypatch, capsys):
    monkeypatch.setattr("prox24._cli.demo_model.fetch_model", lambda cache: workspace / "model")
    command = ["demo", "--cache", workspace / "cache", "--output", workspace / "models"]
    command += ["--text", workspace / "text.txt", *options(workspace, 4)]
    dense, *rows = printed_json(capsys, *command, "--evaluation-samples", "4")["rows"]
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
    assert main(["verify", str(workspace / "model"), "--quiet"]) == 1
    assert capsys.readouterr().out.count("256 blocks") == 8  # a line for each problem, no table


def test_every_command_prints_for_people_or_is_quiet(workspace, capfd):
    out = workspace / "out"
    assert prune(workspace, "--method", "wanda") == 0
    printed = capfd.readouterr().out
    for row in ("mean relative loss", "calibration tokens", "peak memory", "no runtime skips them"):
        assert row in printed
    text = ["--text", str(workspace / "text.txt"), "--sequence-length", "32"]
    for arguments, said in (
        (["verify", str(out)], "50.00%"),
        (["eval", str(out), *text], "plexity"),
    ):
        assert main(arguments) == 0
        assert said in capfd.readouterr().out
        assert main([*arguments, "--quiet"]) == 0
        assert capfd.readouterr() == ("", "")
    assert prune(workspace, "--method", "wanda", "--overwrite", "--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_a_refit_lowers_every_loss(workspace, capsys):
    assert prune(workspace, "--method", "sparsegpt", "--refit", "gradient", "--json") == 0
    for linear in json.loads(capsys.readouterr().out)["linears"]:
        assert linear["relative_loss"] <= linear["relative_loss_before_refit"] * 1.0001


def missing_source(workspace):
    return ["prune", workspace / "nowhere", workspace / "out"], "nowhere"


def existing_destination(workspace):
    (workspace / "out").mkdir()
    (workspace / "out" / "precious").write_text("x")
    arguments = ["prune", workspace / "model", workspace / "out"]
    return arguments, "exists; pass overwrite=True, or --overwrite, to replace it"


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


def rate_without_a_refinement(workspace):
    arguments = ["prune", workspace / "model", workspace / "out", *options(workspace)]
    return [*arguments, "--refine-rate", "0.1"], "--refine-rate is for --refine block"


def place_without_other_processes(workspace):
    arguments = ["prune", workspace / "model", workspace / "out", "--process-id", "0"]
    return arguments, "--process-id are for --distributed"


def missing_tokenizer(workspace):
    for file in (workspace / "model").glob("tokenizer*"):
        file.unlink()
    return ["eval", workspace / "model"], "tokenizer"


def recipe_file(text, named, name="recipe.json"):
    def make(workspace):
        (workspace / name).write_text(text)
        arguments = ["prune", workspace / "model", workspace / "out", *options(workspace)]
        return [*arguments, "--recipe", workspace / name], f"{name}: {named}"

    return make


def missing_recipe_file(workspace):
    arguments = ["prune", workspace / "model", workspace / "out", "--recipe", workspace / "none"]
    return arguments, f"cannot read {workspace}/none: No such file"


RECIPE_FILES = {
    "unknown field": recipe_file('{"dampen": 1}', "recipe has no field 'dampen'; its fields are"),
    "wrong type": recipe_file('{"damping": "1"}', "recipe.damping is '1', not float"),
    "unknown version": recipe_file('{"recipe": 2}', "version 2 of recipes is unknown; this is 1"),
    "no YAML": recipe_file("a: [", "the recipe is not YAML: ", "recipe.yaml"),
    "bad pattern": recipe_file("pattern: 5:4", "pattern: '5:4' is neither", "recipe.yaml"),
}

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
    rate_without_a_refinement,
    place_without_other_processes,
    missing_tokenizer,
    missing_recipe_file,
    *(pytest.param(make, id=name) for name, make in RECIPE_FILES.items()),
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
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, error, said):
    def fail(arguments):
        raise error

    monkeypatch.setattr(eval_command, "run", fail)
    assert main(["eval", "model"]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_path_is_printed_as_it_is(capsys):
    names = ["llama[wanda]", "out[/b]", "x:smile:"]
    print_table(["written", names[0]], [["a", names[1]], ["b", names[2]]])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


@pytest.mark.parametrize(("form", "unbuffered"), [([], "1"), (["--json"], "")])
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
        ("--samples", "0"),
        ("--samples", str(2**63)),
        ("--sequence-length", "1"),
        ("--damping", "-1"),
        ("--damping", "inf"),
        ("--damping", "much"),
        ("--refine-rate", "0"),
        ("--refine-held-out", "1.5"),
        ("--keep-dense", "-1"),
        ("--method", "none"),
        ("--dtype", "int8"),
    ],
)
def test_bad_values_of_options_exit_2(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main(["prune", "model", "out", option, value])
    assert option in capsys.readouterr().err


def test_a_method_and_a_recipe_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prune", "model", "out", "--method", "wanda", "--recipe", "recipe.json"])
    assert "--recipe: not allowed with argument --method" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"prox24 {prox24.__version__}\n"


def test_an_error_of_a_process_has_exit_code_2_and_no_traceback(workspace):
    outcome = run_process("verify", workspace / "nowhere")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("prox24: error: ")
    assert "Traceback" not in outcome.stderr
