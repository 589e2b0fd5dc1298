"""Every setting, typed, documented under its field and range-checked. No torch.

Hydra composes YAML into these dataclasses (`register()` puts them into its ConfigStore), so an unknown key or a wrong
type is refused while composing; `__post_init__` refuses values out of range when `to_dataclasses` builds the objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tartvg.config.choices import (
    AdvantageScale,
    Aggregation,
    CountPenalty,
    DatasetName,
    ImportanceLevel,
    IouKind,
    KlEstimator,
    LrDecay,
    Precision,
    PromptStyle,
    SettingError,
    StageName,
    StageStopped,
    Strategy,
    TrackingMode,
    require,
)
from tartvg.config.errors import refuse_unknown_keys
from tartvg.config.machine import (
    DatasetConfig,
    FramesConfig,
    LoraConfig,
    PlantedConfig,
    PolicyConfig,
    TrackingConfig,
    TrainerConfig,
)
from tartvg.config.method import (
    AnchorsConfig,
    EvaluateConfig,
    FilterConfig,
    GrpoConfig,
    PretrainConfig,
    RewardConfig,
    SamplingConfig,
    SelectionConfig,
    SftConfig,
)
from tartvg.config.monitors import ControlName, ControlsConfig, MonitorName, MonitorsConfig

__all__ = [
    "AdvantageScale",
    "Aggregation",
    "AnchorsConfig",
    "Config",
    "ControlName",
    "ControlsConfig",
    "CountPenalty",
    "DatasetConfig",
    "DatasetName",
    "EvaluateConfig",
    "FilterConfig",
    "FramesConfig",
    "GrpoConfig",
    "ImportanceLevel",
    "IouKind",
    "KlEstimator",
    "LoraConfig",
    "LrDecay",
    "MonitorName",
    "MonitorsConfig",
    "PlantedConfig",
    "PolicyConfig",
    "Precision",
    "PretrainConfig",
    "PromptStyle",
    "ReportConfig",
    "RewardConfig",
    "SamplingConfig",
    "SelectionConfig",
    "SettingError",
    "SftConfig",
    "StageConfig",
    "StageName",
    "StageStopped",
    "Strategy",
    "TrackingConfig",
    "TrackingMode",
    "TrainerConfig",
    "register",
    "require",
    "to_dataclasses",
]


@dataclass
class StageConfig:
    """Which part of the method runs."""

    name: StageName = StageName.pipeline
    sequence: list[StageName] = field(default_factory=list)
    """Stages that `pipeline` runs, in order."""


@dataclass
class ReportConfig:
    """What stage=report is about; without either, the run or the sweep called `name`."""

    runs: list[str] = field(default_factory=list)
    """Names below runs_dir, of runs or of sweeps, that are compared on one page."""
    group: str | None = None
    """All runs below runs_dir with this W&B group."""

    def __post_init__(self) -> None:
        for name in self.runs:
            require(_is_below(name), "report.runs", "names of folders below runs_dir", name)
        require(not (self.runs and self.group), "report.group", "null beside report.runs", self.group)


def _is_below(name: str) -> bool:
    return all(part not in ("", ".", "..") for part in name.split("/"))


@dataclass
class Config:
    """One run."""

    name: str = "default"
    """Folder under runs_dir; may be nested. Jobs of a sweep get one of their own below it."""
    runs_dir: str = "runs"
    seed: int = 0
    reuse_stages: bool | None = None
    """Copy a stage that another run below runs_dir has finished with the same settings, inputs and code, instead of
    doing it again. null: in a sweep only."""
    init_adapter: str | None = None
    """Adapter folder that grpo1, grpo2 or ground starts from, instead of the stage's own rule."""
    video: str | None = None
    """stage=ground: the video file."""
    query: str | None = None
    """stage=ground: the sentence."""
    stage: StageConfig = field(default_factory=StageConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    anchors: AnchorsConfig = field(default_factory=AnchorsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    experiments: Any = None
    """Group choice only; carries no values of its own."""
    sweeps: Any = None
    """Group choice only; carries no values of its own."""

    def __post_init__(self) -> None:
        require(_is_below(self.name), "name", "a folder below runs_dir", self.name)
        require(self.seed >= 0, "seed", ">= 0", self.seed)
        for group in ("experiments", "sweeps"):
            # Without that header the file's values would land here, where nobody reads them.
            values = getattr(self, group)
            require(values is None, group, "a file that begins with `# @package _global_`", values)
        if self.stage.name is StageName.ground:
            require(bool(self.video), "video", "a video file: stage=ground video=clip.mp4", self.video)
            require(bool(self.query), "query", 'a sentence: stage=ground query="..."', self.query)


def register() -> None:
    """Make the schema known to Hydra as `schema`, the first entry of the defaults list."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def to_dataclasses(cfg: DictConfig) -> Config:
    """Resolve a composed Hydra config into typed, checked objects. Raises SettingError naming the setting."""
    refuse_unknown_keys(cfg)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config
