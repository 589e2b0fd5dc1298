"""Settings of the videos and their questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tartvg.config.choices import DatasetName, SettingError, require
from tartvg.config.fields import Effect, Settings, setting
from tartvg.config.place import project_root


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
    """Folder of annotations; planted videos are drawn into it. A part of a mix has a folder of its name below."""
    videos: str | None = None
    """Folder of video files, of a mix with a folder per part; null: `<root>/videos`."""
    late_windows: str = setting("clip", among=("clip", "drop", "keep"), effect=Effect.value)
    """Windows that end after their video: `clip` cuts them there, as nobody can answer beyond it; `drop` also leaves
    them out of training; `keep` takes them as annotated. Test windows are never left out."""
    reversed_windows: str = setting("drop", among=("drop", "swap", "keep"))
    """Training windows whose start is after their end. Test windows are never touched."""
    num_queries: int | None = setting(None, at_least=1)
    """Use only the first so many queries of each split, of a mix those of each part; null: all."""
    max_missing_share: float = setting(0.05, at_least=0, at_most=1, effect=Effect.none)
    """Training is refused where a larger share of its videos is not there, and where none is."""
    planted: PlantedConfig = field(default_factory=PlantedConfig)
    parts: dict[str, float] = setting({}, above=0, below=inf, effect=Effect.value)
    """dataset=mix: the data sets, by the names of their files in conf/dataset, and the weight of each: how often
    training draws from it, relative to the others."""
    sources: dict[str, Any] = field(default_factory=dict)
    """dataset=mix: what differs in a part from its file, as in `dataset.sources.<part>.root=/elsewhere`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is DatasetName.mix:
            require(bool(self.parts), "dataset.parts", "such as {charades_sta: 1, qvhighlights: 2}", self.parts)
        else:
            require(not self.parts, "dataset.parts", "empty without dataset=mix", self.parts)
        strangers = ", ".join(sorted(self.sources.keys() - self.parts.keys()))
        require(not strangers, "dataset.sources", "settings of data sets in dataset.parts", strangers)
        self.sources = {name: _part(self, name) for name in self.parts}


def _part(mix: DatasetConfig, name: str) -> DatasetConfig:
    """The settings of one part: its file, the folder and the rules of the mix over it, and its own over these."""
    own = mix.sources.get(name, {})
    if isinstance(own, DatasetConfig):
        return own
    require(isinstance(own, dict), f"dataset.sources.{name}", "settings by name", own)
    folder = project_root() / "conf" / "dataset"
    known = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != DatasetName.mix.value)
    require(name in known, "dataset.parts", f"among {', '.join(known)}", name)
    shared = {
        "root": f"{mix.root}/{name}",
        "videos": mix.videos and f"{mix.videos}/{name}",
        "late_windows": mix.late_windows,
        "reversed_windows": mix.reversed_windows,
        "num_queries": mix.num_queries,
    }
    schema = OmegaConf.structured(DatasetConfig)
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(folder / f"{name}.yaml"), shared, own))
    except OmegaConfBaseException as error:
        raise SettingError(f"dataset.sources.{name}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, DatasetConfig)
    return settings
