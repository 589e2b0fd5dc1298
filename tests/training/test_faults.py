"""What goes wrong costs a step, a group or a sample, not the run. Every fault here is a real one."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from forking import ROOT
from helpers.checkpoints import names
from helpers.training import CPU, GRPO, OFF, RUBRIC, fit, lines, make_grpo

from tartvg.config import FramesConfig, SettingError, SftConfig, TrainerConfig
from tartvg.tracking import Tracker
from tartvg.training.batches import StepDataset
from tartvg.training.checkpoint import latest_checkpoint
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.sft_module import SftModule, TraceDataset
from tartvg.training.step import StageRun
from tartvg.training.trainer import make_trainer
from tartvg.types import Trace

FRAMES = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)


# -- numbers that are none -------------------------------------------------------------------------------------------


def compared(module, value_of):
    """The module's advantages, times `value_of(step)`."""
    return lambda group: (
        GrpoModule.advantages(module, group) * 0 + value_of(group.step) * torch.arange(GRPO.group_size)[:, None]
    )


def test_a_step_with_infinite_advantages_is_left_out(policy, prompts, tmp_path, capsys):
    settings = dataclasses.replace(GRPO, max_steps=3)
    module = make_grpo(policy, tmp_path, RUBRIC, settings)
    module.run = dataclasses.replace(module.run, trainer=TrainerConfig(checkpoint_every=1, checkpoints_kept=5))
    module.advantages = compared(module, lambda step: float("inf") if step == 1 else 1.0)
    fit(module, tmp_path, prompts, 3)
    assert "step 1: non finite" in capsys.readouterr().out
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row.get("optim/skipped") for row in rows] == [None, 1.0, None]
    assert rows[1]["optim/grad_norm"] is None and rows[2]["optim/grad_norm"] > 0
    read = {p.name: (p / "adapter_model.safetensors").read_bytes() for p in (tmp_path / "checkpoints").iterdir()}
    assert read["step_000001"] == read["step_000002"] != read["step_000003"]
    (fault,) = lines(tmp_path / "faults.jsonl")
    assert (fault["step"], fault["kind"], fault["in_row"]) == (1, "non_finite", 1)
    saved = lines(tmp_path / "faults/step_000001.jsonl")
    assert fault["samples"] == [row["sample_id"] for row in saved]
    assert all(row["loss"] is None and len(row["group"]["rollouts"]) == GRPO.group_size for row in saved)


def test_many_such_steps_in_a_row_stop_the_stage_also_over_a_restart(policy, prompts, tmp_path):
    settings = dataclasses.replace(GRPO, max_steps=9)

    def start():
        module = make_grpo(policy, tmp_path, RUBRIC, settings)
        module.run = dataclasses.replace(module.run, trainer=TrainerConfig(checkpoint_every=1, max_skipped_steps=3))
        module.faults.max_skipped = 3
        module.advantages = compared(module, lambda step: float("nan"))
        return module

    with pytest.raises(SettingError, match=r"3 steps in a row .*trainer.max_skipped_steps.*faults"):
        fit(start(), tmp_path, prompts, 9)
    assert names(tmp_path / "faults") == [f"step_{step:06d}.jsonl" for step in range(3)]
    assert latest_checkpoint(tmp_path / "checkpoints").counters == {"skipped_in_row": 2}
    with pytest.raises(SettingError, match="3 steps in a row"):
        fit(start(), tmp_path, prompts, 9)
    assert not (tmp_path / "faults/step_000003.jsonl").exists()


