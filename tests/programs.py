"""Programs that need a process of their own; those beside the tests print JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def use_eight_devices():
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def largest_difference(found, expected):
    """Over the largest of what is expected."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def collectives_of(compiled):
    text = compiled.as_text()
    return [name for name in COLLECTIVES if name in text]


def run(*command, **environment):
    """What Python prints, with these arguments."""
    outcome = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=600,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def output_of(name, *arguments, **environment):
    """What a program beside the tests prints.

    What becomes of shardings is decided before machine code is made, which need not be fast.
    """
    program = Path(__file__).with_name(name)
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return json.loads(run(program, *arguments, **(quick | environment)))
