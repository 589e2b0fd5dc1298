"""Every setting, typed, documented under its field and with its range beside it. No torch.

Hydra composes YAML into these dataclasses (`register()` puts them into its ConfigStore), so an unknown key or a wrong
type is refused while composing; `to_dataclasses` builds the objects, which refuse values out of range.
"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from tartvg.config.anchors import AnchorsConfig, FilterConfig
from tartvg.config.choices import (
    AdvantageScale,
    Aggregation,
    CountPenalty,
    Credit,
    DatasetName,
    DifficultyRule,
    FormatKind,
    ImportanceLevel,
    IouKind,
    KlEstimator,
    LaunchError,
    LoraCompute,
    LrDecay,
    Normalise,
    Precision,
    PromptStyle,
    SettingError,
    StageName,
    StageStopped,
    TrackingMode,
    Truth,
    VideoWrapper,
    require,
)
from tartvg.config.dataset import DatasetConfig, PlantedConfig
from tartvg.config.difficulty import DifficultyConfig
from tartvg.config.errors import refuse_unknown_keys
from tartvg.config.evaluate import ControlName, EvaluateConfig, FaithfulnessConfig, policy_label
from tartvg.config.grpo import GrpoConfig, SamplingConfig
from tartvg.config.monitors import MonitorName, MonitorsConfig
from tartvg.config.policy import FramesConfig, LoraConfig, PolicyConfig
from tartvg.config.resolvers import register_resolvers
from tartvg.config.reward import RewardConfig
from tartvg.config.run import Config, StageConfig
from tartvg.config.serve import ServeConfig
from tartvg.config.sft import SftConfig
from tartvg.config.tracking import ReportConfig, TrackingConfig
from tartvg.config.trainer import Strategy, TrainerConfig, Zero3Config
from tartvg.config.validation import ValidationConfig

__all__ = [
    "AdvantageScale",
    "Aggregation",
    "AnchorsConfig",
    "Config",
    "ControlName",
    "CountPenalty",
    "Credit",
    "DatasetConfig",
    "DatasetName",
    "DifficultyConfig",
    "DifficultyRule",
    "EvaluateConfig",
    "FaithfulnessConfig",
    "FilterConfig",
    "FormatKind",
    "FramesConfig",
    "GrpoConfig",
    "ImportanceLevel",
    "IouKind",
    "KlEstimator",
    "LaunchError",
    "LoraCompute",
    "LoraConfig",
    "LrDecay",
    "MonitorName",
    "MonitorsConfig",
    "Normalise",
    "PlantedConfig",
    "PolicyConfig",
    "Precision",
    "PromptStyle",
    "ReportConfig",
    "RewardConfig",
    "SamplingConfig",
    "ServeConfig",
    "SettingError",
    "SftConfig",
    "StageConfig",
    "StageName",
    "StageStopped",
    "Strategy",
    "TrackingConfig",
    "TrackingMode",
    "TrainerConfig",
    "Truth",
    "ValidationConfig",
    "VideoWrapper",
    "Zero3Config",
    "policy_label",
    "register",
    "require",
    "to_dataclasses",
]


def register() -> None:
    """Make the schema known to Hydra as `schema`, the first entry of the defaults list, and the resolvers of YAML."""
    from hydra.core.config_store import ConfigStore

    schema = OmegaConf.structured(Config)
    for names in (schema.dataset.parts, schema.dataset.sources):
        OmegaConf.set_struct(names, False)  # their keys are the user's
    ConfigStore.instance().store(name="schema", node=schema)
    register_resolvers()


def to_dataclasses(cfg: DictConfig) -> Config:
    """Resolve a composed Hydra config into typed, checked objects. Raises SettingError naming the setting."""
    refuse_unknown_keys(cfg)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config
