"""What several stages need: samples, prompts, rubric, policies."""

from __future__ import annotations

import gc
from functools import lru_cache
from pathlib import Path

import torch

from tartvg.config import Config, SettingError
from tartvg.data.clips import DECODERS, ClipReader
from tartvg.data.datasets import load_samples
from tartvg.policy.features import FeatureCache
from tartvg.policy.loading import ADAPTER_FILE, EMBEDDED_TINY, base_path
from tartvg.policy.policy import Policy
from tartvg.prompts import build_prompt
from tartvg.records import read_jsonl, write_jsonl
from tartvg.stages.folder import fingerprint, run_dir
from tartvg.training.out_of_memory import free_cached_memory
from tartvg.types import Prompt

BASE = "base"
QUARANTINE = "quarantine.jsonl"
"""In the run's folder: videos that could not be decoded, and why."""


def prompts_of(config: Config, split: str) -> list[Prompt]:
    """The prompts of a split, in a fixed order. Training and evaluation build them with the same function."""
    try:
        samples = load_samples(config.dataset, split)
    except ValueError as error:  # a file that is refused is the user's to correct
        raise SettingError(f"dataset={config.dataset.name.value}: {error}") from error
    if not samples:
        raise SettingError(f"dataset={config.dataset.name.value} has no samples in split {split}")
    return [build_prompt(s, config.anchors) for s in samples]


@lru_cache(maxsize=2)
def _cache(base: str, limit_gib: float) -> FeatureCache:
    return FeatureCache(limit_gib)


def load_policy(config: Config, adapter: Path | None, *, is_trained: bool = False) -> Policy:
    """Base plus adapter on the trainer's device. Policies of one process share the features of the frozen tower.

    Under ZeRO-3 a policy that is to be trained (`is_trained`) stays in main memory until its weights are split.
    """
    free_finished_policies()
    # first: they import while the weights are read, and start before CUDA and the network are up
    DECODERS.start(config.trainer.num_workers)
    settings = config.policy
    policy = Policy(settings, adapter, config.seed)
    policy.cache = _cache(f"{settings.path}@{settings.revision}:{settings.precision.value}", settings.feature_cache_gib)
    policy.clips = clip_reader(config)
    is_partitioned = is_trained and config.trainer.strategy.zero_stage == 3
    if config.trainer.accelerator == "gpu" and not is_partitioned:
        policy.to(torch.device("cuda", torch.cuda.current_device()))
    if config.trainer.accelerator == "gpu":
        policy.timer.wait = torch.cuda.synchronize
    return policy


def free_finished_policies() -> None:
    """Give back the memory of the policies before: module, trainer and optimiser refer to one another in circles."""
    gc.collect()
    free_cached_memory()


def clip_reader(config: Config) -> ClipReader:
    """Decodes for this run, whose stages and processes share one list of videos that cannot be decoded."""
    return ClipReader(run_dir(config) / QUARANTINE)


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
    if folder.is_file() or (folder / "adapter_model.bin").exists():
        raise SettingError(
            f"{target}: adapters are read from a folder with {ADAPTER_FILE}; other forms (.bin, .pt, .ckpt) "
            "may hold pickled Python objects, which run code when they are read, and are refused"
        )
    if not (folder / ADAPTER_FILE).is_file():
        raise SettingError(f"{target}: no adapter in {folder}; run that stage first, or give an adapter folder")
    return folder


def keep_before(path: Path, step: int) -> None:
    """Drop the lines (rollouts, faults) of steps that a resumed stage is about to do again."""
    if path.is_file():
        rows = read_jsonl(path, is_partial_allowed=True)
        write_jsonl(path, [row for row in rows if row["step"] < step])
