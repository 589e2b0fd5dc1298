"""All settings of one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tartvg.config.anchors import AnchorsConfig, FilterConfig
from tartvg.config.choices import StageName, require
from tartvg.config.dataset import DatasetConfig
from tartvg.config.difficulty import DifficultyConfig
from tartvg.config.evaluate import EvaluateConfig, ExportConfig, FaithfulnessConfig
from tartvg.config.fields import Effect, Settings, setting
from tartvg.config.grpo import GrpoConfig
from tartvg.config.monitors import MonitorsConfig
from tartvg.config.policy import PolicyConfig
from tartvg.config.reward import RewardConfig
from tartvg.config.serve import ServeConfig
from tartvg.config.sft import SftConfig
from tartvg.config.tracking import ReportConfig, TrackingConfig, is_below
from tartvg.config.trainer import TrainerConfig
from tartvg.config.validation import ValidationConfig


@dataclass
class StageConfig(Settings, path="stage", effect=Effect.none):
    """Which part of the method runs."""

    name: StageName = StageName.pipeline
    """The stage, or `pipeline` for several."""
    sequence: list[StageName] = field(default_factory=list)
    """Stages that `pipeline` runs, in order."""


@dataclass
class Config(Settings):
    """One run."""

    name: str = setting("default", effect=Effect.none)
    """Folder under runs_dir; may be nested. Jobs of a sweep get one of their own below it."""
    runs_dir: str = setting("runs", effect=Effect.none)
    """Where all runs lie."""
    seed: int = setting(0, at_least=0)
    """Of the order of prompts, of sampling and of new weights."""
    reuse_stages: bool | None = setting(None, effect=Effect.none)
    """Copy a stage that another run below runs_dir has finished with the same settings, inputs and code, instead of
    doing it again. null: in a sweep only."""
    overwrite: bool = setting(False, effect=Effect.none)
    """Start a training stage anew whose settings or inputs have changed; its old results are moved aside. Without it
    such a stage is refused."""
    init_adapter: str | None = setting(None, effect=Effect.content)
    """Adapter folder that grpo1, grpo2, ground, serve or export starts from, instead of the stage's own rule."""
    video: str | None = setting(None, effect=Effect.none)
    """stage=ground: the video file."""
    query: str | None = setting(None, effect=Effect.none)
    """stage=ground: the sentence."""
    stage: StageConfig = field(default_factory=StageConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    anchors: AnchorsConfig = field(default_factory=AnchorsConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    faithfulness: FaithfulnessConfig = field(default_factory=FaithfulnessConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)
    experiments: Any = setting(None, effect=Effect.none)
    """Group choice only; carries no values of its own."""
    sweeps: Any = setting(None, effect=Effect.none)
    """Group choice only; carries no values of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_below(self.name), "name", "a folder below runs_dir", self.name)
        for group in ("experiments", "sweeps"):
            # Without that header the file's values would land here, where nobody reads them.
            values = getattr(self, group)
            require(values is None, group, "a file that begins with `# @package _global_`", values)
        if self.stage.name is StageName.ground:
            require(bool(self.video), "video", "a video file: stage=ground video=clip.mp4", self.video)
            require(bool(self.query), "query", 'a sentence: stage=ground query="..."', self.query)
