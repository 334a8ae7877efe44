"""Several processes on this machine prune as one does, and end together."""

import functools
import json
import os
import signal
import socket
import time

import killed
import pytest
from commands import calibrated, write_workspace
from tiny import assert_same, load_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    # All linears have one shape to compile.
    return write_workspace(folder, dtype="bfloat16", shards=2, intermediate_size=32)


@pytest.fixture(scope="module")
def start(workspace):
    """Starts processes that prune together."""

    def start(destination, method, *own_options, devices=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        together = []
        for index, own in enumerate(own_options):
            arguments = ["prune", workspace / "model", workspace / destination, "--quiet", *own]
            arguments += ["--method", method, *calibrated(workspace)]
            arguments += ["--report", workspace / f"{destination}.json"]
            if len(own_options) > 1:
                arguments += ["--distributed", "--coordinator", address]
                arguments += ["--num-processes", len(own_options), "--process-id", index]
            places = [workspace / "compiled", workspace / f"{destination}-{index}.txt"]
            together.append(start_one([*map(str, arguments)], *map(str, places), devices))
        return together

    with killed.processes() as start_one:
        yield start


def ended(processes):
    """Exit codes; of a process that does not end by itself, None."""
    for process in processes:
        process.join(90)
    return [process.exitcode for process in processes]


def said(workspace, destination, index):
    return (workspace / f"{destination}-{index}.txt").read_text()


def pruned(workspace, destination):
    """The tensors and the report that a run wrote."""
    report = json.loads((workspace / f"{destination}.json").read_text())
    return load_folder(workspace / destination), report


@pytest.fixture(scope="module")
def alone(workspace, start):
    """Tells what one process writes by a method.

    The iterations of ADMM make another mask of another rounding, and the devices of two processes
    round as two devices of one.
    """
    devices = {"wanda": 1, "admm": 2}

    @functools.cache
    def alone(method, *options):
        destination = "-".join(["alone", method, *options])
        assert ended(start(destination, method, options, devices=devices[method])) == [0]
        return pruned(workspace, destination)

    return alone


def assert_the_same(ours, expected):
    """The tensors, and the losses up to the order in which devices add their tokens."""
    (tensors, report), (others, other_report) = ours, expected
    assert_same(tensors, others)
    for linear, other in zip(report["linears"], other_report["linears"], strict=True):
        assert (linear["name"], linear["tokens"]) == (other["name"], other["tokens"])
        # A Gram is a sum over the tokens in float32.
        rel = linear["tokens"] * 2.0**-24
        assert linear["relative_loss"] == pytest.approx(other["relative_loss"], rel=rel)


@pytest.mark.parametrize(
    ("count", "method", "options"),
    [(2, "admm", ()), (2, "admm", ("--shard-grams",)), (4, "wanda", ())],
)
def test_several_processes_write_what_one_does(workspace, start, alone, count, method, options):
    destination = "-".join([method, str(count), *options])
    assert ended(start(destination, method, *[options] * count)) == [0] * count
    assert_the_same(pruned(workspace, destination), alone(method, *options))
    assert not (workspace / f"{destination}.unfinished").exists()


@pytest.mark.parametrize(("victim", "place"), [(0, "memory"), (1, "disk")])
def test_a_killed_process_ends_the_others_and_the_rerun_goes_on(
    workspace, start, alone, victim, place
):
    destination, options = f"killed-{victim}", ["--activations", place]
    processes = start(destination, "wanda", options, options)
    journal = workspace / f"{destination}.unfinished" / "journal.jsonl"
    while processes[victim].is_alive() and not (
        journal.exists() and journal.read_text().count("\n") >= 8
    ):
        time.sleep(0.001)
    os.kill(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    codes = ended(processes)
    assert time.monotonic() - began < 60
    assert codes[victim] == -signal.SIGKILL
    # JAX's own thread may be the first to notice, and aborts with a message of its own.
    assert codes[1 - victim] in (2, -signal.SIGABRT)
    if codes[1 - victim] == 2:
        printed = said(workspace, destination, 1 - victim)
        assert "prox24: error: another process has ended" in printed
        assert printed.count("\n") == 1
    assert not (workspace / destination).exists()

    assert ended(start(destination, "wanda", options, options)) == [0, 0]
    result = pruned(workspace, destination)
    assert result[1]["resumed_linears"] >= 8  # of 14, in the second of two layers
    assert_the_same(result, alone("wanda"))


def test_processes_with_different_commands_are_refused(workspace, start):
    processes = start("different", "wanda", [], ["--damping", "0.5"])
    assert ended(processes) == [2, 2]
    for index in range(2):
        assert "the processes differ in arguments" in said(workspace, "different", index)
    assert not (workspace / "different").exists()


def test_the_first_process_prints_json_and_the_others_print_nothing(workspace, start):
    assert ended(start("printed", "wanda", ["--json"], ["--json"])) == [0, 0]
    first, second = ((workspace / f"printed-{index}.out").read_text() for index in range(2))
    assert json.loads(first) == json.loads((workspace / "printed.json").read_text())
    assert second == ""