def test_a_learning_rate_that_explodes_stops_sft(policy, prompts, tmp_path):
    by_id = {p.sample.sample_id: p for p in prompts}
    settings = SftConfig(epochs=9, batch_size=4, lr=1e30)
    with Tracker(tmp_path, OFF, "r", "sft", {}, 0) as tracker:
        data = TraceDataset([Trace(key, "11 12", 7.0, ()) for key in by_id], by_id, settings, 0)
        run = StageRun("sft", tmp_path, 0, data.stop, TrainerConfig(checkpoint_every=1, max_skipped_steps=2))
        module = SftModule(policy, settings, run, tracker)
        loader = torch.utils.data.DataLoader(data, batch_size=1, collate_fn=lambda b: b[0])
        with pytest.raises(SettingError, match=r"2 steps in a row.*lower learning rate"):
            make_trainer(CPU, tmp_path).fit(module, loader)
    assert lines(tmp_path / "faults.jsonl")[-1]["in_row"] == 2
    assert lines(tmp_path / "faults/step_000001.jsonl")[0]["traces"][0]["text"] == "11 12"


# -- steps without anything to train on ------------------------------------------------------------------------------


def broken(prompt, folder):
    """The prompt with a video that cannot be decoded."""
    video = folder / f"{prompt.sample.sample_id}.mp4"
    video.write_bytes(b"no video")
    return dataclasses.replace(prompt, sample=dataclasses.replace(prompt.sample, video=video))


def test_a_step_whose_videos_are_all_broken_is_left_out(policy, prompts, tmp_path, capsys):
    """With one prompt a step: the first step has no video, the second has one."""
    mixed = [broken(prompts[0], tmp_path), prompts[1]]
    order = [StepDataset(mixed, 1, 0, 0, 4)[i].prompts[0] is mixed[0] for i in range(4)]
    fit(make_grpo(policy, tmp_path, RUBRIC, dataclasses.replace(GRPO, max_steps=4)), tmp_path, mixed, 4, per_step=1)
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row.get("optim/skipped") == 1.0 for row in rows] == order and sum(order) == 2
    assert [(f["kind"], f["in_row"]) for f in lines(tmp_path / "faults.jsonl")] == [("empty_step", 1)] * 2
    assert latest_checkpoint(tmp_path / "checkpoints").step == 4


