"""What goes wrong costs a step, a group or a sample, not the run. Every fault here is a real one."""

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, planted_prompts, tiny_policy
from test_checkpoint import names
from test_training import CPU, GRPO, OFF, make_grpo

from tartvg.config import Aggregation, AnchorsConfig, FramesConfig, RewardConfig, SettingError, SftConfig
from tartvg.policy.policy import token_batch
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training.checkpoint import latest_checkpoint
from tartvg.training.fitting import NothingFits, fit_rows, fit_update, is_out_of_memory, merge_parts, row_slices
from tartvg.training.grpo_module import GroupWork, GrpoModule
from tartvg.training.loop import StageRun, make_trainer
from tartvg.training.plan import StepDataset, step_loader
from tartvg.training.sft_module import SftModule, TraceDataset
from tartvg.types import Completion, RolloutGroup, Trace

RUBRIC = Rubric(RewardConfig(), AnchorsConfig())
FRAMES = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fit(module, folder, prompts, steps, per_step=2):
    data = StepDataset(prompts, per_step, 0, module.start_step, steps, None)
    make_trainer(CPU, folder).fit(module, step_loader(data, 0))


# -- numbers that are none -------------------------------------------------------------------------------------------


def compared(module, value_of):
    """The module's advantages, times `value_of(step)`."""
    return lambda group: GrpoModule.advantages(module, group) * 0 + value_of(group.step) * torch.arange(GRPO.group_size)


def test_a_step_with_infinite_advantages_is_left_out(policy, prompts, tmp_path, capsys):
    settings = dataclasses.replace(GRPO, max_steps=3)
    module = make_grpo(policy, tmp_path, RUBRIC, settings)
    module.run = dataclasses.replace(module.run, checkpoints_kept=5)
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
        module.run = dataclasses.replace(module.run, max_skipped_steps=3)
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
        run = StageRun("sft", tmp_path, 0, data.stop, 1, max_skipped_steps=2)
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
    order = [StepDataset(mixed, 1, 0, 0, 4, None)[i].prompts[0] is mixed[0] for i in range(4)]
    fit(make_grpo(policy, tmp_path, RUBRIC, dataclasses.replace(GRPO, max_steps=4)), tmp_path, mixed, 4, per_step=1)
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row.get("optim/skipped") == 1.0 for row in rows] == order and sum(order) == 2
    assert [(f["kind"], f["in_row"]) for f in lines(tmp_path / "faults.jsonl")] == [("empty_step", 1)] * 2
    assert latest_checkpoint(tmp_path / "checkpoints").step == 4


