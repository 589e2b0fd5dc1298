"""Peak memory of one group's update, in a process of its own.

python -m experiments.efficiency.bench.memory --way naive --group 8 ...

On the CPU it is the largest resident set during the update above the one before it, as the kernel counts it; on a GPU
what torch allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from experiments.efficiency.bench.shapes import SMALL, build_policy, make_prompt, make_tokens
from experiments.efficiency.bench.ways import SETTINGS, Group, spread_advantages, update

MIB = 2**20


def _status(name: str) -> int:
    """A size from /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def peak_bytes(way: str, base: Path, prompt: int, completion: int, group: int, device: str) -> int:
    """Bytes above what the process held before the update. Linux only on the CPU."""
    policy = build_policy(SMALL, base, device=device)
    item, clip = make_prompt(policy, prompt)
    # a smaller group first: what libraries allocate once does not count
    for size, is_measured in ((2, False), (group, True)):
        tokens = make_tokens(policy, item, size, completion)
        work = Group(item, clip, tokens, spread_advantages(size, policy.device))
        policy.zero_grad()
        gc.collect()
        if not is_measured:
            update(policy, work, way)
        elif device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
            before = _status("VmRSS")
            update(policy, work, way)
            return _status("VmHWM") - before
        else:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            update(policy, work, way)
            return torch.cuda.max_memory_allocated() - held
    raise AssertionError("the loop returns")


def measure(way: str, base: Path, prompt: int, completion: int, group: int, device: str = "cpu") -> float:
    """MiB, measured in a new process that gives freed blocks back at once."""
    values = dict(way=way, base=base, prompt=prompt, completion=completion, group=group, device=device)
    arguments = [f"--{name}={value}" for name, value in values.items()]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.efficiency.bench.memory", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the measuring process ended with {done.returncode}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["mib"])


def main() -> None:
    """Print {"mib": peak} for the arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=list(SETTINGS), required=True)
    parser.add_argument("--base", type=Path, required=True)
    for name in ("prompt", "completion", "group"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    peak = peak_bytes(a.way, a.base, a.prompt, a.completion, a.group, a.device)
    print(json.dumps({"mib": peak / MIB}))


if __name__ == "__main__":
    main()
