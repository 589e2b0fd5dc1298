"""What a cluster sends: saved, gone in time, with the code that a cluster script requeues on, and resumed exactly."""

import os
import signal
import subprocess
import sys
import time

import pytest
from forking import start as start_command
from helpers.checkpoints import names
from interruptions import PATIENCE, num_lines, results

from tartvg.launch.signals import REQUEUE_CODE, SIGNALS, Preempted, Preemption

SECONDS = 30
"""What the project promises; SLURM's default between SIGTERM and SIGKILL."""


@pytest.fixture
def preemption():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield Preemption()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_at_once_unless_it_is_held(preemption, number):
    preemption.listen()
    with pytest.raises(Preempted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.code == REQUEUE_CODE == 75 and caught.value.reason == number.name
    preemption.received = None
    preemption.hold()
    os.kill(os.getpid(), number)
    assert preemption.received == number.name
    with pytest.raises(Preempted):
        preemption.release()


def test_all_processes_leave_when_one_was_asked(preemption):
    preemption.release()
    with pytest.raises(Preempted, match="75"):
        preemption.release(is_leaving=True)


def test_a_forked_worker_leaves_the_decision_to_its_parent():
    code = (
        "import os, signal, time\n"
        "from tartvg.launch.signals import PREEMPTION\n"
        "PREEMPTION.listen()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    time.sleep(0.3); time.sleep(60)\n"
        "time.sleep(0.2)\n"
        "os.kill(child, signal.SIGUSR1); time.sleep(0.2)\n"
        "assert os.waitpid(child, os.WNOHANG) == (0, 0)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "print(os.WTERMSIG(os.waitpid(child, 0)[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == str(int(signal.SIGTERM)), result.stderr


SUBMITTED = """
import os, signal, sys
from tartvg.launch.signals import PREEMPTION

def requeue(number, frame):
    print("requeued", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # SLURM's answer
    sys.exit(-1)

signal.signal(signal.SIGUSR2, requeue)
for _ in range(2):
    PREEMPTION.listen()
if len(sys.argv) > 1:
    PREEMPTION.hold()
    for _ in range(2):
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
print("saved", flush=True)
PREEMPTION.release()
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [("SIGUSR2", REQUEUE_CODE, "saved requeued"), ("SIGTERM", REQUEUE_CODE, "saved"), (None, 0, "saved")],
)
def test_who_listened_to_submitits_signal_before_gets_it_after_the_run(number, code, said):
    command = [sys.executable, "-c", SUBMITTED, *([number] if number else [])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.split()) == (code, said.split()), result.stderr


@pytest.fixture(scope="module")
def settings(small, untrained_base):
    """No regular checkpoint comes before the signal."""
    return [*small, f"policy.path={untrained_base}", "grpo.sampling.max_new_tokens=24", "trainer.checkpoint_every=1000"]


def interrupt(command, number, is_time):
    """Send the signal when it is time. Returns the exit code; the process must be gone within SECONDS."""
    process = start_command(command)
    deadline = time.monotonic() + PATIENCE
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    try:
        return process.wait(SECONDS)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_signal_in_grpo_saves_the_finished_steps(settings, run_command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*settings, "stage=grpo1", f"runs_dir={tmp_path}"]
    run_command(*command, "name=whole")
    lines = cut / "grpo1/metrics.jsonl"
    assert interrupt([*command, "name=cut"], signal.SIGTERM, lambda: num_lines(lines) >= 2) == REQUEUE_CODE
    done = num_lines(lines)
    assert 2 <= done < 4 and names(cut / "grpo1/checkpoints") == [f"step_{done:06d}"]
    assert interrupt([*command, "name=cut"], signal.SIGUSR1, lambda: num_lines(lines) > done) == REQUEUE_CODE
    assert f"step_{done + 1:06d}" in names(cut / "grpo1/checkpoints")
    run_command(*command, "name=cut")
    assert results(cut) == results(whole)


@pytest.mark.slow
def test_a_signal_in_any_stage_is_resumed_exactly(settings, run_command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [
        *settings, "filter.min_reward=-100", "filter.min_anchors=0", "filter.min_ious=[]",
        "sft.epochs=1", "stage.sequence=[grpo1,filter,sft,evaluate]", "evaluate.policies=[sft]", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    run_command(*command, "name=whole")
    for number, is_time in (
        (signal.SIGUSR1, lambda: (cut / "grpo1/manifest.json").exists()),
        (signal.SIGTERM, lambda: (cut / "filter/manifest.json").exists()),
        (signal.SIGTERM, lambda: num_lines(cut / "sft/metrics.jsonl") >= 1),
        (signal.SIGUSR2, lambda: (cut / "evaluate/sft/batches").exists()),
    ):
        assert interrupt([*command, "name=cut"], number, is_time) == REQUEUE_CODE
    run_command(*command, "name=cut")
    assert results(cut) == results(whole)


@pytest.mark.slow
def test_a_checkpoint_also_after_a_time(settings, run_command, tmp_path):
    run_command(*settings, "stage=grpo1", "trainer.checkpoint_minutes=1e-6", f"runs_dir={tmp_path}", "name=r")
    assert names(tmp_path / "r/grpo1/checkpoints") == ["step_000003", "step_000004"]
