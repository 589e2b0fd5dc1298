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
    DatasetName,
    ImportanceLevel,
    IouKind,
    KlEstimator,
    LoraCompute,
    LrDecay,
    Precision,
    PromptStyle,
    SettingError,
    StageName,
    StageStopped,
    TrackingMode,
    require,
)
from tartvg.config.dataset import DatasetConfig, PlantedConfig
from tartvg.config.errors import refuse_unknown_keys
from tartvg.config.evaluate import ControlName, EvaluateConfig, FaithfulnessConfig, policy_label
from tartvg.config.grpo import GrpoConfig, SamplingConfig
from tartvg.config.monitors import MonitorName, MonitorsConfig
from tartvg.config.policy import FramesConfig, LoraConfig, PolicyConfig
from tartvg.config.resolvers import register_resolvers
from tartvg.config.reward import RewardConfig
from tartvg.config.run import Config, PretrainConfig, StageConfig
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
    "DatasetConfig",
    "DatasetName",
    "EvaluateConfig",
    "FaithfulnessConfig",
    "FilterConfig",
    "FramesConfig",
    "GrpoConfig",
    "ImportanceLevel",
    "IouKind",
    "KlEstimator",
    "LoraCompute",
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
    "SettingError",
    "SftConfig",
    "StageConfig",
    "StageName",
    "StageStopped",
    "Strategy",
    "TrackingConfig",
    "TrackingMode",
    "TrainerConfig",
    "ValidationConfig",
    "Zero3Config",
    "policy_label",
    "register",
    "require",
    "to_dataclasses",
]


def register() -> None:
    """Make the schema known to Hydra as `schema`, the first entry of the defaults list, and the resolvers of YAML."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    register_resolvers()


def to_dataclasses(cfg: DictConfig) -> Config:
    """Resolve a composed Hydra config into typed, checked objects. Raises SettingError naming the setting."""
    refuse_unknown_keys(cfg)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config
