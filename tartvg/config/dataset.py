"""Settings of the videos and their questions."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from tartvg.config.choices import DatasetName
from tartvg.config.fields import Effect, Settings, setting


@dataclass
class PlantedConfig(Settings, path="dataset.planted", effect=Effect.content):
    """What the planted videos look like."""

    num_train: int = setting(96, at_least=1)
    """Training videos."""
    num_val: int = setting(24, at_least=1)
    """Validation videos."""
    num_test: int = setting(40, at_least=1)
    """Test videos."""
    queries_per_video: int = setting(3, at_least=1)
    """Events of a video that are asked about."""
    seed: int = 0
    """Of the videos, not of the training."""
    repeat_share: float = setting(0.0, at_least=0, at_most=1)
    """Share of the events that happen two or three times, so that their queries have as many windows. 0 leaves the
    data set as it is: in `planted_long` a twelfth of the queries has two."""


@dataclass
class DatasetConfig(Settings, path="dataset", effect=Effect.content):
    """The videos and their questions."""

    name: DatasetName = setting(MISSING, effect=Effect.value)
    """The reader of the annotations."""
    root: str = "data"
    """Folder of annotations; planted videos are drawn into it."""
    videos: str | None = None
    """Folder of video files; null: `<root>/videos`."""
    late_windows: str = setting("clip", among=("clip", "drop", "keep"), effect=Effect.value)
    """Windows that end after their video: `clip` cuts them there, as nobody can answer beyond it; `drop` also leaves
    them out of training; `keep` takes them as annotated. Test windows are never left out."""
    reversed_windows: str = setting("drop", among=("drop", "swap", "keep"))
    """Training windows whose start is after their end. Test windows are never touched."""
    num_queries: int | None = setting(None, at_least=1)
    """Use only the first so many queries of each split; null: all."""
    max_missing_share: float = setting(0.05, at_least=0, at_most=1, effect=Effect.none)
    """Training is refused where a larger share of its videos is not there, and where none is."""
    planted: PlantedConfig = field(default_factory=PlantedConfig)
