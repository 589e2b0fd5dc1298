"""Settings of Weights & Biases and of the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from tartvg.config.choices import TrackingMode, require
from tartvg.config.fields import Effect, Settings


@dataclass
class TrackingConfig(Settings, path="tracking", effect=Effect.none):
    """Weights & Biases beside metrics.jsonl. The key comes from the environment or `wandb login`, never from here."""

    mode: TrackingMode = TrackingMode.offline
    """Whether runs are sent, kept to be sent later, or not tracked."""
    project: str = "tartvg"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: the one that is logged in."""
    group: str | None = None
    """null: the name of the run; in a sweep, the run and the sweep."""
    tags: list[str] = field(default_factory=list)
    """W&B tags of the run."""


@dataclass
class ReportConfig(Settings, path="report", effect=Effect.none):
    """What stage=report is about; without either, the run or the sweep called `name`."""

    runs: list[str] = field(default_factory=list)
    """Names below runs_dir, of runs or of sweeps, that are compared on one page."""
    group: str | None = None
    """All runs below runs_dir with this W&B group."""
    view: str | None = None
    """Address of a view in W&B that the page links to; `python -m tartvg.tracking` makes one and prints it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.view or self.view.startswith("https://"), "report.view", "an address with https://", self.view)
        for name in self.runs:
            require(is_below(name), "report.runs", "names of folders below runs_dir", name)
        require(not (self.runs and self.group), "report.group", "null beside report.runs", self.group)


def is_below(name: str) -> bool:
    """Return whether a name is a relative path that stays below its folder."""
    return all(part not in ("", ".", "..") for part in name.split("/"))
