"""The frozen tower sees each video once, whatever the group size, the reference and the number of updates."""

import dataclasses

import pytest

from tartvg.config import (
    AnchorsConfig,
    FramesConfig,
    GrpoConfig,
    PlantedConfig,
    PolicyConfig,
    RewardConfig,
    SamplingConfig,
    TrackingConfig,
    TrackingMode,
    TrainerConfig,
)
from tartvg.data.planted import load_planted
from tartvg.policy.policy import Policy
from tartvg.prompts import build_prompt
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training.batches import StepDataset
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.step import StageRun
from tartvg.training.trainer import make_trainer

pytestmark = pytest.mark.slow
NUM_VIDEOS, QUERIES = 3, 2


class Counting(GrpoModule):
    """Notes how often the tower has run at the end of each step."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = 0
        self.after_step = []
        self.policy.core.model.visual.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def end(self, step, metrics):
        super().end(step, metrics)
        self.after_step.append(self.calls)


@pytest.fixture(scope="module")
def prompts(planted_root):
    samples = load_planted(planted_root, PlantedConfig(NUM_VIDEOS, 1, 1, QUERIES), "train", "planted")
    assert len({s.video for s in samples}) == NUM_VIDEOS
    return [build_prompt(s, AnchorsConfig()) for s in samples]


def train(base, folder, prompts, grpo, **changes):
    """Train by Lightning as a stage does; returns the tower's calls so far after each step."""
    frames = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)
    policy = Policy(dataclasses.replace(PolicyConfig(name="t", path=str(base), frames=frames), **changes))
    run = StageRun("grpo1", folder, 0, grpo.max_steps)
    with Tracker(folder, TrackingConfig(mode=TrackingMode.off), "r", "grpo1", {}, 0) as tracker:
        module = Counting(policy, Rubric(RewardConfig(), AnchorsConfig()), grpo, AnchorsConfig(), run, tracker)
        steps = StepDataset(prompts, grpo.prompts_per_step, 0, 0, grpo.max_steps)
        make_trainer(TrainerConfig(progress_bar=False), folder).fit(module, steps)
    return module.after_step


GRPO = GrpoConfig(
    max_steps=6, group_size=2, prompts_per_step=2, lr=1e-3, kl_coef=0.04, sampling=SamplingConfig(max_new_tokens=4)
)


@pytest.mark.parametrize(
    "change",
    [dict(), dict(group_size=6), dict(num_iterations=3), dict(kl_coef=0.0)],
    ids=["plain", "six rollouts", "three updates", "no reference"],
)
def test_one_call_per_video_and_none_in_the_second_epoch(untrained_base, tmp_path, prompts, change):
    """An epoch is three steps of two queries each; the two queries of a video share its features."""
    after = train(untrained_base, tmp_path, prompts, dataclasses.replace(GRPO, **change))
    assert len(after) == 6
    assert after[2] == NUM_VIDEOS  # the first epoch
    assert after[5] == NUM_VIDEOS  # the second one


def test_without_a_cache_a_step_still_encodes_each_query_once(untrained_base, tmp_path, prompts):
    after = train(untrained_base, tmp_path, prompts, GRPO, feature_cache_gib=0)
    assert after == [2, 4, 6, 8, 10, 12]


def test_a_new_process_with_a_disk_cache_never_calls_it(untrained_base, tmp_path, prompts):
    disk = dict(feature_cache_dir=str(tmp_path / "features"))
    assert train(untrained_base, tmp_path / "a", prompts, GRPO, **disk)[-1] == NUM_VIDEOS
    assert train(untrained_base, tmp_path / "b", prompts, GRPO, **disk)[-1] == 0
