"""What a training stage is measured with while it runs, by the settings of `selection`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tartvg.config import Config, SettingError
from tartvg.stages.common import keep_before, prompts_of
from tartvg.training import distributed
from tartvg.training.validation import ROWS, Questions, Selection


def selection_key(config: Config) -> dict[str, Any]:
    """What a stage's result and its metrics depend on, where it is measured."""
    if not config.selection.every:
        return {}
    limit = config.grpo.sampling.max_new_tokens
    return {"selection": config.selection, "asked_at_once": config.evaluate.batch_size, "max_new_tokens": limit}


def selection_of(config: Config, folder: Path, max_steps: int) -> Selection | None:
    """The measurements of the stage in `folder`. Raises SettingError where a validation query has no label."""
    settings = config.selection
    if not settings.every:
        return None
    with distributed.rank_zero_first():
        prompts = prompts_of(config, settings.split)[: settings.num_queries]
    if not all(p.sample.windows for p in prompts):
        what = f"dataset={config.dataset.name.value}, split {settings.split}"
        raise SettingError(f"selection.every: {what}, has queries without a label")
    if distributed.is_rank_zero():
        keep_before(folder / ROWS, max_steps + 1)
    questions = Questions(
        settings, prompts, config.grpo.sampling, config.evaluate.batch_size, config.trainer.num_workers
    )
    return Selection(questions, folder, max_steps)
