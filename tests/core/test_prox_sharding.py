"""Blocks are independent: the operator keeps the sharding that arrives and communicates nothing."""

import pytest
from programs import output_of
from reference import eps_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output():
    return output_of("sharded_prox.py")


@pytest.fixture(scope="module")
def reports(output):
    return [report for report in output if "function" in report]


def test_masks_are_placed_like_their_leaves_and_cut_blocks_are_named(output):
    automatic, explicit = (report for report in output if "masks" in report)
    assert automatic["placed"]
    assert explicit["placed"]
    assert not explicit["sparse"]
    assert explicit["said"] == (
        "the mesh cuts blocks of 4 along axis 0 of shape (16,): use jax.sharding.reshard first"
    )


def test_every_function_ran_on_every_mesh(reports):
    assert {report["axes"] for report in reports} == {"Auto", "Explicit", "Manual"}
    assert len(reports) == 3 + 2 * (2 * 2 + 5)


def test_the_sharding_that_arrives_is_kept(reports):
    assert [report for report in reports if not report["kept"]] == []


def test_the_compiled_programs_hold_no_collective(reports):
    assert [report for report in reports if report["collectives"]] == []


def test_the_result_is_that_of_one_device(reports):
    # An entry takes M, which the inverse Hessian, below 8, and its derivative grow.
    rounding = 4 * 8 * 4 * eps_of("float32")
    assert [report for report in reports if not report["error"] <= rounding] == []
