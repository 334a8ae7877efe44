"""A whole job as commands: text of three kinds, an interruption, an export, and one table.

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
    """Speeches in three files: records, rows and plain text; more speeches, and a novel."""
    data = resources.files("prox24") / "data"
    parts = (data / "speeches.txt").read_text(encoding="utf-8").split("\n\n")
    size = len(parts) // 4
    records = [json.dumps({"id": i, "text": part}) for i, part in enumerate(parts[:size])]
    (folder / "a.jsonl").write_text("\n".join(records))
    with (folder / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(parts[size : 2 * size])])
    (folder / "c.txt").write_text("\n\n".join(parts[2 * size : 3 * size]))
    (folder / "speeches.txt").write_text("\n\n".join(parts[3 * size :]))
    (folder / "novel.txt").write_text((data / "austen.txt").read_text(encoding="utf-8"))


def start(*arguments, **how):
    """Prints a command and starts it."""
    command = ["prox24", *map(str, arguments)]
    print("$", shlex.join(command), flush=True)
    return subprocess.Popen([sys.executable, "-m", *command], **how)


def check(process, expected=0):
    """Ends the example if a command does not end as it should."""
    if process.wait() != expected:
        sys.exit(f"the command ended with {process.returncode}, not {expected}")


def ask(models, folder, questions):
    """The share of sentences after which a model finds the next of four, by lm-eval."""
    try:
        from lm_eval import simple_evaluate

        from prox24.lm_eval import Prox24LM
    except ImportError:
        return ["needs prox24[eval]"] * len(models)
    novel = (folder / "novel.txt").read_text()
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
    found = [
        simple_evaluate(Prox24LM(model, max_length=128), tasks=[task], bootstrap_iters=0)
        for model in models
    ]
    return [f"{each['results']['next_sentence']['acc_norm,none']:.1%}" for each in found]


def main():
    """Prunes by two recipes, the second one interrupted, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="for everything that is written")
    parser.add_argument("--samples", type=int, default=16, help="windows (default: 16)")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--questions", type=int, default=100)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    write_texts(folder)
    sizes = ["--samples", arguments.samples, "--sequence-length", arguments.sequence_length]
    text = [f"--calibration={folder / name}" for name in ("a.jsonl", "b.csv", "c.txt")]
    names = "recipe.json", "metrics.jsonl", "report.json"
    recipe, metrics, report = (folder / name for name in names)
    prox24.Recipe().save(recipe)
    model, rival, pruned = models = [arguments.model, folder / "sparsegpt", folder / "default"]

    check(start("plan", model, "--recipe", recipe, *sizes))
    check(start("prune", model, rival, "--method", "sparsegpt", *text, *sizes))
    logs = ["--log-file", folder / "log.txt", "--metrics", metrics, "--report", report]
    command = ["prune", model, pruned, "--recipe", recipe, *text, *sizes, *logs]
    first = start(*command)
    while first.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)  # until one linear is written
    first.terminate()
    check(first, 128 + signal.SIGTERM)
    check(start(*command))
    check(start("verify", pruned, "--source", model))
    check(start("generate", *models, "--prompt", "It is a truth", "--tokens", 12))
    check(start("convert", pruned, folder / "flax", "--format", "flax"))
    texts = [f"--text={folder / name}" for name in ("novel.txt", "speeches.txt")]
    evaluation = start("eval", *models, *texts, *sizes, "--json", stdout=subprocess.PIPE)
    printed = evaluation.stdout.read()  # before the wait, which a full pipe would block
    check(evaluation)
    found = [each["perplexity"] for each in json.loads(printed)["rows"]]
    answers = ask(models, folder, arguments.questions)
    print(f"{'':9}  {'novel':>10}  {'speeches':>10}  next sentence")
    rows = zip(("dense", "sparsegpt", "default"), found[::2], found[1::2], answers, strict=True)
    for name, novel, speeches, answer in rows:
        print(f"{name:9}  {novel:10.2f}  {speeches:10.2f}  {answer:>13}")


if __name__ == "__main__":
    main()
