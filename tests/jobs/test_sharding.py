"""Rows, columns and windows that eight devices share give what one device gives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from programs import output_of
from tiny import rounding

from prox24._core.placement import common_mesh, one_axis
from prox24._pruning.grams import GramSum, add

pytestmark = pytest.mark.slow

SCALARS = {"f32[]", "s32[]", "pred[]"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return output_of("sharded_solve.py", tmp_path_factory.mktemp("sharded") / "model")


def with_key(reports, *keys):
    return [report for report in reports if report.keys() >= set(keys)]


@pytest.fixture
def solvers(reports):
    found = with_key(reports, "solver")
    assert [report["axes"] for report in found].count("Explicit") == 1
    assert len(found) == 5 + 1
    return found


def assert_as_on_one_device(report):
    # A product with the Gram rounds by the root of its width, in units of 2^-24.
    rounding = np.sqrt(report["width"]) * 2.0**-24
    assert report["sparse"], report
    # Each of 20 steps does, and two of the scores of a block, of which there are six pairs, may be
    # as near to one another: ten times as many blocks as are to be expected.
    assert report["same_blocks"] >= 1 - 10 * 6 * 20 * rounding, report
    # A solution is off by that times the condition number of the damped Gram.
    assert report["weights"] <= report["condition"] * rounding, report
    assert abs(report["loss"]) <= report["condition"] * rounding, report


def test_solvers_communicate_at_most_one_scalar_for_the_stop_test_of_a_loop(solvers):
    for report in solvers:
        for loop in report["loops"]:
            assert len(loop) <= 1, report
            assert all(kind == "all-reduce" and shape in SCALARS for shape, kind in loop), report
        for shape, kind in report["outside"]:
            assert kind == "all-reduce", report
            assert set(shape.strip("()").split(", ")) <= SCALARS, report
    stopping = {report["solver"] for report in solvers if any(report["loops"])}
    assert stopping == {"wanda, swaps", "prox", "admm, cg"}
    # Of loops within loops, the passes of swaps have a stop test each.
    assert {report["solver"] for report in solvers if report["inner"]} == {"wanda, swaps"}


def test_solvers_find_what_they_find_on_one_device(solvers):
    for report in solvers:
        assert report["kept"], report
        assert_as_on_one_device(report)


def test_solvers_find_the_same_inside_of_shard_map(reports):
    found = with_key(reports, "mapped")
    assert len(found) == 5 + 2
    assert {report["same_blocks"] for report in found} == {1.0}


def test_models_with_explicit_axes_have_the_grams_of_one_device(reports):
    found = with_key(reports, "calibrated")
    assert [report["calibrated"] for report in found] == ["features", "first axis", "auto_axes"]
    for report in found:
        # Sums of 32 products of sums of 16.
        assert report["error"] <= (32 + 2 * 16) * 2.0**-24, report
        assert report["zeros"] == [0.5, 0.5], report


def test_a_weight_without_a_mesh_may_have_inputs_on_explicit_axes(reports):
    found = with_key(reports, "without_mesh")
    assert [report["without_mesh"] for report in found] == [[1.0, 1.0]] * 2


def test_descent_with_explicit_axes_finds_the_minimum_and_its_derivative(reports):
    found = with_key(reports, "descended")
    assert len(found) == 2
    for report in found:
        assert report["in_place"], report
        # Near a minimum the inverse Hessian is below 8.
        assert report["error"] <= 2 * 8 * report["tolerance"], report
        own, alone = report["slopes"]
        assert abs(own - alone) <= 1e-3 * abs(alone), report


def test_bases_and_divergences_with_explicit_axes_are_those_of_one_device(reports):
    found = with_key(reports, "turned")
    assert len(found) == 2
    for report in found:
        assert report["in_place"], report
        # A head has 8 members, and a sum of 8 rounded products is of unit vectors and rows.
        assert report["error"] <= 8 * np.sqrt(8) * 2.0**-24, report
        own, alone = report["objectives"]
        # Grams of condition 10 and width 64; 5 steps.
        assert abs(own - alone) <= 5 * 10 * 64 * 2.0**-24 * alone, report
        # A dozen operations on logits, relative to a divergence; both sides round.
        rounding = 2 * 12 * (1 + report["scale"]) * 2.0**-24
        assert max(report["divergences"]) <= rounding, report


def test_weights_of_three_axes_stay_on_their_devices(reports):
    found = with_key(reports, "on_axes")
    assert [report["on_axes"] for report in found] == ["Explicit", "Auto"]
    for report in found:
        assert report["same_mask"], report
        assert report["in_place"] == [True, True], report
        assert report["zeros"] == 0.5, report


def test_devices_that_share_columns_find_what_one_finds(reports):
    found = with_key(reports, "columns", "loss")
    assert [report["columns"] for report in found] == ["Explicit", "Auto"]
    for report in found:
        assert report["kept"], report
        assert_as_on_one_device(report)


def test_devices_that_share_columns_send_rows_of_a_gram_or_tokens_and_never_a_gram(reports):
    (report,) = (each for each in with_key(reports, "columns") if each.get("width") == 576)
    sizes = {size for loop in report["sent"] for shape, _ in loop for size in matrices(shape)}
    # A block of a Gram, the weight, and places on the diagonal.
    assert sizes <= {"192,576", "600,576", "576,2", "576,1", "1,1"}, report
    sweeps = [loop for loop in report["sent"] if any("192,576" in s for s, _ in loop)]
    # The inverse of the Gram, and those of the steps.
    assert [kind for loop in sweeps for _, kind in loop] == ["all-gather"] * 2, report
    # Each sums its own columns.
    (summing,) = with_key(reports, "summed")
    (part,) = (loop for loop in summing["sent"] if loop)
    assert [matrices(shape) for shape, _ in part] == [["256,1024"] * 2]
    # The sums over the tokens of a device are of 256 products, and compensated among each other.
    assert summing["summed"] <= np.sqrt(256) * 2.0**-24
    assert (summing["tokens"], summing["columns"]) == (2048, [1024, 128])


def matrices(shape):
    return re.findall(r"\[(\d+,[\d,]+)\]", shape)


def test_what_devices_that_share_columns_hold_is_estimated(reports):
    (report,) = with_key(reports, "planned")
    assert report["planned"] == "model.layers.0.mlp.down_proj.weight"
    assert 0.9 <= report["planned_solving"] <= 1.5
    assert 0.9 <= report["planned_gathering"] <= 1.5
    # Those of four inputs, and as many cross-Grams, stay where their columns were.
    assert report["gathered"] == [True] * 8


def test_devices_free_their_own_grams_before_they_get_the_sum(reports):
    # A device keeps its eighth of the sum, and counts of tokens.
    assert [report["freed"] for report in with_key(reports, "freed")] == [
        pytest.approx(1 / 8, abs=1e-3)
    ]


def test_a_model_is_pruned_alike_on_one_two_and_eight_devices(reports):
    found = with_key(reports, "loss", "devices")
    shared = [(report["devices"], report["shard_grams"]) for report in found]
    assert shared == [(2, False), (8, True), (8, False)]
    for report in found:
        assert report["tokens"], report
        assert_as_on_one_device(report)
    # The same call gives the same bytes, and a layer and its Grams need no communication.
    assert [report["again"] for report in with_key(reports, "again")] == [True]
    assert [report["gathering"] for report in with_key(reports, "gathering")] == [[]]


def test_rows_and_windows_that_eight_does_not_divide_are_copied_or_go_to_fewer_devices(reports):
    assert {"copied": [False, True], "odd": 6} in reports


def test_a_model_is_distilled_alike_on_one_and_eight_devices(reports):
    found = with_key(reports, "distilled")
    assert [report["tensor"] for report in found] == [1, 4]
    for report in found:
        assert report["distilled"] == "improved"
        assert report["compiled"] == 1  # of the first step and those that follow
        assert report["same_zeros"]
        # Of what the training changes; Adam makes steps also of gradients that are mere rounding.
        assert max(report["losses"], report["weights"]) <= 0.01
        assert report["largest_share"] == 1 / 8  # of weights, moments and the best weights
    assert {"went_on": True} in reports


def test_devices_that_share_heads_send_no_whole_weight(reports):
    found = with_key(reports, "gradients")
    # Two layers, forwards and backwards, and sums over 8 x 16 tokens.
    assert all(report["gradients"] <= rounding(1.0, layers=4, width=128) for report in found)
    assert all(report["largest_share"] == 1 / 8 for report in found)
    sent = [(r["variant"], r["tensor"], r["whole_weights_sent"]) for r in found]
    assert sent[:2] == [("llama1", 1, True), ("llama1", 4, False)]
    assert [variant for variant, _, _ in sent[2:]] == ["phi3"]  # whose linears are fused
    refused = "8 devices do not divide the 4 key-value heads of layer 0"
    assert [report["refused"] for report in with_key(reports, "refused")] == [refused]


def test_a_layer_is_refined_alike_on_one_and_two_devices(reports):
    (report,) = with_key(reports, "refined")
    assert report["refined"] == ["improved"] * 2
    assert set(report["shared_by"]) == {None, 2}
    assert report["weights"] <= 0.01  # of what the training changes
    assert {"own_windows": 1 / 8} in reports


def test_a_sum_does_not_depend_on_the_order_of_its_terms():
    generator = np.random.default_rng(0)
    terms = generator.standard_normal((64, 100)) * np.logspace(-3, 3, 64)[:, None]
    terms = terms.astype(np.float32)
    grams = [GramSum(jnp.asarray(term), jnp.zeros(100, jnp.float32), 1) for term in terms]
    exact = terms.astype(np.float64).sum(axis=0).astype(np.float32)
    for order in (grams, grams[::-1]):
        np.testing.assert_array_equal(functools.reduce(add, order).total, exact)


def test_a_machine_with_one_device_has_no_mesh_and_a_mesh_has_one_automatic_axis():
    assert common_mesh(7) is None
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = one_axis(Mesh(devices, ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2))
    assert mesh.axis_names == ("devices",)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
