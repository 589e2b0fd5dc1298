"""check_data: annotations and videos looked over before anyone spends a GPU-hour."""

from __future__ import annotations

from tartvg.config import Config
from tartvg.data.check import check_split
from tartvg.stages.folder import run_dir


def run_check_data(config: Config) -> int:
    """Check the split of `evaluate.split`; returns the exit code.

    0: all usable; 1: a video is not, or not the annotated one; 2: the annotations cannot be used, or hold no query.
    """
    return check_split(
        config.dataset,
        config.policy.frames,
        config.evaluate.split,
        run_dir(config) / "check_data",
        max(1, config.trainer.num_workers),
    )
