"""Prompt and clip -> token ids, positions and patches of one prompt.

Legend: S prompt tokens, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tartvg.data.video import Clip
from tartvg.policy.patches import MERGE, patchify
from tartvg.policy.positions import next_position, prompt_positions

VIDEO_PAD = "<|video_pad|>"


@dataclass(frozen=True)
class ClipPatches:
    """What the vision tower needs of one clip."""

    patches: Tensor
    """float32 (N, 1176)."""
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float

    @property
    def num_tokens(self) -> int:
        """Video tokens in the prompt."""
        return self.grid_thw[0] * self.grid_thw[1] * self.grid_thw[2] // MERGE**2


@dataclass(frozen=True)
class PromptInputs:
    """One prompt, ready for the language model except for its vision features."""

    ids: Tensor
    """int64 (S,), the video token repeated for every video token."""
    positions: Tensor
    """int64 (3, S)."""
    is_video: Tensor
    """bool (S,)."""

    @property
    def length(self) -> int:
        """S."""
        return int(self.ids.shape[0])

    @property
    def next_position(self) -> int:
        """The position of the first completion token."""
        return next_position(self.positions)


def clip_patches(clip: Clip) -> ClipPatches:
    """Patches, grid and time step of a decoded clip."""
    patches, grid_thw = patchify(clip.frames)
    return ClipPatches(patches, grid_thw, clip.seconds_per_grid)


def chat_text(tokenizer: Any, user_text: str) -> str:
    """Render the user turn (text, then the video) in the model's own chat template, up to the assistant's first token.

    Marks of special tokens inside the text are broken up: a query can never open a turn or inject a video.
    """
    safe = user_text.replace("<|", "< |")
    messages = [{"role": "user", "content": [{"type": "text", "text": safe}, {"type": "video"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if text.count(VIDEO_PAD) != 1:
        raise ValueError(f"the chat template made {text.count(VIDEO_PAD)} video places instead of 1")
    return str(text)


def encode_prompt(
    tokenizer: Any,
    user_text: str,
    grid_thw: tuple[int, int, int],
    seconds_per_grid: float,
    tokens_per_second: float,
) -> PromptInputs:
    """Token ids and M-RoPE positions of a prompt with one video."""
    before, after = chat_text(tokenizer, user_text).split(VIDEO_PAD)
    ids_before = tokenizer.encode(before, add_special_tokens=False)
    ids_after = tokenizer.encode(after, add_special_tokens=False)
    num_video = grid_thw[0] * grid_thw[1] * grid_thw[2] // MERGE**2
    video_id = tokenizer.convert_tokens_to_ids(VIDEO_PAD)
    ids = torch.tensor(ids_before + [video_id] * num_video + ids_after)
    positions = prompt_positions(len(ids_before), len(ids_after), grid_thw, seconds_per_grid, tokens_per_second)
    return PromptInputs(ids, positions, ids == video_id)
