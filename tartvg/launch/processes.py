"""Starting one process per device with the same command. No torch.

Every process composes the same settings and runs the same stages; `tartvg.training.distributed` knows its rank.
torchrun and `recipes/slurm.sbatch` set the same variables (RANK and its like), over several nodes too: where they are
set, nothing is started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from tartvg.config import Config, LaunchError, StageName, Strategy, require
from tartvg.launch.signals import REFUSED_CODE, REQUEUE_CODE, SIGNALS

TRAINED = (StageName.grpo1, StageName.sft, StageName.grpo2)
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in the environment of every process, together."""
FORWARDED = SIGNALS
"""Ctrl-C is not among them: the terminal sends it to every process itself."""
GRACE_S = 30.0
"""Seconds that the others get to end by themselves once one process has failed, and again after SIGTERM."""
_PR_SET_PDEATHSIG = 1


def prepare_allocator() -> None:
    """Let CUDA's allocator grow its segments, unless the user has set it up. torch reads it at its import.

    Groups differ in size from step to step: fixed segments of one size are left in pieces that fit no other.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name, which torch reads too
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def is_started() -> bool:
    """Return whether this process is one of several that a launcher started."""
    return all(os.environ.get(name) for name in LAUNCHED)


def is_follower() -> bool:
    """Return whether another process of the run speaks to the user."""
    return is_started() and os.environ["RANK"] != "0"


def refuse_leftovers() -> None:
    """Raise LaunchError where the environment says a part of what a launcher says, or what no launcher says."""
    found = {name: os.environ[name] for name in (*LAUNCHED, "LOCAL_RANK") if os.environ.get(name)}
    said = " ".join(f"{name}={value}" for name, value in found.items())
    ranks = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in found]
    if not ranks:
        return
    advice = f"unset {' '.join(ranks)} if no launcher started this command"
    if not is_started():
        missing = [name for name in LAUNCHED if name not in found]
        raise LaunchError(f"{said} in the environment, but not {', '.join(missing)}: {advice}")
    rank, count = found["RANK"], found["WORLD_SIZE"]
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise LaunchError(f"{said} in the environment: RANK must be below WORLD_SIZE; {advice}")


def is_parallel(config: Config) -> bool:
    """Return whether this command trains with a strategy for several processes (one may be all there is)."""
    stages = config.stage.sequence if config.stage.name is StageName.pipeline else [config.stage.name]
    return config.trainer.strategy is not Strategy.single and bool(set(stages) & set(TRAINED))


def needs_processes(config: Config) -> bool:
    """Return whether this command has to start processes. Over several nodes a launcher does."""
    if not is_parallel(config):
        return False
    vision, trainer = config.policy.lora.vision, config.trainer
    # A process whose videos cannot be decoded takes empty passes, and those do not go through the tower.
    require(not vision, "policy.lora.vision", "false unless trainer.strategy=single", vision)
    if is_started():
        return False
    nodes = trainer.num_nodes
    require(
        nodes == 1, "trainer.num_nodes", "1 unless torchrun or srun starts the processes (recipes/README.md)", nodes
    )
    return trainer.devices > 1


def run_processes(count: int, command: Sequence[str] | None = None) -> int:
    """Run `command` (default: this very one) once per rank; returns the exit code, rank 0's before any other's.

    When a process fails, the others get `GRACE_S` to end and are stopped then. What a cluster sends is handed on.
    The processes die with this one, however it dies.
    """
    command = [sys.executable, *sys.argv] if command is None else list(command)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rank in range(count):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=os.environ | shared | mine, preexec_fn=_die_with_parent))
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    failed_at: float | None = None
    is_told = False
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        if failed_at is None and any(process.returncode for process in processes):
            failed_at = time.monotonic()
        late = 0.0 if failed_at is None else time.monotonic() - failed_at
        for process in processes:
            if late > GRACE_S and not is_told:
                process.terminate()
            if late > 2 * GRACE_S:
                process.kill()
        is_told = is_told or late > GRACE_S
    codes = [process.returncode for process in processes]
    for special in (REQUEUE_CODE, REFUSED_CODE):  # of any process: the others may have failed for want of it
        if special in codes:
            return special
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _die_with_parent() -> None:
    """In the child: SIGINT works again, and the death of the parent kills it (Linux; elsewhere a no-op)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
