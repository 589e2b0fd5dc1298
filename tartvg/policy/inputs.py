"""Prompt and clip -> token ids, positions and patches of one prompt: what all families have in common.

Legend: S prompt tokens, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tartvg.data.video import Clip
from tartvg.policy.patches import TEMPORAL_PATCH, PatchForm, patchify

VIDEO_PAD = "<|video_pad|>"


@dataclass(frozen=True)
class ClipPatches:
    """What the vision tower needs of one clip."""

    patches: Tensor
    """float32 (N, 3 * 2 * patch * patch)."""
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float
    stamps: tuple[float, ...] = ()
    """Seconds of each temporal step: the mean of its first and its last frame's."""


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


def next_position(positions: Tensor) -> int:
    """Return the position of the token that follows (3, S): the largest one so far plus one."""
    return int(positions.max()) + 1


def clip_patches(clip: Clip, form: PatchForm) -> ClipPatches:
    """Patches, grid and times of a decoded clip. The last frame of an odd number is taken twice."""
    missing = -len(clip.times) % TEMPORAL_PATCH
    frames = np.concatenate([clip.frames, clip.frames[-1:]]) if missing else clip.frames
    times = clip.times + clip.times[-1:] * missing
    patches, grid_thw = patchify(frames, form)
    stamps = tuple((a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True))
    return ClipPatches(patches, grid_thw, clip.seconds_per_grid, stamps)


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
