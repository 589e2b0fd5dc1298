"""Settings of the vision-language model: weights, adapters, frames and caches."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from tartvg.config.choices import LoraCompute, Precision, VideoWrapper, require
from tartvg.config.fields import Effect, Settings, setting


@dataclass
class FramesConfig(Settings, path="policy.frames"):
    """How a video becomes frames; the model's own preprocessing rules with these numbers."""

    fps: float = setting(2.0, above=0)
    """Frames sampled per second of video."""
    min_frames: int = setting(4, at_least=2)
    """Frames of the shortest video."""
    max_frames: int = 768
    """Frames of the longest video."""
    min_pixels: int = setting(12544, above=0)
    """Lower bound per frame, in pixels (16 * 28 * 28 in the paper's relatives)."""
    max_pixels: int = 602112
    """Upper bound per frame, in pixels."""
    total_pixels: int = 2809856
    """Budget for all sampled frames together (3584 * 28 * 28)."""
    timeout_s: float = setting(60.0, above=0, effect=Effect.none)
    """A file that decodes longer than this is refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_frames >= self.min_frames, "policy.frames.max_frames", ">= min_frames", self.max_frames)
        require(self.max_pixels >= self.min_pixels, "policy.frames.max_pixels", ">= min_pixels", self.max_pixels)
        require(self.total_pixels >= self.min_pixels, "policy.frames.total_pixels", ">= min_pixels", self.total_pixels)


@dataclass
class LoraConfig(Settings, path="policy.lora"):
    """Low-rank adapters on every linear layer of the language model [stated: r = 16, alpha = 32]."""

    rank: int = setting(16, at_least=1)
    """Rank of the update of each matrix."""
    alpha: int = setting(32, above=0)
    """The update is scaled by alpha / rank."""
    dropout: float = setting(0.0, at_least=0, below=1)
    """Dropout on the adapters' inputs, in training."""
    compute: LoraCompute = LoraCompute.peft
    """`native` computes in `policy.precision` on the same fp32 weights: quicker beside a bf16 base, in less memory.
    In fp32 the two differ by rounding only. The adapter's files are PEFT's either way."""
    vision: bool = False
    """Adapters on the vision tower too. Its features then change with every update and are not cached."""


@dataclass
class PolicyConfig(Settings, path="policy"):
    """The vision-language model."""

    name: str = setting(MISSING, effect=Effect.none)
    """What runs and tables call the policy."""
    path: str = setting(MISSING, effect=Effect.content)
    """Hub id or local folder in Hugging Face format; `embedded:tiny` and `embedded:tiny3` ship in the package."""
    revision: str | None = setting(None, effect=Effect.content)
    """Hub commit, for reproducibility."""
    precision: Precision = Precision.fp32
    """Arithmetic of the weights and activations."""
    attention: str = setting("sdpa", among=("sdpa", "flash_attention_2"))
    """Attention kernels. The library's `eager` does not mask a causal pass by itself."""
    video_wrapper: VideoWrapper = VideoWrapper.inner
    """Qwen3-VL only. `inner` writes what transformers 4.57 wrote, with which its weights were released: vision marks
    around each temporal step. Since 5.10 the library keeps the chat template's pair around the whole video too, as
    `outer` does. Which of the two the weights have seen is not published."""
    shared_prefix: bool = True
    """Run the prompt once per group. False is the slow oracle."""
    activation_checkpointing: bool | str = setting(False, effect=Effect.rounding)
    """Keep only the layers' inputs for the backward pass and run each layer twice: for long videos. The update then
    costs a third more arithmetic, and its memory grows with the completions' own tokens only. `auto` does so for the
    groups that would not fit into memory otherwise, as the memory model has it; under ZeRO-3 for all of them."""
    feature_cache_gib: float = setting(0.5, at_least=0, effect=Effect.none)
    """RAM for vision features, in GiB; 0 encodes every video anew."""
    feature_cache_dir: str | None = setting(None, effect=Effect.none)
    """Folder that keeps vision features beyond the run, shared by runs and processes; null keeps none."""
    feature_cache_dir_gib: float = setting(20.0, above=0, effect=Effect.none)
    """Limit of that folder, in GiB; the least recently used entries go first."""
    logit_chunk: int = setting(4096, at_least=1, effect=Effect.rounding)
    """Completion positions whose logits exist at the same time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.activation_checkpointing
        name = "policy.activation_checkpointing"
        require(value in (True, False, "auto"), name, "true, false or auto", value)
        require(self.shared_prefix or not value, name, "false without policy.shared_prefix", value)
        require(self.feature_cache_dir != "", "policy.feature_cache_dir", "null or a folder", self.feature_cache_dir)
