import pytest
from printed import assert_documented, losses
from programs import run

pytest.importorskip("flax")
pytestmark = pytest.mark.slow


def test_an_interrupted_run_ends_with_the_same_pruned_weights():
    output = run("examples/nnx_loop.py")
    assert output.startswith("the interrupted run ends with the same weights: True\n")
    found = losses(output)
    assert found["tuned"] < found["pruned"] < found["half"]
    assert_documented(output)