def test_many_such_steps_stop_the_stage(policy, prompts, tmp_path):
    module = make_grpo(policy, tmp_path, RUBRIC, dataclasses.replace(GRPO, max_steps=9))
    module.faults.max_skipped = 3
    with pytest.raises(SettingError, match=r"3 steps in a row .*no video of theirs can be decoded.*stage=check_data"):
        fit(module, tmp_path, [broken(prompt, tmp_path) for prompt in prompts], 9)
    assert [row["progress/step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_sft_leaves_such_a_step_out_too(policy, prompts, tmp_path):
    mixed = [broken(prompts[0], tmp_path), prompts[1]]
    by_id = {p.sample.sample_id: p for p in mixed}
    settings = SftConfig(epochs=1, batch_size=1, lr=1e-3)
    with Tracker(tmp_path, OFF, "r", "sft", {}, 0) as tracker:
        data = TraceDataset([Trace(key, "11 12", 7.0, ()) for key in by_id], by_id, settings, 0)
        run = StageRun("sft", tmp_path, 0, data.stop, TrainerConfig(checkpoint_every=1))
        module = SftModule(policy, settings, run, tracker)
        loader = torch.utils.data.DataLoader(data, batch_size=1, collate_fn=lambda b: b[0])
        make_trainer(CPU, tmp_path).fit(module, loader)
    rows = lines(tmp_path / "metrics.jsonl")
    assert sorted(row.get("optim/skipped", 0.0) for row in rows) == [0.0, 1.0]
    assert lines(tmp_path / "faults.jsonl")[0]["kind"] == "empty_step"


# -- the machine around it -------------------------------------------------------------------------------------------

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
/* The wall clock leaps a day, back and forth, with every look at it. */
static long leap(void) { static long n; return (n++ % 2 ? 86400 : -86400); }
int clock_gettime(clockid_t id, struct timespec *t) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += leap();
    return code;
}
int gettimeofday(struct timeval *t, void *zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int code = real(t, zone);
    t->tv_sec += leap();
    return code;
}
time_t time(time_t *out) {
    struct timeval t;
    gettimeofday(&t, 0);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
"""
TIMED = """
import json, sys, time
from pathlib import Path
from tartvg.config import Config, FramesConfig
from tartvg.data.ahead import ahead
from tartvg.data.clips import decode_isolated
from tartvg.data.packets import VideoError
from tartvg.stages.folder import StageFolder
from tartvg.timing import PhaseTimer
def nap(seconds):
    time.sleep(seconds)
    return seconds
if __name__ == "__main__":
    assert abs(time.time() - time.time()) > 80_000
    config = Config()
    config.policy.name, config.dataset.name = "p", "planted"
    timer = PhaseTimer()
    with StageFolder(Path(sys.argv[1]) / "stage", config, dict).work(), timer("decode"):
        done = [found for _, found in ahead([[0.3], [0.2]], tuple, nap, 1, 1)]
        try:
            decode_isolated(Path("nowhere.mp4"), FramesConfig(timeout_s=30.0))
        except VideoError as error:
            assert "no such video file" in str(error), error
    print(json.dumps([[seconds for found in done for seconds in found.values()], timer.flush()]))
"""


@pytest.mark.slow
def test_nothing_depends_on_the_wall_clock(tmp_path):
    """The C library's clock leaps a day with every look; run times and time limits stay right."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "clock.c").write_text(CLOCK)
    (tmp_path / "timed.py").write_text(TIMED)
    library = tmp_path / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    result = subprocess.run(
        [sys.executable, tmp_path / "timed.py", tmp_path], capture_output=True, text=True, timeout=600,
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    done, times = json.loads(result.stdout.splitlines()[-1])
    assert done == [0.3, 0.2]
    manifest = json.loads((tmp_path / "stage/manifest.json").read_text())
    assert manifest["finished"] and 0.5 <= manifest["seconds"] < 600
    assert 0.5 <= times["time/decode_s"] < 600


@pytest.fixture
def mount(tmp_path):
    """A file system of one's own; only root may make one."""
    mounted = []

    def make(folder, options):
        folder.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(small, run_command, mount, tmp_path):
    folder = mount(tmp_path / "disk", "ro,size=1m")
    overrides = [o for o in small if not o.startswith("dataset.root=")]
    for place in (f"runs_dir={folder}/runs", f"dataset.root={folder}/data"):
        result = run_command(*overrides, "stage=grpo1", f"runs_dir={tmp_path}/runs", place, check=False)
        assert result.returncode == 1
        assert "Read-only file system" in result.stderr and str(folder) in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_videos_are_read_from_a_folder_that_cannot_be_written(small, run_command, mount, tmp_path):
    folder = mount(tmp_path / "disk", "size=64m")
    overrides = [*(o for o in small if not o.startswith("dataset.root=")), f"dataset.root={folder}/data"]
    run_command(*overrides, "stage=grpo1", "grpo.max_steps=1", f"runs_dir={tmp_path}", "name=first")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    run_command(*overrides, "stage=grpo1", "grpo.max_steps=1", f"runs_dir={tmp_path}", "name=again")


@pytest.mark.slow
def test_a_disk_that_fills_up_in_training_costs_no_finished_step(small, run_command, mount, tmp_path):
    from interruptions import results

    folder = mount(tmp_path / "disk", "size=32m")
    command = [*small, "stage=grpo1", "grpo.max_steps=3", "trainer.checkpoint_every=1"]
    run_command(*command, f"runs_dir={tmp_path}", "name=whole")
    free = shutil.disk_usage(folder).free
    size = sum(p.stat().st_size for p in (tmp_path / "whole/grpo1/checkpoints/step_000003").iterdir())
    (folder / "filler").write_bytes(b"x" * (free - 2 * size - size // 2))
    full = run_command(*command, f"runs_dir={folder}", "name=cut", check=False)
    assert full.returncode in (1, 2)
    assert "No space left on device" in full.stderr and "Traceback" not in full.stderr
    (folder / "filler").unlink()
    run_command(*command, f"runs_dir={folder}", "name=cut")
    assert results(folder / "cut") == results(tmp_path / "whole")
