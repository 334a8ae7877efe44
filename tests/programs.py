"""Programs beside the tests that need a process of their own, and print JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path


def output_of(name, *arguments, **environment):
    """What a program prints.

    What becomes of shardings is decided before machine code is made, which need not be fast.
    """
    program = Path(__file__).with_name(name)
    outcome = subprocess.run(
        [sys.executable, program, *arguments],
        capture_output=True,
        text=True,
        cwd=program.parents[1],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | environment,
    )
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)
