"""What a training stage is measured with while it runs, by the settings of `selection`."""

from __future__ import annotations

from typing import Any

from tartvg.config import Config, SettingError
from tartvg.stages.common import keep_before, prompts_of
from tartvg.training import ranks
from tartvg.training.loop import StepModule
from tartvg.training.selection import ROWS, Questions, Selection


def selection_key(config: Config) -> dict[str, Any]:
    """What a stage's result and its metrics depend on, where it is measured."""
    if not config.selection.every:
        return {}
    return {
        "selection": config.selection, "questions": config.anchors.prompt, "asked_at_once": config.evaluate.batch_size,
        "max_new_tokens": config.grpo.sampling.max_new_tokens,
    }  # fmt: skip


def choose_among(module: StepModule, config: Config) -> None:
    """Give the module its validation questions. Raises SettingError where the data set has none with an answer."""
    module.base = config.policy.path
    settings = config.selection
    if not settings.every:
        return
    with ranks.leader_first():
        prompts = prompts_of(config, settings.split)[: settings.num_queries]
    if not all(p.sample.windows for p in prompts):
        what = f"dataset={config.dataset.name.value}, split {settings.split}"
        raise SettingError(f"selection.every: {what}, has queries without a label")
    if ranks.is_leader():
        keep_before(module.run.folder / ROWS, module.run.max_steps + 1)
    questions = Questions(settings, prompts, config.grpo.sampling, config.evaluate.batch_size)
    module.selection = Selection(questions, module.run.folder, module.run.max_steps)
