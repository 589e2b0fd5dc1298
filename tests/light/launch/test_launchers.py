"""Launchers of sweeps: other processes, and SLURM through submitit with the four commands of a cluster played here."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.settings import RECORDING_STAGE, composer
from hydra import compose
from hydra.errors import ConfigCompositionException

from tartvg.launch.sweeps import jobs_below

pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra `sweeps`")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra `sweeps`")

CLUSTER = {
    # Runs every task of the array at once, as the node would, and again if asked to; answers like the real command.
    "sbatch": """#!/bin/bash
script="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
cp "$script" "$FAKE_CLUSTER/submission.sh"
for i in $(seq 0 "${last:-0}"); do
  for attempt in 1 2 3; do
    rm -f "$FAKE_CLUSTER/again_42_$i"
    SLURM_JOB_ID=$((43 + i)) SLURM_ARRAY_JOB_ID=42 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 \\
      SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=node1 bash "$script"
    [[ -e "$FAKE_CLUSTER/again_42_$i" ]] || break
  done >"$FAKE_CLUSTER/$i.log" 2>&1 &
done
echo "Submitted batch job 42"
""",
    "srun": """#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == --output || "$1" == --error ]] && shift; shift; done
exec "$@"
""",
    "sacct": """#!/bin/bash
echo "JobID|State|NodeList"
for i in 0 1 2 3; do echo "42_$i|RUNNING|node1"; done
""",
    "scontrol": """#!/bin/bash
[[ "$1" == requeue ]] && touch "$FAKE_CLUSTER/again_$2" && ls "$FAKE_CLUSTER" >"$FAKE_CLUSTER/there_$2"
echo node1
""",
}
WARNED_STAGE = """
import os
import signal
from pathlib import Path

from tartvg.launch.signals import PREEMPTION, Preempted


def run(config):
    saved = Path(os.environ["FAKE_CLUSTER"], f"saved_42_{config.seed}")
    if saved.exists():
        return
    PREEMPTION.listen()  # as a training does when it begins
    try:
        os.kill(os.getpid(), signal.SIGUSR2)  # as SLURM does before the time limit
        signal.pause()
    except Preempted:
        saved.touch()
        raise
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in CLUSTER.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    yield {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_CLUSTER": str(folder)}


def sweep(
    clone: Path, cwd: Path, *arguments: str, stage: str = RECORDING_STAGE, **variables: str
) -> subprocess.CompletedProcess[str]:
    (clone / "tartvg" / "stages.py").write_text(stage)
    environment = {k: v for k, v in os.environ.items() if k not in ("TARTVG_ROOT", "HYDRA_FULL_ERROR")}
    environment |= {"PYTHONPATH": str(clone), **variables}
    command = [sys.executable, str(clone / "run.py"), "sweeps=anchors", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def outcome(cwd: Path) -> dict[str, tuple[str, int | None]]:
    return {folder.name: (job.status, job.exit_code) for folder, job in jobs_below(cwd / "runs")}


def test_launchers_compose_and_a_typo_in_one_is_refused(clone: Path) -> None:
    with composer():
        parallel = compose("config", ["hydra/launcher=parallel"], return_hydra_config=True).hydra.launcher
        slurm = compose("config", ["hydra/launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert parallel._target_.endswith("JoblibLauncher") and parallel.n_jobs == 2
    assert slurm._target_.endswith("SlurmLauncher")
    assert (slurm.gpus_per_node, slurm.timeout_min, slurm.array_parallelism, slurm.partition) == (1, 1440, 8, None)
    for file in ("parallel", "slurm"):
        path = clone / "conf" / "hydra" / "launcher" / f"{file}.yaml"
        path.write_text(path.read_text() + "\nn_jbos: 3\n")
        with composer(clone), pytest.raises(ConfigCompositionException, match="n_jbos"):
            compose("config", [f"hydra/launcher={file}"], return_hydra_config=True)


@pytest.mark.slow
def test_parallel_processes_survive_a_failed_job(clone: Path, tmp_path: Path) -> None:
    done = sweep(clone, tmp_path, "anchors=one,two", "seed=0,1", "hydra/launcher=parallel")
    assert done.returncode == 1, done.stderr
    assert outcome(tmp_path) == {
        "anchors=one,seed=0": ("finished", 0),
        "anchors=one,seed=1": ("failed", 1),
        "anchors=two,seed=0": ("finished", 0),
        "anchors=two,seed=1": ("failed", 1),
    }
    assert "4 jobs" in done.stderr and "2 finished, 2 failed" in done.stderr
    assert "RuntimeError: no luck" in done.stderr


@pytest.mark.slow
def test_a_dry_run_of_slurm_submits_an_array_and_collects_it(
    clone: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    arguments = ("anchors=one,two", "hydra/launcher=slurm", "hydra.launcher.partition=gpu")
    done = sweep(clone, tmp_path, *arguments, "seed=0,1", **cluster)
    script = (Path(cluster["FAKE_CLUSTER"]) / "submission.sh").read_text()
    for line in ("--array=0-3%4", "--gpus-per-node=1", "--partition=gpu", "--time=1440", "--mem=64GB", "@300"):
        assert line in script, script
    assert done.returncode == 1, done.stderr
    assert {name: code for name, (_, code) in outcome(tmp_path).items()} == {
        "anchors=one,seed=0": 0,
        "anchors=one,seed=1": 1,
        "anchors=two,seed=0": 0,
        "anchors=two,seed=1": 1,
    }
    seen = json.loads((tmp_path / "runs" / "anchors" / "anchors=two,seed=0" / "seen.json").read_text())
    assert seen == [2, 0]


@pytest.mark.slow
def test_a_job_that_slurm_warns_is_saved_then_requeued_and_goes_on(
    clone: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    arguments = ("anchors=one", "seed=0,1", "hydra/launcher=slurm")
    done = sweep(clone, tmp_path, *arguments, stage=WARNED_STAGE, **cluster)
    folder = Path(cluster["FAKE_CLUSTER"])
    assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in folder.glob("*.log"))
    assert "--signal=USR2@300" in (folder / "submission.sh").read_text()
    assert outcome(tmp_path) == {f"anchors=one,seed={seed}": ("finished", 0) for seed in (0, 1)}
    for seed in (0, 1):
        there = (folder / f"there_42_{seed}").read_text().split()
        assert f"saved_42_{seed}" in there, "requeueing ends a job: it comes after the saving"
