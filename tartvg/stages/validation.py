"""What a training stage is measured with while it runs, by the settings of `validation`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tartvg.config import Config, SettingError
from tartvg.stages.common import first_of, keep_before, prompts_of
from tartvg.stages.keys import data_identity, settings_of
from tartvg.training import distributed
from tartvg.training.validation import ROWS, Questions, Validation

SPLIT = "val"
"""Never `test`: a policy chosen by its test scores has none left that say anything."""


def validation_key(config: Config) -> dict[str, Any]:
    """Return what a stage's result and its metrics depend on, where it is measured."""
    if not config.validation.every:
        return {}
    found = settings_of(config, "validation", "evaluate.batch_size", "grpo.sampling.max_new_tokens")
    prompts = first_of(prompts_of(config, SPLIT), config.validation.num_queries)
    return {**found, "validation_data": data_identity(p.sample for p in prompts)}


def validation_of(config: Config, folder: Path, max_steps: int) -> Validation | None:
    """Make the validation of the stage in `folder`. Raises SettingError where a validation query has no label."""
    settings = config.validation
    if not settings.every:
        return None
    with distributed.rank_zero_first():
        prompts = first_of(prompts_of(config, SPLIT), settings.num_queries)
    if not all(p.sample.windows for p in prompts):
        what = f"dataset={config.dataset.name.value}, split {SPLIT}"
        raise SettingError(f"validation.every: {what}, has queries without a label")
    if distributed.is_rank_zero():
        keep_before(folder / ROWS, max_steps + 1)
    questions = Questions(
        settings, prompts, config.grpo.sampling, config.evaluate.batch_size, config.trainer.num_workers
    )
    return Validation(questions, folder, max_steps)
