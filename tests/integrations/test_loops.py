import pytest
from printed import assert_documented, losses
from programs import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("package", "name"), [("equinox", "equinox_loop"), ("flax", "nnx_loop")])
def test_an_interrupted_run_ends_with_the_same_pruned_weights(package, name):
    pytest.importorskip(package)
    output = run(f"examples/{name}.py")
    assert output.startswith("the interrupted run ends with the same weights: True\n")
    found = losses(output)
    assert found["tuned"] < found["pruned"] < found["half"]
    assert_documented(output)
