"""Runs the scripts of the gallery and keeps what they print and draw: `make gallery`.

A page in docs/gallery has the docstring of a script, its figure, its output and its code. Names of
pages as arguments make only these pages.
"""

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from prox24._cli.demo_model import fetch_model

ROOT = Path(__file__).resolve().parents[1]
GALLERY = {
    "prox_path": ["The path of the prox", "python examples/prox_path.py"],
    "correlated_regression": [
        "Correlated features",
        "python examples/correlated_regression.py",
    ],
    "prune_a_layer": ["A linear by every solver", "python examples/prune_a_layer.py"],
    "digits": [
        "Digits",
        "python examples/digits.py",
        "python examples/digits.py --hidden 16 --output .cache/digits16.svg",
    ],
    "nnx_characters": ["An NNX transformer", "python examples/nnx_characters.py"],
    "finetune": [
        "Fine-tuning a pruned SmolLM2",
        "prox24 prune .cache/SmolLM2-135M-Instruct.Q4_1.gguf .cache/pruned --method wanda "
        "--samples 4 --sequence-length 256 --overwrite --quiet",
        "python examples/finetune.py .cache/pruned .cache/tuned --overwrite",
    ],
    "gap": ["The gap against tokens", "python benchmarks/gap.py docs/figures/refine.csv"],
}
"""The title of each page, and its commands. The last one is of its script."""


def page_of(name):
    """The file of a page."""
    return ROOT / f"docs/gallery/{name}.md"


def script_of(name):
    """The script of a page, relative to the root."""
    return GALLERY[name][-1].split()[1]


def digest_of(name):
    """The SHA-256 of the commands, and of their scripts and tables."""
    commands = "\n".join(GALLERY[name][1:])
    files = [ROOT / word for word in commands.split() if word.endswith((".py", ".csv"))]
    return hashlib.sha256(commands.encode() + b"".join(map(Path.read_bytes, files))).hexdigest()


def docstring_of(name):
    """The docstring of the script."""
    return ast.get_docstring(ast.parse((ROOT / script_of(name)).read_text()))


def printed_by(command):
    """The command and its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command.split(),
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return f"$ {command}\n{done.stdout}"


def write_page(name):
    """Runs the commands of a page and writes it."""
    title, *commands = GALLERY[name]
    console = "\n".join(map(printed_by, commands))
    script = script_of(name)
    page_of(name).write_text(f"""# {title}

{docstring_of(name)}

![{title}](../figures/{name}.svg)

```console
{console}```

The script is [{script}](../../{script}):

```{{literalinclude}} ../../{script}
:language: python
:start-at: import argparse
```

<!-- `make gallery` writes this page. {digest_of(name)} -->
""")


def index():
    """The page with all figures."""
    page = """# Gallery

Each page shows a script with its output and its figure. A script takes less than two minutes on
two CPU cores. From a clone, first `pip install '.[examples]'`. `--output PATH` writes a figure
elsewhere.
"""
    for name, (title, *_) in GALLERY.items():
        purpose = docstring_of(name).splitlines()[0]
        page += f"""
## [{title}](gallery/{name}.md)

{purpose}

[![{title}](figures/{name}.svg)](gallery/{name}.md)
"""
    toctree = "\n".join(f"gallery/{name}" for name in GALLERY)
    return page + f"\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"


def main():
    """Writes the named pages, or all, and the page with all figures."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    fetch_model(ROOT / ".cache")
    for name in sys.argv[1:] or GALLERY:
        write_page(name)
    (ROOT / "docs/gallery.md").write_text(index())


if __name__ == "__main__":
    main()
