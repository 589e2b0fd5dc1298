"""What a family of vision-language models gives. Everything else in `tartvg.policy` is written once.

Legend: N patches of one video, S prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from tartvg.config import PolicyConfig
from tartvg.policy.families import FAMILIES
from tartvg.policy.features import VideoFeatures
from tartvg.policy.inputs import PromptInputs
from tartvg.policy.patches import PatchForm

DECODER_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Every linear layer of the decoder, which the families have named alike so far."""

EncodePrompt = Callable[[Any, str, VideoFeatures, Any, PolicyConfig], PromptInputs]
"""tokenizer, the user's text, facts of the video, the model's config, settings -> ids and positions."""
EncodeVideo = Callable[[Any, Tensor, Tensor], tuple[Tensor, ...]]
"""model (`core.model`), patches (N, width), grid int64 (1, 3) -> features, each (video tokens, hidden).

The first stand where the prompt has its video tokens; the others, if any, are added to the hidden states there behind
the decoder's first layers (`tartvg.policy.deepstack`).
"""


@dataclass(frozen=True)
class Exported:
    """How other programs make a prompt of a video, as near to ours as the library's own settings allow."""

    processor: str
    """The library's class of processor."""
    images: dict[str, Any]
    """For preprocessor_config.json, beside how pictures are cut and normalised."""
    videos: dict[str, Any]
    """For video_preprocessor_config.json, likewise."""
    place: str
    """What the chat template writes for a video."""
    step: str
    """What stands there instead, once for each temporal step: `{time:.1f}` is its second."""


@dataclass(frozen=True)
class Family:
    """One family. Its decoder is `model.language_model` with `embed_tokens`, `layers`, `norm` and `rotary_emb`."""

    title: str
    """Its name in messages and documents."""
    model_class: Any
    """Loads the base: `from_pretrained`."""
    config_class: Any
    """Reads config.json."""
    lora_targets: str
    """Pattern of the decoder's layers that get an adapter."""
    tower_targets: str
    """Pattern of the vision tower's, with `policy.lora.vision`."""
    patch_form: PatchForm
    """Size and normalisation of patches; sides of frames are multiples of `patch_form.side`."""
    step_tokens: int
    """Most text tokens of a prompt that belong to one temporal step of its video: a stamp and its marks."""
    is_time_text: bool
    """Whether the prompt tells the time of each step in words."""
    num_features: Callable[[Any], int]
    """Of a model's config: how many features `encode_video` gives."""
    encode_prompt: EncodePrompt
    encode_video: EncodeVideo
    exported: Callable[[PolicyConfig], Exported]
    """What `stage=export` writes about videos."""
    published: dict[str, dict[str, Any]]
    """Hub id -> the shapes of a released model, so that a plan can be made without its files."""


def family_of(model_type: str) -> Family:
    """Return the family of a `model_type`, one of `FAMILIES`."""
    assert model_type in FAMILIES, f"{model_type} is refused before (tartvg.policy.model_files)"
    family: Family = import_module(f"tartvg.policy.families.{model_type}").FAMILY
    return family


def family_of_published(path: str) -> Family | None:
    """Return the family that has published a model under that Hub id; None where none has."""
    return next((family for name in FAMILIES if path in (family := family_of(name)).published), None)
