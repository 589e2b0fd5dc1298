"""Clips ahead of training: what the decoders do meanwhile changes no number and harms nobody."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from forking import ROOT
from interruptions import results

from tartvg.config import FramesConfig
from tartvg.data.ahead import ahead
from tartvg.data.clips import DECODERS, ClipReader, DecoderKilled
from tartvg.data.packets import VideoError
from tartvg.training.batches import StepDataset
from tartvg.training.prefetch import StepLoader, clips_ahead, videos_of

FRAMES = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)


@pytest.fixture
def prompts(prompts):
    """One question about each of two videos."""
    assert prompts[0].sample.video != prompts[2].sample.video
    return prompts[::2]


def children() -> set[int]:
    pids: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        pids |= {int(pid) for pid in (task / "children").read_text().split()}
    return pids


def wait_until(is_true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_true() and time.monotonic() < end:
        time.sleep(0.01)
    assert is_true()


# -- in order, and not too far ahead ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_batches_come_in_order_whoever_is_quick(num_threads):
    batches = [[0, 1], [], [2], [3, 4, 5, 6], [7], []]
    found = list(ahead(batches, list, lambda i: time.sleep(0.05 * (i % 3 == 0)) or i * i, num_threads, num_threads))
    assert found == [(batch, {i: i * i for i in batch}) for batch in batches]


@pytest.mark.parametrize(("size", "num_ahead", "most"), [(1, 3, 3), (4, 3, 4), (2, 3, 4), (0, 3, 0)])
def test_work_is_begun_for_the_next_batch_and_no_more_than_keeps_all_busy(size, num_ahead, most):
    begun: list[int] = []
    fetched: list[int] = []

    def batches():
        for number in range(20):
            fetched.append(number)
            yield range(number * size, (number + 1) * size)

    for number, (batch, found) in enumerate(ahead(batches(), list, lambda i: begun.append(i) or i, 2, num_ahead)):
        wait_until(lambda done=(number + 1) * size + most: len(begun) >= min(20 * size, done))
        time.sleep(0.01)
        assert len(begun) <= (number + 1) * size + most and len(fetched) <= number + 1 + num_ahead
        assert list(found) == list(batch)


def test_an_error_is_raised_where_its_batch_is_due_and_ends_all_threads():
    before = threading.active_count()
    seen = []
    with pytest.raises(ZeroDivisionError):
        for batch, _ in ahead([[2], [1], [0], [3]], list, lambda i: 1 // i, 2, 2):
            seen.append(batch)
    assert seen == [[2], [1]]
    wait_until(lambda: threading.active_count() <= before)


def test_who_stops_early_leaves_no_thread_and_begins_nothing_more():
    before, begun = threading.active_count(), []
    for _ in ahead(([i] for i in range(9)), list, begun.append, 1, 2):
        break
    wait_until(lambda: threading.active_count() <= before)
    assert len(begun) <= 3


class CountingReader(ClipReader):
    """Remembers its clips without keeping them."""

    def __init__(self) -> None:
        super().__init__()
        self.clips: list[weakref.ref] = []

    def read(self, path, settings, side):
        clip = super().read(path, settings, side)
        self.clips.append(weakref.ref(clip))
        return clip


@pytest.mark.parametrize(("per_step", "workers", "most"), [(1, 1, 2), (1, 3, 4), (2, 1, 4), (2, 3, 6)])
def test_clips_of_two_batches_or_a_few_more_lie_in_memory(policy, prompts, per_step, workers, most):
    """As the settings say: a batch and the next one, or `num_workers` more and what completes their last batch."""
    policy.clips = CountingReader()
    lying = []
    for batch in StepLoader(StepDataset(prompts, per_step, 0, 0, 8), policy, workers):
        due = min(8 * per_step, batch.step * per_step + most)
        wait_until(lambda due=due: len(policy.clips.clips) == due and not DECODERS._busy)
        lying.append(sum(clip() is not None for clip in policy.clips.clips))
    assert max(lying) == most and lying[-1] == per_step
    assert all(clip() is None for clip in policy.clips.clips)


# -- decoders that fail ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_decoders_that_are_killed_while_they_work_ahead_are_replaced(policy, prompts, workers):
    DECODERS.stop()
    before, seen = children(), []
    for batch in StepLoader(StepDataset(prompts, 1, 0, 0, 12), policy, workers):
        seen.append(batch.step)
        (clip,) = batch.clips.values()
        assert clip.frames.shape[1:] == (56, 56, 3)
        if batch.step == 5:  # all wait: nothing is killed that was killed before
            wait_until(lambda: not DECODERS._busy)
        if batch.step in (1, 5):
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)
    assert seen == list(range(12)) and sum(decoder.is_usable for decoder in DECODERS._idle) <= workers
    DECODERS.stop()
    assert children() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "listed"), [(signal.SIGKILL, False), (signal.SIGSTOP, True), (signal.SIGSEGV, True)]
)
def test_a_video_that_takes_every_decoder_along_is_left_to_the_policy(dying, policy, prompts, tmp_path, number, listed):
    """Killed: the policy tries it once more. Hung or crashed: it is on the list, and refused at once."""
    bad = prompts[1].sample.video
    num_tries = dying(number, deaths=4, name=bad.name)
    policy.clips = ClipReader(tmp_path / "list.jsonl")
    policy.settings = dataclasses.replace(policy.settings, frames=dataclasses.replace(FRAMES, timeout_s=2.0))
    batches = list(clips_ahead([[p] for p in prompts], videos_of, policy, 2))
    assert [videos_of(batch) == list(clips) for batch, clips in batches] == [p.sample.video != bad for p in prompts]
    assert num_tries() == (1 if listed else 2) and (tmp_path / "list.jsonl").exists() == listed
    with pytest.raises(VideoError) as caught:
        policy.prepare(prompts[1])
    assert isinstance(caught.value, DecoderKilled) != listed and num_tries() == (1 if listed else 4)


def test_a_damaged_video_is_on_the_list_and_the_policy_says_so(policy, prompts, tmp_path):
    video = tmp_path / "broken.mp4"
    video.write_bytes(b"no video")
    broken = dataclasses.replace(prompts[0], sample=dataclasses.replace(prompts[0].sample, video=video))
    policy.clips = ClipReader(tmp_path / "list.jsonl")
    ((_, clips),) = clips_ahead([[broken, prompts[1]]], videos_of, policy, 2)
    assert list(clips) == [prompts[1].sample.video]
    assert "broken.mp4" in (tmp_path / "list.jsonl").read_text()
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        policy.prepare(broken)


# -- nothing depends on it -------------------------------------------------------------------------------------------


def test_what_the_policy_knows_is_not_decoded_again(policy, prompts):
    policy.prepare(prompts[0])
    batches = [[prompts[0]], [prompts[0], prompts[1], prompts[1]]]
    assert [list(clips) for _, clips in clips_ahead(batches, videos_of, policy, 2)] == [[], [prompts[1].sample.video]]
    assert [clips for _, clips in clips_ahead(batches, videos_of, policy, 0)] == [{}, {}]


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_decoders(small, run_command, tmp_path):
    command = [
        *small, "stage.sequence=[grpo1,filter,sft,rollouts,evaluate]", "grpo.max_steps=2", "sft.epochs=1",
        "validation.every=1", "evaluate.policies=[sft]", "filter.min_reward=-100", "filter.min_anchors=0",
        "filter.min_ious=[]", f"runs_dir={tmp_path}", "stage=pipeline",
    ]  # fmt: skip
    for workers in (0, 3):
        run_command(*command, f"trainer.num_workers={workers}", f"name=w{workers}")
    one, other = results(tmp_path / "w0"), results(tmp_path / "w3")
    assert one == other and any("predictions" in name for name in one)


# -- the end of the process ------------------------------------------------------------------------------------------

HUNG = """
import sys
import time
from pathlib import Path

