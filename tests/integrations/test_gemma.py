"""The example with Google's gemma library."""

import importlib.util
import os
import re

import pytest
from programs import run

if importlib.util.find_spec("gemma") is None and "REQUIRE_GEMMA" not in os.environ:
    pytest.skip("make test-gemma has gemma", allow_module_level=True)
pytestmark = pytest.mark.slow


def test_every_matrix_of_gemma_is_pruned_along_its_inputs():
    output = run("examples/gemma_prune.py")
    wanda, default = map(float, re.findall(r"^(?:wanda|default) +([\d.]+)$", output, re.MULTILINE))
    assert default < wanda
    for line in (
        r"\(2, 2, 64, 16\) +axis 2 .*kv_einsum/w",
        r"\(2, 128, 64\) +axis 2 .*gating_einsum",
    ):
        assert len(re.findall(line, output)) == 2
    assert "10 of 10 leaves to prune are 2:4 along their axes" in output
