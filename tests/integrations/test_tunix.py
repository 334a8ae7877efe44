"""The examples that train by Tunix."""

import os
import re

import pytest
from programs import run

if "REQUIRE_TUNIX" not in os.environ:
    pytest.importorskip("tunix", reason="make test-tunix has it")
pytestmark = pytest.mark.slow


def rows(name):
    """The example's table: the loss of each row, and whether it is 2:4."""
    _, *table = run(f"examples/{name}.py").splitlines()
    cells = (re.split(r" {2,}", line) for line in table)
    return {name: (float(loss), sparse) for name, loss, sparse in cells}


def test_sft_under_keep_pattern_learns_and_stays_sparse():
    found = rows("tunix_sft")
    assert {name: sparse for name, (_, sparse) in found.items()} == {
        "dense": "no",
        "pruned": "yes",
        "AdamW": "no",
        "AdamW under keep_pattern": "yes",
    }
    assert found["AdamW under keep_pattern"][0] < found["pruned"][0] - 0.05


def test_adapters_fill_zeros_unless_they_are_cut():
    found = rows("tunix_lora")
    assert {name: sparse for name, (_, sparse) in found.items()} == {
        "pruned": "yes",
        "adapters merged whole": "no",
        "adapters cut at the merge": "yes",
        "adapters cut in training": "yes",
    }
    assert found["adapters cut in training"][0] < found["adapters cut at the merge"][0]
    assert found["adapters cut at the merge"][0] < found["pruned"][0]
