"""The recipes for clusters: composed, and run with stand-ins for the programs that only a cluster has."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT

SBATCH, TORCHRUN = ROOT / "recipes/slurm.sbatch", ROOT / "recipes/torchrun.sh"


@pytest.fixture
def cluster(tmp_path):
    """`srun` that runs its command once, `scontrol` that notes what it is asked, and a program of one's own."""
    programs = {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": f'echo "$@" > {tmp_path}/asked',
    }

    def make(program, **environment):
        for name, text in {**programs, "program": program}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHON": "program", "SLURM_JOB_ID": "17", **environment}

    return make


@pytest.mark.parametrize("path", [SBATCH, TORCHRUN])
def test_scripts_are_bash(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "2"}])
def test_a_job_that_was_asked_to_leave_is_requeued(cluster, tmp_path, array):
    environment = cluster(f'echo "$@" > {tmp_path}/given; exit 75', **array)
    result = subprocess.run(["bash", SBATCH, "stage=grpo1", "name=a b"], env=environment, timeout=60)
    assert result.returncode == 0
    assert (tmp_path / "asked").read_text() == ("requeue 4_2\n" if array else "requeue 17\n")
    assert (tmp_path / "given").read_text() == "run.py stage=grpo1 name=a b\n"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_any_other_end_is_an_end(cluster, tmp_path, code):
    result = subprocess.run(["bash", SBATCH], env=cluster(f"exit {code}"), timeout=60)
    assert result.returncode == code and not (tmp_path / "asked").exists()


def test_a_signal_to_the_script_reaches_the_run(cluster, tmp_path):
    environment = cluster(f"trap 'exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done")
    process = subprocess.Popen(["bash", SBATCH], env=environment)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_slurm_warns_early_enough_and_never_starts_a_job_anew_over_its_output():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SBATCH.read_text(), re.MULTILINE))
    name, seconds = options["signal"].split("@")
    assert name == "USR1" and int(seconds) >= 60
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["gpus-per-node"] == options["ntasks-per-node"]


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 4), (2, 8)])
def test_torchrun_gets_every_machine_and_the_run_its_settings(tmp_path, nodes, gpus):
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {**os.environ, "TORCHRUN": str(tmp_path / "torchrun"), "NODES": str(nodes), "GPUS": str(gpus),
                   "NODE_RANK": str(nodes - 1), "MASTER": "10.0.0.1"}  # fmt: skip
    result = subprocess.run(
        [TORCHRUN, "trainer=zero3", "stage=grpo1"], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [
        f"--nnodes={nodes}", f"--nproc-per-node={gpus}", f"--node-rank={nodes - 1}", "--master-addr=10.0.0.1",
        "--master-port=29500", "run.py", f"trainer.devices={gpus}", f"trainer.num_nodes={nodes}", "trainer=zero3",
        "stage=grpo1",
    ]  # fmt: skip


def commands():
    """The settings that the recipes show."""
    shown = []
    for path in (SBATCH, TORCHRUN):
        for line in path.read_text().splitlines():
            found = re.findall(r"(?<=\s)[a-z_.]+=[\w.]+", line) if "policy=" in line else []
            if found:
                shown.append(found)
    return shown


@pytest.mark.parametrize("overrides", commands(), ids=" ".join)
def test_the_settings_of_the_recipes_compose(overrides):
    from test_stages import composed

    config = composed(overrides)
    assert config.trainer.devices * config.trainer.num_nodes > 1 and config.trainer.strategy.value != "single"


def test_the_recipes_cover_what_they_promise():
    sizes = set()
    for line in SBATCH.read_text().splitlines():
        if match := re.match(r"#   (\d+) +(\d+) +(\d+) +policy=", line):
            total, nodes, gpus = map(int, match.groups())
            assert total == nodes * gpus
            sizes.add(total)
    assert sizes == {4, 8, 16}
