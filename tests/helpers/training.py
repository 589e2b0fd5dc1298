"""Trainings of the untrained tiny base, in this process."""

import json

from tartvg.config import (
    AnchorsConfig,
    GrpoConfig,
    RewardConfig,
    SamplingConfig,
    TrackingConfig,
    TrackingMode,
    TrainerConfig,
)
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training.batches import StepDataset
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.step import StageRun
from tartvg.training.trainer import make_trainer

CPU = TrainerConfig(progress_bar=False)
OFF = TrackingConfig(mode=TrackingMode.off)
GRPO = GrpoConfig(max_steps=2, group_size=4, prompts_per_step=2, lr=1e-2, sampling=SamplingConfig(max_new_tokens=12))


def make_grpo(policy, folder, rubric, settings=GRPO):
    run = StageRun("grpo1", folder, 0, settings.max_steps, TrainerConfig(checkpoint_every=1))
    tracker = Tracker(folder, OFF, "r", "grpo1", {}, 0)
    tracker.__enter__()
    return GrpoModule(policy, rubric, settings, AnchorsConfig(), run, tracker)


RUBRIC = Rubric(RewardConfig(), AnchorsConfig())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fit(module, folder, prompts, steps, per_step=2):
    data = StepDataset(prompts, per_step, 0, module.start_step, steps)
    make_trainer(CPU, folder).fit(module, data)
