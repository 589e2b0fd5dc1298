"""The recipes for clusters: composed, and run with stand-ins for the programs that only a cluster has."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from forking import ROOT
from helpers.settings import composed
from interruptions import num_lines

SBATCH, TORCHRUN = ROOT / "recipes/slurm.sbatch", ROOT / "recipes/torchrun.sh"


SRUN = """
while [ "${1#-}" != "$1" ]; do echo "$1"; shift; done > "$0.options"
trap 'kill -TERM "${tasks[@]}"' TERM
for number in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$number SLURM_LOCALID=$((number % (SLURM_NTASKS / SLURM_NNODES))) "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    while :; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
    [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
"""
"""Starts every task with its own numbers, hands SIGTERM on, and ends with the highest code, as the real one does."""
SCONTROL = """
case "$*" in
    "show hostnames $SLURM_JOB_NODELIST") printf 'localhost\\nn2\\n' ;;
    *) echo "$@" > "$0.asked" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path):
    """The variables of a job of one task; stand-ins for `srun` and `scontrol`, and a program in place of Python."""

    def make(program="", **environment):
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "program": program}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}
        path = f"{tmp_path}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHON": "program", **job, **environment}

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
    assert (tmp_path / "scontrol.asked").read_text() == ("requeue 4_2\n" if array else "requeue 17\n")
    assert (tmp_path / "given").read_text() == "run.py stage=grpo1 name=a b\n"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_any_other_end_is_an_end(cluster, tmp_path, code):
    result = subprocess.run(["bash", SBATCH], env=cluster(f"exit {code}"), timeout=60)
    assert result.returncode == code and not (tmp_path / "scontrol.asked").exists()


def test_a_signal_to_the_script_reaches_the_run(cluster, tmp_path):
    environment = cluster(f"trap 'exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done")
    process = subprocess.Popen(["bash", SBATCH], env=environment)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert (tmp_path / "scontrol.asked").read_text() == "requeue 17\n"


def test_every_task_is_told_its_rank_and_where_to_meet(cluster, tmp_path):
    say = f'echo "$LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" > {tmp_path}/rank$RANK'
    job = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_ID": "123456", "SLURM_CPUS_PER_TASK": "6"}
    subprocess.run(["bash", SBATCH], env=cluster(say, **job), timeout=60, check=True)
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(4)]
    assert told == [f"{rank % 2} 4 localhost 13456\n" for rank in range(4)]
    assert "--cpus-per-task=6" in (tmp_path / "srun.options").read_text().split()


@pytest.mark.slow
def test_the_tasks_of_a_job_are_one_run_that_leaves_and_goes_on(cluster, small, untrained_base, tmp_path):
    """Two real processes: they share the steps, write once, and end with the code that the script requeues on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS": "2", "MASTER_PORT": str(port)}
    settings = [
        "trainer=ddp", *small, "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_workers=0",
        "trainer.checkpoint_every=1000", f"policy.path={untrained_base}", "grpo.sampling.max_new_tokens=24",
        "stage=grpo1", f"runs_dir={tmp_path}", "name=r",
    ]  # fmt: skip
    command, environment = ["bash", str(SBATCH), *settings], cluster(**job, OMP_NUM_THREADS="1")
    lines, asked = tmp_path / "r/grpo1/metrics.jsonl", tmp_path / "scontrol.asked"
    process = subprocess.Popen(command, env=environment)
    while not num_lines(lines):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 0 and asked.read_text() == "requeue 17\n"
    done = num_lines(lines)
    assert 1 <= done < 4 and (tmp_path / f"r/grpo1/checkpoints/step_{done:06d}").is_dir()
    asked.unlink()
    assert subprocess.run(command, env=environment, timeout=600).returncode == 0 and not asked.exists()
    steps = [json.loads(line)["progress/step"] for line in lines.read_text().splitlines()]
    assert steps == list(range(4))


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
    config = composed(*overrides)
    assert config.trainer.devices * config.trainer.num_nodes > 1 and config.trainer.strategy.value != "single"


def test_the_recipes_cover_what_they_promise():
    sizes = set()
    for line in SBATCH.read_text().splitlines():
        if match := re.match(r"#   (\d+) +(\d+) +(\d+) +policy=", line):
            total, nodes, gpus = map(int, match.groups())
            assert total == nodes * gpus
            sizes.add(total)
    assert sizes == {4, 8, 16}
