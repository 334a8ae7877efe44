"""Blocks are independent: the operator keeps the sharding that arrives and communicates nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def reports():
    program = Path(__file__).with_name("sharded_prox.py")
    # What becomes of shardings is decided before machine code is made, which need not be fast.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    outcome = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        cwd=program.parents[1],
        env=environment,
    )
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)


def test_every_function_ran_on_every_mesh(reports):
    assert {report["axes"] for report in reports} == {"Auto", "Explicit", "Manual"}
    assert len(reports) == 1 + 2 * (4 * 2 + 5)


def test_the_sharding_that_arrives_is_kept(reports):
    assert [report for report in reports if not report["kept"]] == []


def test_the_compiled_programs_hold_no_collective(reports):
    assert [report for report in reports if report["collectives"]] == []


def test_the_result_is_that_of_one_device(reports):
    assert [report for report in reports if report["error"] > 1e-5] == []
