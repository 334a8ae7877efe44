"""What a learnt basis of the attention heads is worth: layer losses, perplexity, seconds.

    python benchmarks/basis.py --calibration calib_mix.txt --texts austen.txt sotu.txt
    python benchmarks/basis.py --models gemma.gguf FOLDER ...

Every method prunes every model with and without it. Calibration windows are drawn at random by the
seed; evaluation is on the first windows of each text. Losses are the geometric means over layers
of the relative losses of values (v) and of their readers (o), of fused linears where v is a part of
one. A line is appended to FOLDER/basis.csv after each run, and a run that is there already is
skipped. The refined row trains what is kept of each layer, of each text 5 times.
"""

import dataclasses
import tempfile
from pathlib import Path

import common
import numpy as np
from common import positive

import prox24
from prox24 import HeadBasis, Recipe

LENGTH = 512
METHODS = {
    "magnitude": Recipe.magnitude(),
    "wanda": Recipe.wanda(),
    "sparsegpt": Recipe.sparsegpt(),
    "default": Recipe(),
    "default, 300 steps": Recipe(),
    "refined": Recipe.best(5 * LENGTH * 16),
}
VALUES, READERS = ("v_proj", "qkv", "query_key_value", "c_attn"), ("o_proj", "out_proj", "dense")


def mean_loss(report: prox24._jobs.reports.PruneReport, parts: tuple[str, ...]) -> float:
    losses = [
        linear.statistics.relative_loss
        for linear in report.linears
        if linear.name.split(".")[-2].endswith(parts)
    ]
    return float(np.exp(np.mean(np.log(losses)))) if losses else np.nan
