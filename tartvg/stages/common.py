"""What several stages need: samples, prompts, rubric, policies."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from tartvg.config import Config, SettingError, Truth
from tartvg.data.clips import DECODERS, ClipReader
from tartvg.data.datasets import load_samples
from tartvg.launch.terminal import warn_once
from tartvg.policy.features import FeatureCache
from tartvg.policy.loading import EMBEDDED, base_path, check_adapter
from tartvg.policy.policy import Policy
from tartvg.prompts import build_prompt
from tartvg.records import read_jsonl, write_jsonl
from tartvg.stages.folder import run_dir
from tartvg.stages.keys import data_identity, fingerprint
from tartvg.training.out_of_memory import free_cached_memory
from tartvg.types import Prompt

BASE = "base"
QUARANTINE = "quarantine.jsonl"
"""In the run's folder: videos that could not be decoded, and why."""


def prompts_of(config: Config, split: str) -> list[Prompt]:
    """Build the prompts of a split, in a fixed order, for training and evaluation alike."""
    try:
        samples = load_samples(config.dataset, split)
    except ValueError as error:  # a file that is refused is the user's to correct
        raise SettingError(f"dataset={config.dataset.name.value}: {error}") from error
    known = {sample.source for sample in samples}
    for name in config.dataset.parts or [""]:
        if name not in known:
            raise SettingError(f"dataset={name or config.dataset.name.value} has no samples in split {split}")
    return [build_prompt(s, config.anchors) for s in samples]


def train_data(config: Config) -> dict[str, str]:
    """The part of a training's key that is its data. Raises SettingError where too many of the videos are missing."""
    prompts = prompts_of(config, "train")
    refuse_missing_videos(config, "train", prompts, config.dataset.max_missing_share)
    return {"data": data_identity(p.sample for p in prompts)}


def refuse_missing_videos(config: Config, split: str, prompts: Sequence[Prompt], max_share: float) -> None:
    """Say how many of the videos are not there. Raises SettingError for more than `max_share`, and for all of them."""
    videos = dict.fromkeys(p.sample.video for p in prompts)
    missing = [video for video in videos if not video.is_file()]
    if not missing:
        return
    folder = config.dataset.videos or Path(config.dataset.root) / "videos"
    found = f"{len(missing)} of {len(videos)} videos are missing in {folder}, such as {missing[0].name}"
    if len(missing) == len(videos) or len(missing) > max_share * len(videos):
        more = "" if len(missing) == len(videos) else ", or go on without them by dataset.max_missing_share=1"
        raise SettingError(f"dataset={config.dataset.name.value}, split {split}: {found}; set dataset.videos{more}")
    warn_once(f"split {split}: {found}")


def first_of(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts in their order, of a mix equally many of each source as far as it has them."""
    turns: Counter[str] = Counter()
    ranked = []
    for index, prompt in enumerate(prompts):
        ranked.append((turns[prompt.sample.source], index))
        turns[prompt.sample.source] += 1
    return [prompts[index] for index in sorted(index for _, index in sorted(ranked)[:limit])]


def say_windows(stage: str, prompts: Sequence[Prompt], rule: Truth) -> None:
    """Print how many queries `reward.truth` concerns; nothing where none has several windows."""
    count = sum(len(p.sample.windows) > 1 for p in prompts)
    if count:
        what = {
            Truth.first: "rewards the first window alone",
            Truth.best: "compares each answer with the window of highest soft IoU",
            Truth.all: "compares each answer with the union of the windows",
        }[rule]
        print(f"{stage}: {count} of {len(prompts)} queries have several windows; reward.truth={rule.value} {what}")


@lru_cache(maxsize=2)
def _cache(base: str, limit_gib: float) -> FeatureCache:
    return FeatureCache(limit_gib)


def load_policy(
    config: Config, adapter: Path | None, *, is_trained: bool = False, num_decoders: int | None = None
) -> Policy:
    """Base plus adapter on the trainer's device. Policies of one process share the features of the frozen tower.

    Under ZeRO-3 a policy that is to be trained (`is_trained`) stays in main memory until its weights are split.
    `num_decoders` are started for it; None: `trainer.num_workers`.
    """
    free_finished_policies()
    # first: they import while the weights are read, and start before CUDA and the network are up
    DECODERS.start(config.trainer.num_workers if num_decoders is None else num_decoders)
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
    """Identify the base model, whose files have been checked."""
    settings = config.policy
    if settings.path.startswith(EMBEDDED) or Path(settings.path).is_dir():
        return fingerprint(Path(base_path(settings)))
    return f"{settings.path}@{settings.revision}"


def adapter_of(config: Config, target: str, setting: str = "evaluate.policies") -> Path | None:
    """The adapter folder of `base` (None), of a stage of this run, or of a path.

    Raises SettingError for one that cannot be used on the base, before any weight is read; `setting` has named it.
    """
    if target == BASE:
        return None
    is_stage = target in ("grpo1", "sft", "grpo2")
    folder = run_dir(config) / target / "adapter" if is_stage else Path(target)
    setting = "init_adapter" if target == config.init_adapter else setting
    check_adapter(config.policy, folder, f"{target}: {folder}" if is_stage else f"{setting}={target}")
    return folder


def keep_before(path: Path, step: int) -> None:
    """Drop the lines (rollouts, faults) of steps that a resumed stage is about to do again."""
    if path.is_file():
        rows = read_jsonl(path, is_partial_allowed=True)
        write_jsonl(path, [row for row in rows if row["step"] < step])
