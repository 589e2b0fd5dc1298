"""Two processes on the CPU when something goes wrong: too little memory, a signal, the same command again."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forking import start as start_command
from interruptions import num_lines, rows
from two_processes import assert_same_training, said, trainer

from tartvg.launch.signals import REQUEUE_CODE
from tartvg.policy.policy import Policy

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]


def too_much():
    torch.empty(1 << 50, dtype=torch.uint8)  # the system really refuses it


class Cramped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        too_much()


def cramp(limit, where):
    """Rank 1 has no memory for two prompts at once, nor for a pass of more than `limit` completions."""
    sample_all, logps_of_all = Policy.sample, Policy.logps

    def sample(self, prompts, *args):
        return too_much() if os.environ["RANK"] == "1" and len(prompts) > 1 else sample_all(self, prompts, *args)

    def logps(self, prepared, tokens, *args, **kwargs):
        is_too_large = os.environ["RANK"] == "1" and prepared.prompt.text and len(tokens.ids) > limit
        if is_too_large and where == "forward":
            too_much()
        found = logps_of_all(self, prepared, tokens, *args, **kwargs)
        return Cramped.apply(found) if is_too_large else found

    Policy.sample, Policy.logps = sample, logps


@pytest.mark.parametrize(
    ("strategy", "limit", "where"),
    [
        ("ddp", 2, "forward"),
        ("ddp", 0, "backward"),
        ("zero2", 2, "backward"),
        ("zero3", 4, "forward"),
    ],
)
def test_memory_that_one_process_lacks(strategy, limit, where, shared, run_command, tmp_path):
    """It samples its prompts one by one, learns in parts, and leaves out what does not fit; zero3 samples only."""
    steps, group, prompts = 2, 4, 4
    more = ["grpo.sampling_batch_size=2", "stage=grpo1", "grpo.kl_coef=0", f"grpo.max_steps={steps}", "grpo.lr=3e-5",
            f"grpo.group_size={group}", f"grpo.prompts_per_step={prompts}", "monitors.kl_every=0",
            f"runs_dir={tmp_path}"]  # fmt: skip
    run_command(*trainer(strategy, shared), *more, "name=r", prepare=partial(cramp, limit, where))
    run = tmp_path / "r"
    faults = rows(run / "grpo1/faults.jsonl")
    told = [(row["step"], row["action"]) for row in faults]
    assert {row["kind"] for row in faults} == {"out_of_memory"}
    for step in range(steps):
        assert (step, "sampled in two halves") in told
        assert ((step, "tried in 2 parts") in told) == (limit < 4)
        assert ((step, "left out") in told) == (limit == 0)
    run_command(*shared, *more, "name=one")
    mine, theirs = said(run / "grpo1/rollouts.jsonl"), said(tmp_path / "one/grpo1/rollouts.jsonl")
    assert mine[:prompts] == theirs[:prompts] and len(mine) == len(theirs)
    if limit:
        assert mine == theirs
        assert_same_training(strategy, tmp_path / "one", run)
    else:  # the other process's groups were learned from, and what came of it differs
        assert rows(run / "grpo1/metrics.jsonl")[-1]["optim/grad_norm"] > 0


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_is_short_under_zero3_ends_the_run_with_the_setting_that_needs_less(
    where, shared, run_command, tmp_path
):
    """In the middle of a pass there is no second try; with the setting that is named, the same command finishes."""
    more = ["grpo.sampling_batch_size=1", "stage=grpo1", "grpo.kl_coef=0", "grpo.max_steps=1", "monitors.kl_every=0",
            "grpo.prompts_per_step=2", f"runs_dir={tmp_path}", "name=r"]  # fmt: skip
    command, prepare = [*trainer("zero3", shared), *more], partial(cramp, 2, where)
    done = run_command(*command, prepare=prepare, check=False)
    assert done.returncode == 2
    said = done.stderr
    assert said.count("error: rank 1 ran out of memory in an update of 4 completions a pass under ZeRO-3") == 1
    assert "grpo.rows_per_pass=2" in said and "Traceback" not in said
    run_command(*command, "grpo.rows_per_pass=2", prepare=prepare)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_processes_leave_together_and_go_on(strategy, shared, alone, run_command, tmp_path):
    command = [*trainer(strategy, shared), "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
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


def slow_down(name, flag):
    """This work of rank 1 takes minutes while the file exists."""
    work = getattr(Policy, name)

    def slow(self, *args, **kwargs):
        if flag.exists() and os.environ["RANK"] == "1":
            Path(f"{flag}.seen").touch()
            for _ in range(2000):
                time.sleep(0.1)
        return work(self, *args, **kwargs)

    setattr(Policy, name, slow)


@pytest.mark.parametrize(("strategy", "name"), [("zero2", "logps"), ("zero3", "sample")])
def test_a_signal_ends_a_long_step(strategy, name, shared, alone, run_command, tmp_path):
    """One process has minutes to go and the other waits: both are gone in time, and the finished steps are saved."""
    flag = tmp_path / "flag"
    command = [*trainer(strategy, shared), "stage=grpo1", "trainer.checkpoint_every=100", f"runs_dir={tmp_path}",
               "name=r"]  # fmt: skip
    process = start_command(command, prepare=partial(slow_down, name, flag))
    try:
        deadline = time.monotonic() + 300
        while num_lines(tmp_path / "r/grpo1/metrics.jsonl") < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        flag.touch()
        while not Path(f"{flag}.seen").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == REQUEUE_CODE
    finally:
        process.kill()
    done = num_lines(tmp_path / "r/grpo1/metrics.jsonl")
    assert [path.name for path in (tmp_path / "r/grpo1/checkpoints").iterdir()] == [f"step_{done:06d}"] and done < 5
    flag.unlink()
    run_command(*command)
    assert said(tmp_path / "r/grpo1/rollouts.jsonl") == said(alone / "grpo1/rollouts.jsonl")
    assert_same_training(strategy, alone, tmp_path / "r")


def test_a_signal_after_the_last_step_ends_the_run_before_the_next_stage(shared, run_command, tmp_path):
    """One process is still in its stage and holds the signal, when the other has left it and waits for the first."""
    command = [
        *trainer("ddp", shared), "grpo.max_steps=2", "trainer.checkpoint_every=2", "stage.sequence=[grpo1,filter]",
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
