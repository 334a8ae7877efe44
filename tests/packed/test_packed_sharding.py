"""Packed weights keep the sharding that arrives, and shards of them are multiplied in place."""

import shutil

import pytest
from programs import output_of
from reference import eps_of

from prox24.packed._kernels import native

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports():
    return {report["name"]: report for report in output_of("sharded_packed.py")}


def test_every_function_ran_under_every_sharding_as_on_one_device(reports):
    assert len(reports) == 2 * 2 * 2 + (2 + 1) * 2 + 5
    # Those of a sum of 256 terms add like a root. A gradient takes cosines of sums eight times as
    # large as they are.
    rounding = 8 * 256**0.5 * eps_of("float32")
    assert {name: r["error"] for name, r in reports.items() if not r["error"] <= rounding} == {}


def test_packing_and_unpacking_keep_the_sharding_and_communicate_nothing(reports):
    formats = {name: r for name, r in reports.items() if "pack" in name.split(",")[0]}
    assert [name for name, r in formats.items() if not r["kept"] or r["collectives"]] == []


def test_products_communicate_sums_over_shards_of_columns_alone(reports):
    products = {name: r["collectives"] for name, r in reports.items() if name.startswith("matmul")}
    assert products == {name: ["all-reduce"] * ("columns" in name) for name in products}


def test_the_kernel_runs_in_shard_map_and_in_no_program_that_xla_partitions(reports):
    if not any(shutil.which(name) for name in native.CPP_COMPILERS):
        pytest.skip("there is no C++ compiler")
    with_kernel = {name for name, report in reports.items() if report["kernel"]}
    assert with_kernel == {
        f"{what}, shard_map, {label}"
        for what in ("matmul", "gradients")
        for label in ("rows", "columns")
    }
