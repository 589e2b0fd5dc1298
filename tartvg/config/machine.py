"""Settings of what the method runs on: policy, data set, devices, tracking."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from tartvg.config.choices import DatasetName, Precision, Strategy, TrackingMode, require


@dataclass
class FramesConfig:
    """How a video becomes frames; the model's own preprocessing rules with these numbers."""

    fps: float = 2.0
    """Frames sampled per second of video."""
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 12544
    """Lower bound per frame, in pixels (16 * 28 * 28 in the paper's relatives)."""
    max_pixels: int = 602112
    """Upper bound per frame, in pixels."""
    total_pixels: int = 2809856
    """Budget for all sampled frames together (3584 * 28 * 28)."""
    timeout_s: float = 60.0
    """A file that decodes longer than this is refused."""

    def __post_init__(self) -> None:
        require(self.fps > 0, "policy.frames.fps", "> 0", self.fps)
        require(self.min_frames >= 2, "policy.frames.min_frames", ">= 2", self.min_frames)
        require(self.max_frames >= self.min_frames, "policy.frames.max_frames", ">= min_frames", self.max_frames)
        require(self.min_pixels > 0, "policy.frames.min_pixels", "> 0", self.min_pixels)
        require(self.max_pixels >= self.min_pixels, "policy.frames.max_pixels", ">= min_pixels", self.max_pixels)
        require(self.total_pixels >= self.min_pixels, "policy.frames.total_pixels", ">= min_pixels", self.total_pixels)
        require(self.timeout_s > 0, "policy.frames.timeout_s", "> 0", self.timeout_s)


@dataclass
class LoraConfig:
    """Low-rank adapters on every linear layer of the language model [stated: r = 16, alpha = 32]."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.rank >= 1, "policy.lora.rank", ">= 1", self.rank)
        require(self.alpha > 0, "policy.lora.alpha", "> 0", self.alpha)
        require(0 <= self.dropout < 1, "policy.lora.dropout", "in [0, 1)", self.dropout)


@dataclass
class PolicyConfig:
    """The vision-language model."""

    name: str = MISSING
    path: str = MISSING
    """Hub id or local folder in Hugging Face format; `embedded:tiny` is the one that ships in the package."""
    revision: str | None = None
    """Hub commit, for reproducibility."""
    precision: Precision = Precision.fp32
    attention: str = "sdpa"
    """`eager`, `sdpa` or `flash_attention_2`."""
    shared_prefix: bool = True
    """Run the prompt once per group. False is the slow oracle."""
    feature_cache_mb: int = 512
    """RAM for vision features; 0 encodes every video anew."""
    logit_chunk: int = 4096
    """Completion positions whose logits exist at the same time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)

    def __post_init__(self) -> None:
        require(
            self.attention in ("eager", "sdpa", "flash_attention_2"),
            "policy.attention",
            "eager, sdpa or flash_attention_2",
            self.attention,
        )
        require(self.feature_cache_mb >= 0, "policy.feature_cache_mb", ">= 0", self.feature_cache_mb)
        require(self.logit_chunk >= 1, "policy.logit_chunk", ">= 1", self.logit_chunk)


@dataclass
class PlantedConfig:
    """What the planted videos look like."""

    num_train: int = 96
    """Training videos."""
    num_val: int = 24
    num_test: int = 40
    queries_per_video: int = 3
    seed: int = 0
    """Of the videos, not of the training."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "num_test", "queries_per_video"):
            require(getattr(self, name) >= 1, f"dataset.planted.{name}", ">= 1", getattr(self, name))


@dataclass
class DatasetConfig:
    """The videos and their questions."""

    name: DatasetName = MISSING
    root: str = "data"
    """Folder of annotations; planted videos are drawn into it."""
    videos: str | None = None
    """Folder of video files; null: `<root>/videos`."""
    clip_windows: bool = True
    """Cut ground truth at the end of the video, as it cannot be reached beyond it."""
    limit: int | None = None
    """Use only the first queries of each split."""
    planted: PlantedConfig = field(default_factory=PlantedConfig)

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "dataset.limit", "null or >= 1", self.limit)


@dataclass
class TrainerConfig:
    """Devices and how they work together."""

    accelerator: str = "cpu"
    devices: int = 1
    num_nodes: int = 1
    strategy: Strategy = Strategy.single
    num_threads: int = 2
    """CPU threads of torch; part of what makes a CPU run bit-reproducible."""
    num_workers: int = 0
    """Processes that decode video ahead; 0 decodes in the main process."""
    checkpoint_every: int = 5
    """Optimiser steps between checkpoints."""
    progress_bar: bool = True

    def __post_init__(self) -> None:
        require(self.accelerator in ("cpu", "gpu"), "trainer.accelerator", "cpu or gpu", self.accelerator)
        require(self.devices >= 1, "trainer.devices", ">= 1", self.devices)
        require(self.num_nodes >= 1, "trainer.num_nodes", ">= 1", self.num_nodes)
        require(self.num_threads >= 1, "trainer.num_threads", ">= 1", self.num_threads)
        require(self.num_workers >= 0, "trainer.num_workers", ">= 0", self.num_workers)
        require(self.checkpoint_every >= 1, "trainer.checkpoint_every", ">= 1", self.checkpoint_every)
        single = self.strategy is Strategy.single
        require(
            not single or self.devices * self.num_nodes == 1, "trainer.devices", "1 with strategy=single", self.devices
        )


@dataclass
class TrackingConfig:
    """Weights & Biases beside metrics.jsonl. The key comes from the environment or `wandb login`, never from here."""

    mode: TrackingMode = TrackingMode.offline
    project: str = "tartvg"
    entity: str | None = None
    group: str | None = None
    """null: the name of the run."""
    tags: list[str] = field(default_factory=list)
    num_examples: int = 4
    """Best and worst completions shown in each table."""
