"""A whole job as commands: text of three kinds, an interruption, one table, and what loads it.

    python examples/whole_job.py MODEL FOLDER

MODEL is a Hugging Face folder, a GGUF file or an id of the hub. The text is the package's. Each
command is printed before it runs, so that it can be copied.
"""

import argparse
import csv
import json
import shlex
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import prox24


def write_texts(folder):
    """The speeches of the package in three files: records, rows and plain text."""
    speeches = (resources.files("prox24") / "data" / "speeches.txt").read_text(encoding="utf-8")
    parts = speeches.split("\n\n")
    third = len(parts) // 3
    records = [json.dumps({"id": i, "text": part}) for i, part in enumerate(parts[:third])]
    (folder / "a.jsonl").write_text("\n".join(records))
    with (folder / "b.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(parts[third : 2 * third]))
    (folder / "c.txt").write_text("\n\n".join(parts[2 * third :]))
    return [folder / name for name in ("a.jsonl", "b.csv", "c.txt")]


def run(*arguments, until=None):
    """Runs a command, or ends it when a file has a line; the exit code."""
    command = ["prox24", *map(str, arguments)]
    print("$", shlex.join(command), flush=True)
    process = subprocess.Popen([sys.executable, "-m", *command])
    while until is not None and process.poll() is None:
        if until.exists() and "\n" in until.read_text():
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    return process.wait()


def check(code, expected=0):
    """Ends the example where a command did not end as it should."""
    if code != expected:
        sys.exit(f"the command ended with {code}, not {expected}")


def ask(models, folder, questions):
    """Has lm-evaluation-harness ask each model which of four sentences comes next."""
    try:
        from lm_eval import simple_evaluate

        from prox24.lm_eval import Prox24LM
    except ImportError:
        print("Questions are left out: they need pip install 'prox24[eval]'")
        return
    novel = (resources.files("prox24") / "data" / "austen.txt").read_text(encoding="utf-8")
    sentences = [" ".join(each.split()) for each in novel.split(". ")]
    sentences = [each for each in sentences if 30 < len(each) < 120]
    lines = []
    for i in range(questions):
        choices = [f" {sentences[(i + 1 + 97 * k * k) % len(sentences)]}" for k in range(4)]
        lines.append(json.dumps({"text": f"{sentences[i]}.", "choices": choices}))
    file = folder / "questions.jsonl"
    file.write_text("\n".join(lines))
    task = {
        "task": "next_sentence",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc_norm"}],
    }
    for model in models:
        found = simple_evaluate(Prox24LM(model, max_length=128), tasks=[task], bootstrap_iters=0)
        print(f"{model}: {found['results']['next_sentence']['acc_norm,none']:.1%} of sentences")


def main():
    """Prunes by two recipes, the second one interrupted, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="for everything that is written")
    parser.add_argument("--samples", type=int, default=16, help="windows (default: 16)")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--questions", type=int, default=100)
    arguments = parser.parse_args()
    folder, model = arguments.folder, arguments.model
    folder.mkdir(parents=True, exist_ok=True)

    sizes = ["--samples", arguments.samples, "--sequence-length", arguments.sequence_length]
    text = [word for file in write_texts(folder) for word in ("--calibration", file)]
    recipe, metrics, report = (folder / f"{name}.json" for name in ("recipe", "metrics", "report"))
    prox24.Recipe().save(recipe)
    rival, pruned = folder / "sparsegpt", folder / "default"

    check(run("plan", model, "--recipe", recipe, *sizes))
    check(run("prune", model, rival, "--method", "sparsegpt", *text, *sizes, "--quiet"))
    command = ["prune", model, pruned, "--recipe", recipe, *text, *sizes]
    logs = ["--log-file", folder / "log.txt", "--metrics", metrics, "--report", report]
    # The first linear is written; the second run goes on behind it.
    check(run(*command, *logs, "--quiet", until=metrics), 128 + signal.SIGTERM)
    check(run(*command, *logs))
    resumed = json.loads(report.read_text())["resumed_linears"]
    print(f"{resumed} linears were there from the run that was ended")
    check(run("verify", pruned, "--source", model, "--quiet"))
    check(run("eval", model, rival, pruned, *sizes))
    prompt = ["--prompt", "It is a truth universally acknowledged, that", "--tokens", 12]
    check(run("generate", model, rival, pruned, *prompt))
    ask([model, rival, pruned], folder, arguments.questions)
    check(run("convert", pruned, folder / "flax", "--format", "flax"))


if __name__ == "__main__":
    main()
