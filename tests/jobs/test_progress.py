"""Progress for people and for programs: the bar, the lines of a log, figures."""

import io
import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prox24._jobs.progress import metric, progress_bar, written_logs

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp.up", "mlp.down")]


def test_a_line_for_each_layer_after_its_last_linear(tmp_path):
    lines = tmp_path / "log.txt"
    with written_logs(lines, None), progress_bar("prune", NAMES, True) as advance:
        for i, name in enumerate(NAMES):
            advance(name, i / 10)
            written = lines.read_text().splitlines() if lines.exists() else []
            assert len(written) == (i + 1) // 2
    stamp, clock, *said = written[1].split()
    assert (len(stamp), len(clock)) == (10, 8)
    assert " ".join(said[:6]) == "prune 2/3 layers.1, loss 0.2500, 0:00:00"


def test_a_line_says_what_has_passed_and_what_is_left(monkeypatch, caplog):
    seconds = iter([0, 60, 90, 180])  # at the start, and at the end of each layer
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("prox24._jobs.progress.time", clock)
    caplog.set_level(logging.INFO, "prox24")
    with progress_bar("prune", NAMES, True) as advance:
        for name in NAMES:
            advance(name, None)
    assert [line.partition(", ")[2] for line in caplog.messages] == [
        "0:01:00 elapsed, 0:02:00 left",
        "0:01:30 elapsed, 0:00:45 left",
        "0:03:00 elapsed, 0:00:00 left",
    ]


def test_a_run_that_goes_on_counts_the_layers_before(tmp_path):
    lines = tmp_path / "log.txt"
    lines.write_text("before\n")
    with written_logs(lines, None), progress_bar("prune", NAMES, True, done=NAMES[:3]) as advance:
        for name in NAMES[3:]:
            advance(name, 0.25)
    said = [line.split()[3:7] for line in lines.read_text().splitlines()[1:]]
    # The run does not know the losses of the first steps of layer 1.
    assert said[0][:2] == ["2/3", "layers.1,"]
    assert "loss" not in said[0]
    assert said[1] == ["3/3", "layers.2,", "loss", "0.2500,"]


def test_without_names_each_step_is_a_line_and_some_jobs_have_none(caplog):
    caplog.set_level(logging.INFO, "prox24")
    with progress_bar("eval", 2, True) as advance:
        advance("layer 0", None)
        advance("layer 1", None)
    with progress_bar("check", NAMES, True, log=False) as advance:
        advance(NAMES[0], None)
    assert [" ".join(line.split()[:4]) for line in caplog.messages] == [
        "eval 1/2 layer 0,",
        "eval 2/2 layer 1,",
    ]


def test_figures_are_one_object_a_line_and_only_the_first_process_writes(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with written_logs(None, path):
        metric("linear", {"name": "a", "loss": math.nan})
    metric("linear", {"name": "b"})
    monkeypatch.setattr("prox24._jobs.progress.is_first", lambda: False)
    with written_logs(None, path):
        metric("linear", {"name": "c"})
    (found,) = map(json.loads, path.read_text().splitlines())
    assert found.pop("time") > 1e9
    assert found == {"event": "linear", "name": "a", "loss": None}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_log_on_a_full_disk_is_one_line_and_ends_no_job(capsys):
    with written_logs(Path("/dev/full"), None):
        for _ in range(3):
            logging.getLogger("prox24").info("inside")
    said = "prox24: cannot write /dev/full: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == said


def test_a_handler_of_the_root_logger_does_not_write_each_line_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with written_logs(tmp_path / "log.txt", None):
        logging.getLogger("prox24").info("inside")
    logging.getLogger("prox24").warning("after")
    assert (tmp_path / "log.txt").read_text().endswith(" inside\n")
    assert caplog.messages == ["after"]


@pytest.mark.parametrize("width", [80, 200])
def test_a_narrow_terminal_shortens_names_and_no_numbers(monkeypatch, width):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    name = "model.layers.123.mlp.experts.gate_up_projection_of_all_experts.weight"
    names = [f"{name}{i}" for i in range(1234)]
    with progress_bar("prune", names, False, done=names[:1000]) as advance:
        for each in names[1000:1100]:
            advance(each, 0.01234)
    shown = sys.stderr.getvalue()
    assert "1100/1234" in shown
    assert "loss 0.0123" in shown
    assert "123.mlp.experts.gate" in shown
    assert ("all_experts" in shown) == (width == 200)
