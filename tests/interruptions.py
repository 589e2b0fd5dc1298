"""What a run leaves behind that must be equal bit for bit, whether it was interrupted or not; and the interruptions.

    python tests/interruptions.py --kills 100

runs the stages once without interruption; then, for every kill, one stage from where the ones before it have ended:
SIGKILL at a random moment, the same command again, and a comparison. Prints a line per kill; exit code 1 when one of
them ends differently. Each run is a process of its own, forked from one that has done the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from forking import PRELOAD, ROOT, fork

PATIENCE = 900
"""Seconds until something must have happened: long, as the machine may be busy with other work."""


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(path):
    """Everything but wall time and memory."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "perf/"))} for row in rows(path)]


def results(run):
    """What must be equal bit for bit between an interrupted run and one that was not."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.name == "metrics.jsonl":
            found[name] = metrics(path)
        elif path.name == "predictions.jsonl":
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path)]
        elif path.name in ("rollouts.jsonl", "traces.jsonl", "scores.json", "summary.json"):
            found[name] = path.read_text()
        elif path.name == "adapter_model.safetensors" and path.parent.name == "adapter":
            found[name] = path.read_bytes()
    return found


def kill_when(process, is_time):
    """SIGKILL the process as soon as `is_time()` holds."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not is_time():
            assert process.poll() is None, "the process ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


# -- the campaign ------------------------------------------------------------------------------------------------------

STAGES = ("grpo1", "filter", "sft", "evaluate")
MOMENTS = ("grpo1", "checkpoint of grpo1", "filter", "sft", "checkpoint of sft", "evaluate")
SETTINGS = [
    "dataset.planted.num_train=6", "dataset.planted.num_val=2", "dataset.planted.num_test=4",
    "dataset.planted.queries_per_video=2", "grpo.max_steps=4", "grpo.prompts_per_step=2", "grpo.group_size=4",
    "grpo.sampling.max_new_tokens=24", "evaluate.num_samples=1", "evaluate.batch_size=2", "evaluate.policies=[sft]",
    "filter.min_reward=-100", "filter.min_anchors=0", "filter.min_ious=[]", "sft.epochs=1",
    "trainer.num_threads=1", "trainer.checkpoint_every=1", "trainer.progress_bar=false", "tracking.mode=off",
]  # fmt: skip


def start(overrides, log):
    """run.py in a forked process."""
    return fork(overrides, os.environ, (log, log))


def kill_at_random(child, moment, folder, longest, rng):
    """SIGKILL after a random time, or as soon as a checkpoint is being written. Returns whether it came in time."""
    end = time.monotonic() + (PATIENCE if "checkpoint" in moment else rng.uniform(0, longest))
    number = rng.randrange(1, 5) if "grpo1" in moment else 1  # which checkpoint
    while time.monotonic() < end:
        if child.poll() is not None:
            return False
        if "checkpoint" in moment and any(folder.glob(f"checkpoints/.step_{number:06d}.*")):
            break
        time.sleep(0.0005)
    child.kill()
    return child.wait() == -signal.SIGKILL


def settings_in(folder):
    """The small pipeline with an untrained base of its own below `folder`."""
    base = folder / "base"
    if not base.is_dir():
        from experiments.tiny_base.model import build_tiny

        text = "<think>It is <timestamp>1.00 to 2.00</timestamp>.</think><answer>1.00 to 2.00</answer> the red circle"
        model, tokenizer = build_tiny([text] * 3, seed=0)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    return [*SETTINGS, f"policy.path={base}", f"dataset.root={folder}/data", f"runs_dir={folder}"]


def campaign(kills, folder, seed):
    """`kills` interruptions below `folder`: how many ended like the uninterrupted run, and how many came in time."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, rng, log = settings_in(folder), random.Random(seed), folder / "log.txt"
    whole, cut = folder / "whole", folder / "cut"
    durations = {}
    for stage in STAGES:
        begun = time.monotonic()
        assert start([*settings, f"stage={stage}", "name=whole"], log).wait() == 0, f"see {log}"
        durations[stage] = time.monotonic() - begun
    equal = in_time = 0
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        stage = moment.split()[-1]
        shutil.rmtree(cut, ignore_errors=True)
        cut.mkdir()
        for done in STAGES[: STAGES.index(stage)]:
            shutil.copytree(whole / done, cut / done)
        command = [*settings, f"stage={stage}", "name=cut"]
        was_in_time = kill_at_random(start(command, log), moment, cut / stage, 1.1 * durations[stage], rng)
        left = sorted(p.relative_to(cut).as_posix() for p in cut.glob(f"{stage}/**/*") if p.is_file())
        assert start(command, log).wait() == 0, f"see {log}"
        there = {*STAGES[: STAGES.index(stage) + 1], *(["controls"] if stage == "evaluate" else [])}
        expected = {k: v for k, v in results(whole).items() if k.split("/")[0] in there}
        is_equal = results(cut) == expected
        equal, in_time = equal + is_equal, in_time + was_in_time
        print(f"{number + 1:4d} {moment:<20} {'killed' if was_in_time else 'had ended'}, {len(left):2d} files left: "
              f"{'equal' if is_equal else 'DIFFERENT'}", flush=True)  # fmt: skip
    return equal, in_time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/interruptions"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    for name in PRELOAD:
        import_module(name)
    equal, in_time = campaign(options.kills, options.folder.resolve(), options.seed)
    print(f"{equal} of {options.kills} equal to the uninterrupted run; {in_time} kills came before the stage had ended")
    return int(equal != options.kills)


if __name__ == "__main__":
    sys.exit(main())
