"""Settings of validation while a stage trains."""

from __future__ import annotations

from dataclasses import dataclass

from tartvg.config.choices import require
from tartvg.config.fields import Settings, setting


@dataclass
class ValidationConfig(Settings, path="validation"):
    """Measuring a stage on the validation split while it trains, and choosing among its states."""

    every: int = setting(0, at_least=0)
    """Steps between two measurements, of greedy answers; 0: none. The last step is measured, too."""
    num_queries: int | None = setting(64, at_least=1)
    """Ask the first so many queries of the split; null: all."""
    keep_best: bool = False
    """The stage's result is the state with the highest mIoU of all measurements, instead of the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_measured = self.every > 0
        require(
            is_measured or not self.keep_best, "validation.keep_best", "false without validation.every", self.keep_best
        )
