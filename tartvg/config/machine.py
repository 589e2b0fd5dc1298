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
    vision: bool = False
    """Adapters on the vision tower too. Its features then change with every update and are not cached."""

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
    """`sdpa` or `flash_attention_2`. The library's `eager` does not mask a causal pass by itself."""
    shared_prefix: bool = True
    """Run the prompt once per group. False is the slow oracle."""
    memory_saving: bool = False
    """Keep only the layers' inputs for the backward pass and run each layer twice: for long videos. The update then
    costs a third more arithmetic, and its memory grows with the completions' own tokens only."""
    feature_cache_mb: int = 512
    """RAM for vision features; 0 encodes every video anew."""
    feature_cache_dir: str | None = None
    """Folder that keeps vision features beyond the run, shared by runs and processes; null keeps none."""
    feature_cache_dir_mb: int = 20480
    """Limit of that folder; the least recently used entries go first."""
    logit_chunk: int = 4096
    """Completion positions whose logits exist at the same time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)

    def __post_init__(self) -> None:
        require(
            self.attention in ("sdpa", "flash_attention_2"),
            "policy.attention",
            "sdpa or flash_attention_2",
            self.attention,
        )
        require(
            self.shared_prefix or not self.memory_saving,
            "policy.memory_saving",
            "false without policy.shared_prefix",
            self.memory_saving,
        )
        require(self.feature_cache_mb >= 0, "policy.feature_cache_mb", ">= 0", self.feature_cache_mb)
        require(self.feature_cache_dir != "", "policy.feature_cache_dir", "null or a folder", self.feature_cache_dir)
        require(self.feature_cache_dir_mb >= 1, "policy.feature_cache_dir_mb", ">= 1", self.feature_cache_dir_mb)
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
    late_windows: str = "clip"
    """Windows that end after their video: `clip` cuts them there, as nobody can answer beyond it; `drop` also leaves
    them out of training; `keep` takes them as annotated. Test windows are never left out."""
    reversed_windows: str = "drop"
    """Training windows whose start is after their end: `drop`, `swap` or `keep`. Test windows are never touched."""
    limit: int | None = None
    """Use only the first queries of each split."""
    planted: PlantedConfig = field(default_factory=PlantedConfig)

    def __post_init__(self) -> None:
        known = ("drop", "swap", "keep")
        require(self.reversed_windows in known, "dataset.reversed_windows", ", ".join(known), self.reversed_windows)
        known = ("clip", "drop", "keep")
        require(self.late_windows in known, "dataset.late_windows", ", ".join(known), self.late_windows)
        require(self.limit is None or self.limit >= 1, "dataset.limit", "null or >= 1", self.limit)


@dataclass
class TrainerConfig:
    """Devices and how they work together."""

    accelerator: str = "cpu"
    devices: int = 1
    num_nodes: int = 1
    strategy: Strategy = Strategy.single
    """How the processes share the work; `single` is one process."""
    persist_below: int = 100_000
    """ZeRO-3: a parameter with at most this many numbers stays whole on every process; 0 splits all of them."""
    keep_within: int = 1_000_000_000
    """ZeRO-3: a parameter that is used again within so many numbers stays whole until then; 0 splits it after each use.
    DeepSpeed's default, 2 GB in bf16: about four layers of the 7B."""
    timeout_min: float = 60.0
    """Minutes that a process waits for the others inside a step before the run fails."""
    num_threads: int = 2
    """CPU threads of torch; part of what makes a CPU run bit-reproducible."""
    num_workers: int = 0
    """Processes that decode video ahead; 0 decodes in the main process."""
    checkpoint_every: int = 5
    """Optimiser steps between checkpoints."""
    checkpoint_minutes: float = 30.0
    """Longest time between two checkpoints; a step is always finished first."""
    checkpoints_kept: int = 2
    """Older ones are removed. Two is the least: the newest, and the one to use when the newest is damaged."""
    max_skipped_steps: int = 5
    """Steps in a row that may be left out because their loss or gradient is not finite, before the stage stops."""
    memory_gb: float | None = None
    """Memory of one GPU in 10^9 bytes, or on a CPU of the process: a plan that needs more is refused before the start.
    null: what the GPU says; on a CPU, no limit."""
    progress_bar: bool = True

    def __post_init__(self) -> None:
        require(self.accelerator in ("cpu", "gpu"), "trainer.accelerator", "cpu or gpu", self.accelerator)
        require(self.devices >= 1, "trainer.devices", ">= 1", self.devices)
        require(self.num_nodes >= 1, "trainer.num_nodes", ">= 1", self.num_nodes)
        require(self.persist_below >= 0, "trainer.persist_below", ">= 0", self.persist_below)
        require(self.keep_within >= 0, "trainer.keep_within", ">= 0", self.keep_within)
        require(self.timeout_min > 0, "trainer.timeout_min", "> 0", self.timeout_min)
        require(self.num_threads >= 1, "trainer.num_threads", ">= 1", self.num_threads)
        require(self.num_workers >= 0, "trainer.num_workers", ">= 0", self.num_workers)
        require(self.checkpoint_every >= 1, "trainer.checkpoint_every", ">= 1", self.checkpoint_every)
        require(self.memory_gb is None or self.memory_gb > 0, "trainer.memory_gb", "null or > 0", self.memory_gb)
        require(self.checkpoint_minutes > 0, "trainer.checkpoint_minutes", "> 0", self.checkpoint_minutes)
        require(self.checkpoints_kept >= 2, "trainer.checkpoints_kept", ">= 2", self.checkpoints_kept)
        require(self.max_skipped_steps >= 1, "trainer.max_skipped_steps", ">= 1", self.max_skipped_steps)
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
    """null: the name of the run; in a sweep, the run and the sweep."""
    tags: list[str] = field(default_factory=list)
    num_examples: int = 4
    """Best and worst completions shown in each table."""
