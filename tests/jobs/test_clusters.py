"""The jobs of docs/accelerators.md start processes that find each other, here with CPUs.

A stand-in for `srun` sets the variables of Slurm, and the test those of Kubernetes.
"""

import json
import re
import socket
import subprocess
import sys

import pytest
import yaml
from commands import files, write_workspace
from programs import ROOT

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs/accelerators.md").read_text()
PROX24 = f"""#!/bin/sh
exec {sys.executable} -m prox24 "$@"
"""
SRUN = """#!/bin/sh
test "$1" = --kill-on-bad-exit=1 || exit 64
shift
export SLURM_JOB_ID=$JOB SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $! || { kill $!; exit 1; }
"""


def block(language):
    """The only one of the page."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return text


@pytest.fixture
def small(tmp_path):
    """Makes a command of the page work on a small model."""
    write_workspace(tmp_path, dtype="bfloat16", intermediate_size=32)
    (tmp_path / "text.txt").rename(tmp_path / "calibration.txt")
    for name, text in (("prox24", PROX24), ("srun", SRUN)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def small(command):
        quick = "--samples 8 --sequence-length 32 --method wanda --refit none"
        command = command.replace("--samples 128 --sequence-length 2048", quick)
        return command.replace("/shared", str(tmp_path))

    return small


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return monkeypatch


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def assert_pruned_by_two(folder):
    assert json.loads((folder / "pruned/prox24.json").read_text())["processes"] == 2
    assert "pruned.unfinished" not in files(folder)


def test_the_slurm_script(tmp_path, small, environment):
    # JAX makes the port from the number of the job.
    environment.setenv("JOB", str(free_port()))
    (tmp_path / "job.sh").write_text(small(block("bash")))
    subprocess.run(["bash", tmp_path / "job.sh"], check=True, timeout=300)
    assert_pruned_by_two(tmp_path)
    assert (tmp_path / "report.json").exists()


def test_the_job_of_kubernetes(tmp_path, small, environment):
    service, job = yaml.safe_load_all(block("yaml"))
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    (line,) = container["args"]
    assert f"--num-processes {spec['completions']} " in line
    address = f"{job['metadata']['name']}-0.{pod['subdomain']}:1234"
    assert line.count(address) == 1
    line = small(line.replace(address, f"127.0.0.1:{free_port()}"))
    pods = []
    for index in range(spec["completions"]):
        environment.setenv("JOB_COMPLETION_INDEX", str(index))
        pods.append(subprocess.Popen([*container["command"], line]))
    try:
        assert [pod.wait(300) for pod in pods] == [0] * spec["parallelism"]
    finally:
        for pod in pods:
            pod.kill()
    assert_pruned_by_two(tmp_path)