def test_many_such_steps_stop_the_stage(policy, prompts, tmp_path):
    module = make_grpo(policy, tmp_path, RUBRIC, dataclasses.replace(GRPO, max_steps=9))
    module.faults.max_skipped = 3
    with pytest.raises(SettingError, match=r"3 steps in a row .*no video of theirs can be decoded.*stage=validate"):
        fit(module, tmp_path, [broken(prompt, tmp_path) for prompt in prompts], 9)
    assert [row["progress/step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_sft_leaves_such_a_step_out_too(policy, prompts, tmp_path):
    mixed = [broken(prompts[0], tmp_path), prompts[1]]
    by_id = {p.sample.sample_id: p for p in mixed}
    settings = SftConfig(epochs=1, batch_size=1, lr=1e-3)
    with Tracker(tmp_path, OFF, "r", "sft", {}, 0) as tracker:
        data = TraceDataset([Trace(key, "11 12", 7.0, ()) for key in by_id], by_id, settings, 0)
        module = SftModule(policy, settings, StageRun("sft", tmp_path, 0, data.stop, 1), tracker)
        loader = torch.utils.data.DataLoader(data, batch_size=1, collate_fn=lambda b: b[0])
        make_trainer(CPU, tmp_path).fit(module, loader)
    rows = lines(tmp_path / "metrics.jsonl")
    assert sorted(row.get("optim/skipped", 0.0) for row in rows) == [0.0, 1.0]
    assert lines(tmp_path / "faults.jsonl")[0]["kind"] == "empty_step"


# -- memory ----------------------------------------------------------------------------------------------------------


def too_much():
    """An allocation that the system really refuses."""
    return torch.empty(1 << 50, dtype=torch.uint8)


def test_torch_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        too_much()
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as caught:
        bytearray(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("parts", [2, 3, 5, 99])
def test_slices_cover_all_rows_once(parts):
    slices = row_slices(5, parts)
    assert [i for s in slices for i in range(5)[s]] == list(range(5)) and len(slices) == min(parts, 5)


def rows_that_fit(limit):
    """Work on rows 0..7 that really runs out of memory for more than `limit` of them."""

    def work(part):
        rows = list(range(8))[part]
        return rows if len(rows) <= limit else too_much()

    return work


def test_rows_are_halved_until_they_fit():
    assert fit_rows(rows_that_fit(8), 8, is_out_of_memory) == [list(range(8))]
    assert fit_rows(rows_that_fit(3), 8, is_out_of_memory) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(RuntimeError, match="allocate"):
        fit_rows(rows_that_fit(0), 8, is_out_of_memory)


def test_a_group_that_never_fits_is_left_out_and_the_others_are_not():
    weight = torch.nn.Parameter(torch.ones(()))
    limits, notes, attempts = [8, 3, 0], [], []

    def loss(group, part):
        return weight * 10**group * len(rows_that_fit(limits[group])(part))

    def update(losses):
        weight.grad = None
        for micro in losses:
            micro().backward()
        return float(weight.grad)

    losses = [lambda part, g=g: loss(g, part) for g in range(3)]
    norm = fit_update(update, losses, [8, 8, 8], is_out_of_memory, lambda: attempts.append(1),
                      lambda *note: notes.append(note[:2]))  # fmt: skip
    assert norm == 8 + 80
    assert notes == [(1, 2), (1, 4), (2, 2), (2, 4), (2, 8), (2, 0)] and len(attempts) == 7
    with pytest.raises(NothingFits):
        fit_update(update, losses[2:], [1], is_out_of_memory, lambda: None, lambda *_: None)
    with pytest.raises(ValueError, match="else"):
        fit_update(lambda _: (_ for _ in ()).throw(ValueError("else")), losses, [8] * 3, is_out_of_memory,
                   lambda: None, lambda *_: None)  # fmt: skip


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_group_in_parts_has_the_same_gradient(policy, prompts, tmp_path, aggregation):
    module = make_grpo(policy, tmp_path, RUBRIC, dataclasses.replace(GRPO, aggregation=aggregation))
    prepared = policy.prepare(prompts[0])
    completions = [Completion("x", tuple(range(20, 20 + n)), (-3.0,) * n, True) for n in (5, 2, 7, 3, 4)]
    tokens = token_batch(completions, policy.device)
    with policy.as_reference():
        reference_GT = policy.logps(prepared, tokens) + 0.1
    group = RolloutGroup(prompts[0], (), 0)
    work = GroupWork(0, prepared, group, tokens, reference_GT, torch.zeros_like(tokens.logps))
    advantages_G = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0])

    def gradient(slices):
        module.zero_grad()
        for part in slices:
            module.group_loss(work, advantages_G, parts, part, num_groups=2).backward()
        return torch.cat([p.grad.flatten() for p in module.trainable() if p.grad is not None])

    parts = []
    whole, metrics = gradient(row_slices(5, 1)), parts[0][0]
    parts = []
    split = gradient(row_slices(5, 3))
    assert whole.abs().max() > 0
    assert torch.allclose(whole, split, rtol=1e-4, atol=1e-7)
    merged = merge_parts(parts)
    assert {k: float(v) for k, v in merged.items()} == pytest.approx(
        {k: float(v) for k, v in metrics.items()}, abs=1e-5
    )


def address_space():
    """Bytes, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_a_step_in_too_little_memory_is_done_in_parts(untrained_base, prompts, planted_root, tmp_path):
    """In a process of its own: earlier tests leave memory behind that needs no asking for."""
    work = multiprocessing.get_context("spawn").Process(
        target=little_memory, args=(untrained_base, planted_root, tmp_path)
    )
    work.start()
    work.join(300)
    assert work.exitcode == 0


def little_memory(base, root, tmp_path):
    """The system itself refuses the memory (RLIMIT_AS): the same step, the same gradient, in parts.

    How much is too little depends on the system's allocator. So the limit falls until it is felt, and every try is a
    fork of this process, which never ran the step: what one try allocated is not there for the next to use again.
    """
    torch.set_num_threads(1)
    policy, prompts = tiny_policy(base), planted_prompts(root)
    settings = dataclasses.replace(GRPO, group_size=96, kl_coef=0.0, max_steps=1,
                                   sampling=dataclasses.replace(GRPO.sampling, max_new_tokens=64))  # fmt: skip

    def step(folder, margin):
        folder.mkdir()
        module = make_grpo(policy, folder, RUBRIC, settings)
        module.advantages = lambda group: torch.arange(96.0) % 7 - 3
        update = module.update

        def limited(losses):
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            if margin is not None:
                resource.setrlimit(resource.RLIMIT_AS, (address_space() + margin, hard))
            try:
                return update(losses)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

        module.update = limited
        fit(module, folder, prompts[:1], 1, per_step=1)

    def tried(name, margin=None):
        """The folder of one try, which ends well also where a part of the step was left out."""
        child = os.fork()
        if not child:
            code = 1
            try:
                step(tmp_path / name, margin)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return tmp_path / name

    free = tried("free")
    assert not (free / "faults.jsonl").exists()
    margin = 512 << 20
    tight = tried("tight", margin)
    while not (tight / "faults.jsonl").exists():
        margin = margin * 3 // 4
        assert margin > 1 << 20, "no limit was felt"
        tight = tried(f"tight_{margin}", margin)
    faults = lines(tight / "faults.jsonl")
    assert {fault["kind"] for fault in faults} == {"out_of_memory"}
    assert faults[0]["action"] == "tried in 2 parts" and "allocate" in faults[0]["error"]
    assert not any(fault["action"] == "left out" for fault in faults)
    measured, expected = (lines(folder / "metrics.jsonl")[0] for folder in (tight, free))
    for name in ("optim/grad_norm", "loss/total", "loss/ratio_mean"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)


# -- decoding processes ----------------------------------------------------------------------------------------------


def children():
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_decoding_process_that_is_killed_is_replaced(prompts, workers):
    """Killed while it sends a video that the training does not take yet: the worst moment."""
    data = StepDataset(prompts, 1, 0, 0, 7, FRAMES)
    before, seen = children(), []
    for batch in step_loader(data, workers):
        seen.append(batch.step)
        assert batch.clips[0].frames.shape[1:] == (56, 56, 3)
        if batch.step in (1, 4):
            time.sleep(1)
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)
    assert seen == list(range(7)) and children() == before


class Deadly(StepDataset):
    """The decoder of one video takes its process with it, or never returns, as a broken file can make it."""

    harm = "die"

    def _clip(self, prompt):
        if prompt.sample.sample_id == self.prompts[2].sample.sample_id:
            os.kill(os.getpid(), signal.SIGKILL if self.harm == "die" else signal.SIGSTOP)
        return super()._clip(prompt)


@pytest.mark.parametrize("harm", ["die", "hang"])
def test_a_video_that_takes_every_process_along_is_left_to_the_policy(prompts, capsys, harm):
    data = Deadly(prompts, 1, 0, 0, len(prompts), FRAMES)
    data.harm = harm
    loader = step_loader(data, 2)
    assert loader.timeout_s == 60 + 30
    loader.timeout_s = 10
    batches = list(loader)
    unread = next(b.step for b in batches if b.prompts[0] is prompts[2])
    assert [b.step for b in batches] == list(range(len(prompts)))
    assert [batch.clips[0] is None for batch in batches] == [step == unread for step in range(len(prompts))]
    assert capsys.readouterr().out.count("replaced") == 2


def test_an_error_of_a_worker_is_raised_where_the_steps_are_used(prompts):
    data = StepDataset(prompts, 1, 0, 0, 2, FRAMES)
    data.prompts = None
    with pytest.raises(TypeError):
        list(step_loader(data, 1))


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
from tartvg.config import Config
from tartvg.data.workers import map_isolated
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
    with StageFolder(Path(sys.argv[1]) / "stage", config, {}).work(), timer("decode"):
        done = list(map_isolated(nap, [0.3, 0.2], 1, 30.0))
    print(json.dumps([sorted(r for _, r in done), timer.flush()]))
"""


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
    assert done == [0.2, 0.3]
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
