"""validate: annotations and videos looked over before anyone spends a GPU-hour."""

from __future__ import annotations

from tartvg.config import Config
from tartvg.data.validation import run_validation
from tartvg.stages.folder import run_dir


def run_validate(config: Config) -> int:
    """Check the split of `evaluate.split`; returns the exit code.

    0: all usable; 1: a video is not, or not the annotated one; 2: the annotations cannot be used, or hold no query.
    """
    return run_validation(
        config.dataset,
        config.policy.frames,
        config.evaluate.split,
        run_dir(config) / "validate",
        max(1, config.trainer.num_workers),
    )