from tartvg.config import FramesConfig
from tartvg.data.ahead import ahead
from tartvg.data.clips import DECODERS, decode_isolated
from tartvg.launch.signals import PREEMPTION

PREEMPTION.listen()
frames = FramesConfig(timeout_s=300.0)
clips = ahead([[Path(sys.argv[1])]] * 3, list, lambda path: decode_isolated(path, frames), 2, 2)
if sys.argv[2] == "waits":
    next(clips)
else:
    begun = ahead([[], *[[Path(sys.argv[1])]] * 3], list, lambda path: decode_isolated(path, frames), 2, 2)
    kept = next(begun), begun
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["waits", "works"])
def test_a_signal_ends_the_process_at_once_although_decoders_hang(prompts, tmp_path, state):
    """The main thread waits for a clip, or works while threads do."""
    script = tmp_path / "python"
    text = (
        "import os, pathlib, signal, sys\nfrom multiprocessing.connection import Connection\n"
        "connection = Connection(int(sys.argv[-2]))\nconnection.send_bytes(b'ready')\nconnection.recv_bytes()\n"
        f"pathlib.Path('{tmp_path}', f'hung{{os.getpid()}}').touch()\nsignal.pause()\n"
    )
    script.write_text(f"#!{sys.executable}\n{text}")
    script.chmod(0o755)
    code = f"import sys\nsys.executable = '{script}'\n{HUNG}"
    command = [sys.executable, "-c", code, prompts[0].sample.video, state]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(list(tmp_path.glob("hung*"))) == 2, 60)
        started = time.monotonic()
        process.terminate()
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 75 and time.monotonic() - started < 5 and not errors
    pids = [int(path.name.removeprefix("hung")) for path in tmp_path.glob("hung*")]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
