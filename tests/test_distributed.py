"""Two processes on the CPU, by the command that a user gives, against one process. Needs no GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, start_command
from interruptions import kill_when, num_lines, rows
from safetensors.torch import load_file

from tartvg.config.preemption import REQUEUE_CODE
from tartvg.config.processes import run_processes

OPEN_FILTER = ["anchors.filter.min_reward=-100", "anchors.filter.min_anchors=0", "anchors.filter.min_ious=[]"]
TWO = [
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.num_workers=0",
    "trainer.persist_below=5000",
    "trainer.keep_within=0",
]
"""ZeRO-3 splits the matrices of the base, after each use; a message per bias takes long, so one test does that."""
STRATEGIES = ("ddp", "zero2", "zero3")
TOLERANCE = 1e-6
"""Of a weight, where both processes and the one compute with the same kernels (ddp, zero2)."""
SHARE = 0.1
"""Of how far training went: zero3 has a linear layer of its own, whose rounding AdamW magnifies in single entries."""
OVERALL = 1e-3
"""Of the distance of all weights, for that of the difference. All three are derived in experiments/distributed."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(small):
    """The embedded policy, whose rewards differ; learning rates that move weights by fifty times the tolerance."""
    return [
        *small, *OPEN_FILTER, "policy.frames.max_frames=16", "grpo.sampling.max_new_tokens=40", "grpo.max_steps=5",
        "grpo.grpo2_max_steps=2", "grpo.prompts_per_step=4", "grpo.prompts_at_once=1", "grpo.lr=1e-5", "sft.lr=5e-5",
        "sft.epochs=1", "anchors.filter.max_per_query=1", "trainer.checkpoint_every=5",
        "stage.sequence=[grpo1,filter,sft,grpo2,evaluate]", "evaluate.targets=[grpo2]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(settings, run_command, tmp_path_factory):
    """The run of one process that the others are held against."""
    folder = tmp_path_factory.mktemp("alone")
    run_command(*settings, "trainer=cpu", "trainer.num_threads=1", f"runs_dir={folder}", "name=r")
    return folder / "r"


def trainer(strategy, settings):
    """A group choice first: the values of `settings` lie over it."""
    return [f"trainer={strategy}", *settings, *TWO]


def assert_same_training(strategy, one, other, name="grpo1/adapter/adapter_model.safetensors"):
    """Two adapters are equal up to rounding, and far from the start, where every B is zero."""
    a, b = load_file(one / name), load_file(other / name)
    assert a.keys() == b.keys()
    largest = max(float((a[key] - b[key]).abs().max()) for key in a)
    moves = [key for key in a if "lora_B" in key]
    moved = min(float(a[key].abs().max()) for key in moves)
    apart = sum(float((a[key] - b[key]).square().sum()) for key in moves)
    overall = (apart / sum(float(a[key].square().sum()) for key in moves)) ** 0.5
    allowed = SHARE * moved if strategy.startswith("zero3") else TOLERANCE
    print(f"{strategy} {name}: largest {largest:.2g}, overall {overall:.2g}, moved {moved:.2g}")
    assert largest <= allowed and overall <= OVERALL and moved >= 20 * TOLERANCE, (name, largest, overall, moved)


def said(path):
    return [[r["completion"]["token_ids"] for r in row["rollouts"]] for row in rows(path)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_run_the_whole_method_like_one(strategy, settings, alone, run_command, tmp_path):
    """Once with interpreters of their own, as users start them; the tests fork elsewhere."""
    run_command(*trainer(strategy, settings), f"runs_dir={tmp_path}", "name=r", is_real=strategy == "zero2")
    run = tmp_path / "r"
    assert said(run / "grpo1/rollouts.jsonl") == said(alone / "grpo1/rollouts.jsonl")
    for stage in ("grpo1", "sft", "grpo2"):
        assert_same_training(strategy, alone, run, f"{stage}/adapter/adapter_model.safetensors")
        mine, theirs = rows(run / stage / "metrics.jsonl"), rows(alone / stage / "metrics.jsonl")
        for a, b in zip(mine, theirs, strict=True):
            for name in a.keys() - {n for n in a if n.startswith(("time/", "memory/"))}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (stage, name)
    assert rows(run / "grpo1/metrics.jsonl")[0]["loss/kl"] == 0.0
    assert rows(run / "grpo2/metrics.jsonl")[0]["loss/kl"] == 0.0
    newest = sorted((run / "grpo1/checkpoints").glob("step_*"))[-1]
    assert all("lora_" in name for name in load_file(newest / "adapter_model.safetensors"))
    weights = (run / "grpo1/adapter/adapter_model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in newest.iterdir()) < 3.3 * weights  # weights and two moments
    assert json.loads((run / "evaluate/grpo2/manifest.json").read_text())["finished"]


def test_weights_in_main_memory_train_like_one(settings, alone, run_command, tmp_path):
    command = [*trainer("zero3_offload", settings), "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    run_command(*command)
    assert said(tmp_path / "r/grpo1/rollouts.jsonl") == said(alone / "grpo1/rollouts.jsonl")
    assert_same_training("zero3_offload", alone, tmp_path / "r")


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_process_without_a_readable_video_keeps_step(strategy, settings, alone, planted_root, run_command, tmp_path):
    """Two prompts a step, one a process; a damaged video leaves one process without work."""
    shutil.copytree(planted_root, tmp_path / "data")
    next((tmp_path / "data").glob("planted-*/train_00001*.mp4")).write_bytes(b"damaged")
    common = [
        "stage=grpo1",
        f"dataset.root={tmp_path / 'data'}",
        f"runs_dir={tmp_path}",
        "grpo.max_steps=6",
        "grpo.prompts_per_step=2",
    ]
    run_command(*settings, *common, "name=one")
    run_command(*trainer(strategy, settings), *common, "name=two")
    counts = [sum(row["step"] == step for row in rows(tmp_path / "two/grpo1/rollouts.jsonl")) for step in range(6)]
    assert 1 in counts and 0 not in counts
    assert said(tmp_path / "two/grpo1/rollouts.jsonl") == said(tmp_path / "one/grpo1/rollouts.jsonl")
    assert_same_training(strategy, tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("first", "then"), [("zero3", "cpu"), ("zero2", "zero3"), ("cpu", "zero2")])
def test_a_stage_goes_on_under_another_strategy(first, then, settings, alone, run_command, tmp_path):
    common = [*settings, "trainer.checkpoint_every=2", "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    process = start_command([f"trainer={first}", *common, *([] if first == "cpu" else TWO)])
    kill_when(process, lambda: num_lines(tmp_path / "r/grpo1/metrics.jsonl") >= 3)
    run_command(f"trainer={then}", *common, *([] if then == "cpu" else TWO))
    assert said(tmp_path / "r/grpo1/rollouts.jsonl") == said(alone / "grpo1/rollouts.jsonl")
    assert_same_training("zero3" if "zero3" in (first, then) else first, alone, tmp_path / "r")


WATCH = """
import os, runpy, sys
from pathlib import Path
from tartvg.training.strategies import AnyDeviceZero

start = AnyDeviceZero.init_deepspeed

def watch(self):
    start(self)
    weights = list(self.model.parameters())
    kinds = {("adapter " if weight.requires_grad else "base ") + str(weight.dtype) for weight in weights}
    Path(os.environ["SEEN"], os.environ["RANK"]).write_text(", ".join(sorted(kinds)))

AnyDeviceZero.init_deepspeed = watch
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_bf16_base_stays_bf16(strategy, settings, tmp_path, monkeypatch):
    """Lightning would make it fp32 without a word, at twice the memory."""
    monkeypatch.setenv("SEEN", str(tmp_path))
    monkeypatch.chdir(ROOT)
    script = tmp_path / "watch.py"
    script.write_text(WATCH)
    more = ["policy.precision=bf16", "grpo.max_steps=1", "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    assert run_processes(2, [sys.executable, str(script), *trainer(strategy, settings), *more]) == 0
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"adapter torch.float32, base torch.bfloat16"}


CRAMPED = """
import os, runpy, sys
import torch
from tartvg.policy.policy import Policy

def cramped(work, limit, rows_of):
    def attempt(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and rows_of(*args) > limit:
            torch.empty(1 << 50, dtype=torch.uint8)  # the system really refuses it
        return work(self, *args, **kwargs)
    return attempt

limit = int(os.environ["LIMIT"])
Policy.sample = cramped(Policy.sample, 1, lambda prompts, *_: len(prompts))
Policy.logps = cramped(Policy.logps, limit, lambda prepared, tokens, *_: len(tokens.ids) if prepared.prompt.text else 0)
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.parametrize(("strategy", "limit"), [("ddp", 2), ("ddp", 0), ("zero3", 4)])
def test_memory_that_one_process_lacks(strategy, limit, settings, alone, run_command, tmp_path, monkeypatch):
    """It samples its prompts one by one, and under DDP learns in parts, or leaves out what does not fit."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LIMIT", str(limit))
    script = tmp_path / "cramped.py"
    script.write_text(CRAMPED)
    more = ["grpo.prompts_at_once=2", "stage=grpo1", "grpo.kl_coef=0", f"runs_dir={tmp_path}", "name=r",
            "monitors.kl_every=0"]  # fmt: skip
    assert run_processes(2, [sys.executable, str(script), *trainer(strategy, settings), *more]) == 0
    run = tmp_path / "r"
    faults = rows(run / "grpo1/faults.jsonl")
    told = [(row["step"], row["action"]) for row in faults]
    assert {row["kind"] for row in faults} == {"out_of_memory"}
    for step in range(5):
        assert (step, "sampled in two halves") in told
        assert ((step, "tried in 2 parts") in told) == (limit < 4)
        assert ((step, "left out") in told) == (limit == 0)
    assert said(run / "grpo1/rollouts.jsonl")[0] == said(alone / "grpo1/rollouts.jsonl")[0]
    run_command(*settings, *more[:-2], f"runs_dir={tmp_path}", "name=one", "monitors.kl_every=0")
    if limit:
        assert said(run / "grpo1/rollouts.jsonl") == said(tmp_path / "one/grpo1/rollouts.jsonl")
        assert_same_training(strategy, tmp_path / "one", run)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_is_not_finite_is_skipped_by_all(strategy, settings, run_command, tmp_path):
    """A coefficient that is infinite in fp32 makes every loss NaN."""
    common = ["stage=grpo1", "grpo.kl_coef=1e300", "trainer.checkpoint_every=1", "trainer.max_skipped_steps=2"]
    done = run_command(*trainer(strategy, settings), *common, f"runs_dir={tmp_path}", "name=r", check=False)
    assert done.returncode == 2 and done.stderr.count("2 steps in a row had a non-finite loss or gradient") == 1
    faults = rows(tmp_path / "r/grpo1/faults.jsonl")
    assert [(row["step"], row["kind"], row["in_row"]) for row in faults] == [(0, "non_finite", 1), (1, "non_finite", 2)]
    assert all(len(row["samples"]) == 4 for row in faults)  # of both processes
    assert [row["loss/total"] for row in rows(tmp_path / "r/grpo1/metrics.jsonl")] == [None]
    weights = load_file(tmp_path / "r/grpo1/checkpoints/step_000001/adapter_model.safetensors")
    assert not any(value.any() for name, value in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_processes_leave_together_and_go_on(strategy, settings, alone, run_command, tmp_path):
    command = [*trainer(strategy, settings), "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    lines = tmp_path / "r/grpo1/metrics.jsonl"
    process = start_command(command)
    deadline = time.monotonic() + 300
    while num_lines(lines) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == REQUEUE_CODE
    names = [path.name for path in (tmp_path / "r/grpo1/checkpoints").iterdir()]
    assert names == [f"step_{num_lines(lines):06d}"] and num_lines(lines) < 5
    run_command(*command)
    assert said(tmp_path / "r/grpo1/rollouts.jsonl") == said(alone / "grpo1/rollouts.jsonl")
    assert_same_training(strategy, alone, tmp_path / "r")


def test_a_signal_after_the_last_step_ends_the_run_before_the_next_stage(settings, run_command, tmp_path):
    """One process is still in its stage and holds the signal, when the other has left it and waits for the first."""
    command = [
        *trainer("ddp", settings), "grpo.max_steps=2", "trainer.checkpoint_every=2", "stage.sequence=[grpo1,filter]",
        f"runs_dir={tmp_path}", "name=r",
    ]  # fmt: skip
    process = start_command(command)
    deadline = time.monotonic() + 300
    while not (tmp_path / "r/grpo1/checkpoints/step_000002").exists():  # written after the last word about signals
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == REQUEUE_CODE and not (tmp_path / "r/filter").exists()
    run_command(*command)
    assert json.loads((tmp_path / "r/filter/manifest.json").read_text())["finished"]


def test_a_memory_saving_update_with_every_weight_split(settings, alone, run_command, tmp_path):
    more = ["policy.memory_saving=true", "trainer.persist_below=0", "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    run_command(*trainer("zero3", settings), *more)
    assert_same_training("zero3", alone, tmp_path / "r")


def test_torchrun_starts_the_same_run(settings, alone, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "run.py"),
    ]
    overrides = [*trainer("ddp", settings), "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert_same_training("ddp", alone, tmp_path / "r")


def test_prompts_that_cannot_be_shared_are_refused_once(settings, run_command, tmp_path):
    done = run_command(*trainer("ddp", settings), "grpo.prompts_per_step=3", f"runs_dir={tmp_path}", check=False)
    assert done.returncode == 2
    assert done.stderr.count("grpo.prompts_per_step must be a multiple of the 2 processes, got 3") == 1
    assert "Traceback" not in done.stderr
