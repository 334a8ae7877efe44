"""llm-compressor against prox24: perplexity, seconds and peak memory of the same job.

    python -m venv ENV && ENV/bin/pip install llmcompressor
    python benchmarks/llm_compressor.py --python ENV/bin/python

Both prune every linear but the head to 2:4, on the same token ids and with their own default
settings. Windows are drawn at random from the calibration text. Each run is a process of its own.
Its seconds are those from start to end: they hold imports, compilation and files. Its peak is the
largest resident memory that Linux tells. prox24 counts the zeros of every model, and measures its
perplexity on the first windows of each text.

Each run appends a line to FOLDER/llm_compressor.csv. A run that is there already is skipped: give
another FOLDER for other texts.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# The environment of llm-compressor runs this file too, and has no prox24: functions import it.


def by_llm_compressor(method: str, model: str, tokens: np.ndarray, folder: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifiers = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
    # It would prune the head, and with it the embedding that the head is tied to.
    recipe = modifiers[method](sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head"])
    windows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        recipe=recipe,
        dataset=Dataset.from_dict(windows),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        output_dir=folder,
    )


def by_prox24(method: str, model: str, tokens: np.ndarray, folder: str) -> None:
    from prox24._cli.malloc import start_with_settings

    start_with_settings()  # as the command does
    import prox24

    recipes = {
        "sparsegpt": prox24.Recipe.sparsegpt,
        "wanda": prox24.Recipe.wanda,
        "default": prox24.Recipe,
    }
    prox24.prune(model, folder, recipes[method](), calibration=tokens)


TOOLS = {"llm-compressor": by_llm_compressor, "prox24": by_prox24}
DENSE = "dense"
ROWS = (
    DENSE,
    "llm-compressor sparsegpt",
    "llm-compressor wanda",
    "prox24 sparsegpt",
    "prox24 wanda",
    "prox24 default",
)


def prune(tool: str, method: str, model: str, windows: str, folder: str) -> None:
    """Prunes in this process, and prints its peak memory in bytes at the end."""
    TOOLS[tool](method, model, np.load(windows), folder)
    # getrusage would begin with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def measure(python: str, row: str, model: Path, windows: Path, folder: Path) -> dict[str, object]:
    """Seconds and peak memory of a process that prunes.

    Raises:
      SystemExit: it fails.
    """
    command = [python, __file__, *row.split(), model, windows, folder]
    began = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"{row} failed with exit code {process.returncode}; standard error says why")
    return {"seconds": seconds, "peak_bytes": int(process.stdout.split()[-1])}


def version_of(python: str) -> str:
    """The version of llm-compressor that a Python has.

    Raises:
      SystemExit: it has none.
    """
    code = "import importlib.metadata as packages; print(packages.version('llmcompressor'))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"--python {python} runs no llm-compressor: {python} -m pip install llmcompressor")
    return found.stdout.strip()


def share_of_zeros(model: Path) -> float:
    """The share of a checkpoint's weights that are zero."""
    from prox24._checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    tensors = [checkpoint.read(name) for name in checkpoint.tensors]
    zeros = sum(np.count_nonzero(values == 0) for values in tensors)
    return zeros / sum(values.size for values in tensors)


def main() -> None:
    import common

    import prox24

    parser = common.parser_of(__doc__)
    parser.add_argument("--model", type=Path, help="HF folder; default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--python", required=True, metavar="FILE", help="of an environment with llm-compressor"
    )
    common.add_texts(parser)
    parser.add_argument("--windows", type=common.positive, default=16)
    parser.add_argument("--length", type=common.positive, default=512)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    common.add_output(parser)
    arguments = parser.parse_args()
    model, path = arguments.model or common.dense_model(), arguments.output / "llm_compressor.csv"
    versions = {"llm-compressor": version_of(arguments.python), "prox24": prox24.__version__}
    pythons = {"llm-compressor": arguments.python, "prox24": sys.executable}
    every = common.windows_of(model, arguments.calibration, None, arguments.length)
    count, length = arguments.evaluation_windows, arguments.length
    texts = common.windows_of_texts(model, arguments.texts, count, length)
    titles = ("model", "row", "version", "windows", "length")
    columns = (*titles, "seconds", "peak_bytes", "zeros", *texts)

    def measured(row: str) -> dict[str, object]:
        with tempfile.TemporaryDirectory() as folder:
            found, pruned = {}, model
            if row != DENSE:
                windows, pruned = Path(folder) / "windows.npy", Path(folder) / "pruned"
                np.save(windows, common.drawn_windows(every, arguments.windows, 0))
                found = measure(pythons[row.split()[0]], row, model, windows, pruned)
            return found | {"zeros": share_of_zeros(pruned)} | common.perplexities(pruned, texts)

    sizes = arguments.windows, arguments.length
    keys = [(model.name, row, versions.get(row.split()[0], ""), *sizes) for row in arguments.rows]
    runs = [(dict(zip(titles, key, strict=True)), (key[1],)) for key in keys]
    lines = []
    for row in common.completed(path, columns, runs, measured):
        cells = [row["model"], row["row"], row["version"], f"{row['windows']} x {row['length']}"]
        cells += [f"{float(row[text]):.2f}" for text in texts] + [f"{float(row['zeros']):.2%}"]
        if row["row"] != DENSE:
            cells += [f"{float(row['seconds']):.0f}", f"{float(row['peak_bytes']) / 1e9:.2f}"]
        lines.append(cells)
    names = ("model", "row", "version", "windows", *texts, "zeros", "seconds", "peak, GB")
    common.show(names, lines, title=common.environment())


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in TOOLS:
        prune(*sys.argv[1:])
    else:
        main()
