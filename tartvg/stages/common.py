"""What several stages need: samples, prompts, rubric, policies."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from tartvg.config import Config, SettingError, Strategy
from tartvg.data.datasets import load_samples
from tartvg.policy.allocator import keep_freed_memory
from tartvg.policy.features import FeatureCache
from tartvg.policy.loading import EMBEDDED_TINY, base_path
from tartvg.policy.policy import Policy
from tartvg.prompts import build_prompt
from tartvg.stages.folder import fingerprint, run_dir
from tartvg.types import Prompt

BASE = "base"


def set_up(config: Config) -> None:
    """Process-wide settings that make a CPU run reproducible and quick. Raises SettingError for what cannot run."""
    if config.trainer.strategy is not Strategy.single:
        raise SettingError(
            f"trainer.strategy={config.trainer.strategy.value}: this version trains in one process; "
            "use trainer=cpu or trainer=one_gpu"
        )
    keep_freed_memory()
    torch.set_num_threads(config.trainer.num_threads)
    torch.use_deterministic_algorithms(True, warn_only=config.trainer.accelerator != "cpu")


def prompts_of(config: Config, split: str) -> list[Prompt]:
    """The prompts of a split, in a fixed order. Training and evaluation build them with the same function."""
    samples = load_samples(config.dataset, split)
    if not samples:
        raise SettingError(f"dataset={config.dataset.name.value} has no samples in split {split}")
    return [build_prompt(s, config.anchors) for s in samples]


@lru_cache(maxsize=2)
def _cache(base: str, limit_mb: int) -> FeatureCache:
    return FeatureCache(limit_mb)


def load_policy(config: Config, adapter: Path | None) -> Policy:
    """Base plus adapter on the trainer's device. Policies of one process share the features of the frozen tower."""
    settings = config.policy
    policy = Policy(settings, adapter, config.seed)
    policy.cache = _cache(f"{settings.path}@{settings.revision}:{settings.precision.value}", settings.feature_cache_mb)
    if config.trainer.accelerator == "gpu":
        policy.to(torch.device("cuda", torch.cuda.current_device()))
    return policy


def base_identity(config: Config) -> str:
    """What tells one base model from another."""
    settings = config.policy
    if settings.path == EMBEDDED_TINY or Path(settings.path).is_dir():
        return fingerprint(Path(base_path(settings)))
    return f"{settings.path}@{settings.revision}"


def adapter_of(config: Config, target: str) -> Path | None:
    """The adapter folder of `base` (None), of a stage of this run, or of a path. Raises SettingError."""
    if target == BASE:
        return None
    folder = run_dir(config) / target / "adapter" if target in ("grpo1", "sft", "grpo2") else Path(target)
    if not (folder / "adapter_model.safetensors").is_file():
        raise SettingError(f"{target}: no adapter in {folder}; run that stage first, or give an adapter folder")
    return folder
