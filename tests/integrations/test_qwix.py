"""The example with Qwix's calibration and masks, and what it builds on."""

import os
import re
import runpy

import jax
import numpy as np
import pytest
from programs import ROOT, run
from reference import assert_close

import prox24

if "REQUIRE_TUNIX" not in os.environ:
    pytest.importorskip("qwix", reason="make test-tunix has it")
import qwix
from flax import nnx
from qwix.contrib import gptq

pytestmark = pytest.mark.slow


def test_example_prunes_by_its_grams_and_trains_under_its_masks():
    output = run("examples/qwix_masks.py")
    default, ours, trained = map(float, re.findall(r"loss ([\d.]+)", output))
    assert trained < ours < default
    assert "0 of 2 leaves to prune are 2:4 along their axes" in output
    assert output.count("it has the pattern along axis 1") == 2
    assert "2 of 2 leaves to prune are 2:4 along their axes" in output
    assert output.endswith("nonzeros are where its masks are: yes\n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("standard_promotion")
def test_its_sum_is_the_gram():
    with jax.enable_x64(False):
        names = runpy.run_path(str(ROOT / "examples/qwix_masks.py"))
        dense = names["network"](nnx.Linear)
        batches = list(np.random.default_rng(0).normal(size=(3, 16, 32)).astype(np.float32))
        rules = [gptq.GptqRule()]
        watched = qwix.quantize_model(dense, gptq.GptqCalibrationProvider(rules), batches[0])
        for batch in batches:
            watched(batch)
        graph, params = nnx.split(dense)
        found = prox24.calibrate(lambda p, x: nnx.merge(graph, p)(x), params, batches)
    for i in names["KERNELS"]:
        gram = found.grams[f"layers/{i}/kernel"].gram[0]
        assert_close(watched.layers[i].kernel_gptq["sum_of_hessian"], gram, 64)
