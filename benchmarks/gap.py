"""How much of the cost of pruning is left after training on more tokens and for more seconds.

The model is SmolLM2-135M-Instruct, pruned to 2:4. The gap is in log-perplexity to the dense model,
on *Emma* and the addresses together. SparseGPT's gap is 1. Tokens are counted in
all training steps. Seconds are of pruning and training, on two CPU cores that also had other work.

- "blocks": the kept weights are trained block by block, in 1, 5 or 18 passes over 64 windows.
- "model": all are trained together, in one pass over 64, 256 or 1,024 windows.
- "heads turned": by today's default. The other lines were measured before heads were turned.
- "blocks, model": five passes over the blocks in shorter steps, and then the model. The last point
  has two passes over 892 windows.
- "distinct text": one pass over the blocks of 320 windows, as `Recipe.best` takes it, and then one
  pass of the model. The last point has 427 windows that the dense model wrote. These seconds are
  of a faster machine.

`benchmarks/refine.py` measured these lines, and more, in hours on two CPU cores. This script only
draws them.
"""

import argparse
from pathlib import Path

import common
import matplotlib
from common import plt
from refine import MEASURED, lines_of

FIGURE = Path(__file__).parents[1] / "docs/figures/gap.svg"
TEXTS = ["austen", "sotu"]
SHOWN = {
    "SparseGPT and refit, model": "sparsegpt + refit + model, rate 0.0005, bfloat16",
    "default, blocks": "admm, dense targets + block, bfloat16",
    "default, model": "admm, dense targets + model, rate 0.0005, bfloat16",
    "heads turned, blocks, model": (
        "heads turned + block, bfloat16, short steps, passes: 5 + model, rate 0.0005, bfloat16"
    ),
    "heads turned, distinct text": (
        "heads turned + block, bfloat16, short steps, windows: 320 + model, rate 0.0002, bfloat16"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="refine.csv")
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the figure is written")
    arguments = parser.parse_args()

    setting = ["seed", "calibration", "evaluation_windows"]
    titles = ["run", "distinct_tokens", *setting, *MEASURED, *TEXTS, "right_answers"]
    lines = lines_of(common.read_rows(arguments.source, titles), TEXTS)
    matplotlib.rcParams["svg.hashsalt"] = "prox24"  # the same file from every run
    figure, panels = plt.subplots(1, 2, figsize=(9, 5), layout="tight", sharey=True)
    print(f"{'trained':28}  {'tokens':>7}  {'seconds':>7}  {'gap':>4}")
    for shown, label in SHOWN.items():
        for tokens, seconds, gap in lines[label]:
            print(f"{shown:28}  {tokens:7.0f}  {seconds:7.0f}  {gap:4.2f}")
        tokens, seconds, gaps = zip(*lines[label], strict=True)
        for axes, places in zip(panels, (tokens, seconds), strict=True):
            thousands = [each / 1000 for each in places]
            axes.plot(thousands, gaps, marker="o", markersize=4, label=shown)
    for axes, title in zip(panels, ("tokens trained on", "seconds"), strict=True):
        axes.set_xlabel(f"{title} (thousands)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gap in log-perplexity (SparseGPT's is 1)")
    panels[0].set_ylim(0, 1)
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
