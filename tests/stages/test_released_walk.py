"""The released models' path from end to end: a 3B of the real shape with random weights trains, is scored, answers."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import ROOT
from helpers.released import add_tokenizer, write_released
from helpers.settings import QUIET
from interruptions import rows

DISK, MEMORY = 40e9, 16e9
GIB = 2**30


def available_memory():
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint as it is released, with the real tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    if os.environ.get("TARTVG_WALK") != "1":
        pytest.skip("takes five minutes and much memory: TARTVG_WALK=1 asks for it")
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which has the tokenizer")
    if shutil.disk_usage(folder).free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk")
    if available_memory() < MEMORY:
        pytest.skip(f"needs {MEMORY / 1e9:.0f} GB of free memory")
    base = folder / "3B"
    base.mkdir()
    try:
        add_tokenizer(base)
    except OSError as error:
        pytest.skip(f"the tokenizer could not be had: {error}")
    write_released(base, "qwen2_5_vl_3b")
    yield base
    shutil.rmtree(base)


def run(folder, *overrides):
    """run.py in an interpreter of its own: what it said, its seconds, CPU seconds and peak memory in bytes."""
    said = folder / "said"
    begun = time.monotonic()
    with said.open("wb") as output:
        process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *overrides], stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    text = said.read_text()
    assert process.returncode == 0, text[-3000:]
    return text, time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


@pytest.mark.campaign
def test_a_3b_trains_is_scored_and_answers(released, tmp_path):
    """Two steps of two prompts with two rollouts of eight tokens, in bf16 on the CPU."""
    common = [
        "policy=qwen2_5_vl_3b", f"policy.path={released}", "policy.name=random_3b", "trainer=cpu", *QUIET,
        "trainer.num_threads=1", "trainer.progress_bar=false", "tracking=off", f"runs_dir={tmp_path}", "name=walk",
        f"dataset.root={tmp_path / 'data'}", "dataset.planted.num_train=2", "dataset.planted.num_val=1",
        "dataset.planted.num_test=2", "dataset.planted.queries_per_video=1", "policy.frames.max_frames=16",
        "policy.frames.total_pixels=200704", "policy.feature_cache_gib=0.1", "grpo.max_steps=2",
        "grpo.prompts_per_step=2", "grpo.group_size=2", "grpo.sampling.max_new_tokens=8", "evaluate.policies=[grpo1]",
        "evaluate.num_samples=0", "evaluate.num_queries=2", "evaluate.batch_size=2",
    ]  # fmt: skip
    planned, *_ = run(tmp_path, *common, "stage=memory")
    estimate = float(re.search(r"peak +([\d.]+) GiB", planned)[1])
    walked = {}
    for stage in ("grpo1", "evaluate"):
        _, *walked[stage] = run(tmp_path, *common, f"stage={stage}")
    video = next((tmp_path / "data").rglob("*.mp4"))
    answer, *walked["ground"] = run(tmp_path, *common, "stage=ground", f"video={video}", "query=a red circle enters")
    for stage, (seconds, busy, peak) in walked.items():
        print(f"{stage}: {seconds:.0f} s ({busy:.0f} CPU s), peak {peak / GIB:.1f} GiB")
    print(f"stage=memory says {estimate:.1f} GiB for the largest step")
    steps = rows(tmp_path / "walk/grpo1/metrics.jsonl")
    # random weights earn the same everywhere, so the gradient may be zero; what is not finite is null
    assert len(steps) == 2 and all(step["optim/grad_norm"] is not None and step["time/update_s"] > 0 for step in steps)
    assert max(step["rollout/logp_gap"] for step in steps) < 0.1
    assert len(rows(tmp_path / "walk/evaluate/grpo1/predictions.jsonl")) == 2
    assert "film strip" in answer and "grpo1" in answer
    libraries = 1.5 * GIB  # torch, transformers and what else a process has beside the policy
    assert walked["grpo1"][2] <= 1.15 * estimate * GIB + libraries
