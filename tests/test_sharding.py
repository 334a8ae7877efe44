"""Rows of a weight and windows of a text are independent: eight devices do what one does.

And where they share the columns of a weight and its Gram.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from programs import output_of

from prox24._core.placement import common_mesh, one_axis
from prox24._pruning.grams import GramSum, add

SCALARS = {"f32[]", "s32[]", "pred[]"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return output_of("sharded_solve.py", tmp_path_factory.mktemp("sharded") / "model")


@pytest.fixture
def solvers(reports):
    found = [report for report in reports if "solver" in report]
    assert {report["axes"] for report in found} == {"Auto", "Explicit"}
    assert len(found) == 2 * 5
    return found


@pytest.fixture
def models(reports):
    found = [report for report in reports if "loss" in report and "devices" in report]
    assert [(report["devices"], report["shard_grams"]) for report in found] == [
        (2, False),
        (8, True),
        (8, False),
    ]
    return found


def test_the_sharding_of_the_rows_is_kept(solvers):
    assert [report for report in solvers if not report["kept"]] == []


def test_loops_communicate_at_most_one_scalar_for_their_stop_test(solvers):
    for report in solvers:
        for loop in report["loops"]:
            assert len(loop) <= 1, report
            assert all(kind == "all-reduce" and shape in SCALARS for shape, kind in loop), report


def test_loops_within_loops_do_not_communicate(solvers):
    communicating = {report["solver"] for report in solvers if report["inner"]}
    assert communicating == {"wanda, swaps"}  # whose passes have a stop test each


def test_outside_of_loops_only_scalars_are_reduced(solvers):
    for report in solvers:
        for shape, kind in report["outside"]:
            assert kind == "all-reduce", report
            assert set(shape.strip("()").split(", ")) <= SCALARS, report


def test_some_loop_has_a_stop_test_that_is_reduced(solvers):
    stopping = {report["solver"] for report in solvers if any(report["loops"])}
    assert stopping == {"wanda, swaps", "prox", "admm, cg"}


def test_solvers_find_what_they_find_on_one_device(solvers):
    for report in solvers:
        assert report["sparse"], report
        assert report["same_blocks"] >= 0.9999, report
        # Conjugate gradients stop where the loss is flat, along which rounding moves weights more.
        flat = report["solver"] in ("wanda, swaps", "admm, cg")
        assert report["weights"] <= (1e-3 if flat else 1e-5), report
        assert abs(report["loss"]) <= 1e-5, report


def test_devices_that_share_columns_find_what_one_finds(reports):
    found = [report for report in reports if "columns" in report and "loss" in report]
    assert len(found) == 3
    for report in found:
        assert report["kept"], report
        assert report["sparse"], report
        assert report["same_blocks"] >= 0.9999, report
        assert report["weights"] <= 1e-3, report
        assert abs(report["loss"]) <= 1e-5, report


def test_devices_that_share_columns_send_rows_of_a_gram_or_tokens_and_never_a_gram(reports):
    solving = [report for report in reports if report.get("width") == 576]
    assert [report["columns"] for report in solving] == ["Auto", "Explicit"]
    for report in solving:
        sizes = {size for loop in report["sent"] for shape, _ in loop for size in matrices(shape)}
        # A block of a Gram, the weight, and places on the diagonal.
        assert sizes <= {"192,576", "600,576", "576,2", "576,1", "1,1"}, report
        sweeps = [loop for loop in report["sent"] if any("192,576" in s for s, _ in loop)]
        # The inverse of the Gram, and those of the steps.
        assert [kind for loop in sweeps for _, kind in loop] == ["all-gather"] * 2, report
    (summing,) = (report for report in reports if "summed" in report)
    (part,) = (loop for loop in summing["sent"] if loop)
    assert [matrices(shape) for shape, _ in part] == [["256,1024"] * 2]


def matrices(shape):
    return re.findall(r"\[(\d+,[\d,]+)\]", shape)


def test_each_of_eight_devices_sums_its_columns_of_a_gram(reports):
    (report,) = (report for report in reports if "summed" in report)
    assert report["summed"] <= 1e-6
    assert report["tokens"] == 2048
    assert report["columns"] == [1024, 128]


def test_grams_stay_where_their_columns_were(reports):
    # Those of four inputs, and as many cross-Grams.
    assert [report["gathered"] for report in reports if "gathered" in report] == [[True] * 8]


def test_what_devices_that_share_columns_hold_is_estimated(reports):
    (report,) = (report for report in reports if "planned" in report)
    assert report["planned"] == "model.layers.0.mlp.down_proj.weight"
    assert 0.9 <= report["planned_solving"] <= 1.5
    assert 0.9 <= report["planned_gathering"] <= 1.5


def test_a_model_is_pruned_alike_on_one_two_and_eight_devices(models):
    for report in models:
        assert report["sparse"], report
        assert report["tokens"], report
        assert report["same_blocks"] >= 0.9999, report
        # Columns on several devices change the order of the sums of conjugate gradients.
        assert report["weights"] <= (1e-4 if report["shard_grams"] else 1e-5), report
        assert report["loss"] <= 1e-5, report


def test_rows_and_windows_that_eight_does_not_divide_are_copied_or_go_to_fewer_devices(reports):
    assert {"copied": [False, True], "odd": 6} in reports


def test_a_model_is_distilled_alike_on_one_and_eight_devices(reports):
    found = [report for report in reports if "distilled" in report]
    assert [report["tensor"] for report in found] == [1, 4]
    for report in found:
        assert report["distilled"] == "improved"
        assert report["compiled"] == 1  # of the first step and those that follow
        assert report["losses"] <= 1e-5
        assert report["same_zeros"]
        assert report["weights"] <= 1e-5
        assert report["largest_share"] == 1 / 8  # of weights, moments and the best weights
    assert {"went_on": True} in reports


def test_devices_that_share_heads_send_no_whole_weight(reports):
    found = [report for report in reports if "gradients" in report]
    assert all(report["gradients"] <= 1e-5 for report in found)
    sent = [(r["variant"], r["tensor"], r["whole_weights_sent"]) for r in found]
    assert sent[:2] == [("llama1", 1, True), ("llama1", 4, False)]
    assert [variant for variant, _, _ in sent[2:]] == ["phi3"]  # whose linears are fused
    assert all(report["largest_share"] == 1 / 8 for report in found)
    (refused,) = (report for report in reports if "refused" in report)
    assert refused["exit"] == 2
    assert "8 devices do not divide the 4 key-value heads of layer 0" in refused["refused"]


def test_a_layer_is_refined_alike_on_one_and_two_devices(reports):
    (report,) = (report for report in reports if "refined" in report)
    assert report["refined"] == ["improved"] * 2
    assert set(report["shared_by"]) == {None, 2}
    assert report["weights"] <= 1e-4
    assert {"own_windows": 1 / 8} in reports


def test_the_same_call_gives_the_same_bytes_on_eight_devices(reports):
    assert [report["again"] for report in reports if "again" in report] == [True]


def test_a_layer_and_its_grams_are_computed_without_communication(reports):
    assert [report["gathering"] for report in reports if "gathering" in report] == [[]]


def test_a_sum_does_not_depend_on_the_order_of_its_terms():
    generator = np.random.default_rng(0)
    terms = generator.standard_normal((64, 100)) * np.logspace(-3, 3, 64)[:, None]

    def summed(order):
        grams = [GramSum(jnp.float32(terms[i]), jnp.zeros(100, jnp.float32), 1) for i in order]
        total = grams[0]
        for gram in grams[1:]:
            total = add(total, gram)
        return np.asarray(total.total)

    exact = terms.astype(np.float32).astype(np.float64).sum(axis=0).astype(np.float32)
    np.testing.assert_array_equal(summed(range(64)), exact)
    np.testing.assert_array_equal(summed(reversed(range(64))), exact)


def test_a_machine_with_one_device_has_no_mesh_and_a_mesh_has_one_automatic_axis():
    assert common_mesh(7) is None
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = one_axis(Mesh(devices, ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2))
    assert mesh.axis_names == ("devices",)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
