"""Qwen2.5-VL: time is in the positions.

M-RoPE positions come from their original definition and are handed explicitly to every forward pass. The released
weights were trained so that a video's temporal ids follow absolute time and the text after it continues from the
largest id so far plus one. Libraries have changed that rule more than once; a policy that samples with one rule and
trains with another is off-policy without a sign of it. So nothing here is left to the library.

Legend: S sequence length, the first axis 3 is (temporal, height, width).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tartvg.config import PolicyConfig
from tartvg.policy.families.family import DECODER_LINEARS, Exported, Family
from tartvg.policy.features import VideoFeatures
from tartvg.policy.inputs import VIDEO_PAD, PromptInputs, chat_text, next_position
from tartvg.policy.patches import MERGE, PatchForm

PATCH_FORM = PatchForm(
    size=14, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)  # fmt: skip
VISION = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
)  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": dict(
        text_config=dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                         num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
        vision_config={**VISION, "out_hidden_size": 2048}, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": dict(
        text_config=dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                         num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
        vision_config={**VISION, "out_hidden_size": 3584}, tie_word_embeddings=False,
    ),
}  # fmt: skip


def video_positions(
    start: int, grid_thw: tuple[int, int, int], seconds_per_grid: float, tokens_per_second: float
) -> Tensor:
    """Positions of one video's tokens: int64 (3, T*H*W/4), all shifted by `start`.

    The temporal id of grid step t is floor(t * seconds_per_grid * tokens_per_second) (Qwen2.5-VL report, section 2.1).
    """
    grid_t, grid_h, grid_w = grid_thw[0], grid_thw[1] // MERGE, grid_thw[2] // MERGE
    # in float32 as the original code does it, so that a product that lands on a whole number rounds the same way
    temporal = (torch.arange(grid_t) * (seconds_per_grid * tokens_per_second)).long()
    t, h, w = torch.meshgrid(temporal, torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
    return torch.stack([t, h, w]).reshape(3, -1) + start


def prompt_positions(
    num_before: int,
    num_after: int,
    grid_thw: tuple[int, int, int],
    seconds_per_grid: float,
    tokens_per_second: float,
) -> Tensor:
    """Positions of a prompt with text, one video, and text: int64 (3, S)."""
    before = torch.arange(num_before).expand(3, -1)
    video = video_positions(num_before, grid_thw, seconds_per_grid, tokens_per_second)
    after = torch.arange(num_after).expand(3, -1) + next_position(torch.cat([before, video], dim=1))
    return torch.cat([before, video, after], dim=1)


def encode_prompt(
    tokenizer: Any, user_text: str, video: VideoFeatures, config: Any, settings: PolicyConfig
) -> PromptInputs:
    """Token ids and M-RoPE positions of a prompt with one video."""
    before, after = chat_text(tokenizer, user_text).split(VIDEO_PAD)
    ids_before = tokenizer.encode(before, add_special_tokens=False)
    ids_after = tokenizer.encode(after, add_special_tokens=False)
    video_id = tokenizer.convert_tokens_to_ids(VIDEO_PAD)
    ids = torch.tensor(ids_before + [video_id] * video.num_tokens + ids_after)
    per_second = float(config.vision_config.tokens_per_second)
    positions = prompt_positions(
        len(ids_before), len(ids_after), video.grid_thw, video.seconds_per_grid, per_second
    )  # fmt: skip
    return PromptInputs(ids, positions, ids == video_id)


def encode_video(model: Any, patches: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
    """Run the vision tower once: (N, 1176) -> (video tokens, hidden)."""
    return (torch.cat(tuple(model.get_video_features(patches, grid).pooler_output)),)


def exported(settings: PolicyConfig) -> Exported:
    """What stage=export writes about videos."""
    frames = settings.frames
    sizes = {"size": {"shortest_edge": frames.min_pixels, "longest_edge": frames.max_pixels}}
    return Exported(
        processor="Qwen2_5_VLProcessor",
        images={
            "image_processor_type": "Qwen2VLImageProcessor", **sizes,
            "min_pixels": frames.min_pixels, "max_pixels": frames.max_pixels,
        },
        videos={
            "video_processor_type": "Qwen2VLVideoProcessor", **sizes,
            # the budget of all frames, of which the library takes nine tenths of so many tokens
            "cap_pixels_per_frame": True, "max_video_tokens": round(frames.total_pixels / (0.9 * PATCH_FORM.side**2)),
        },
        place=VIDEO_PAD,
        step=VIDEO_PAD,
    )  # fmt: skip


FAMILY = Family(
    title="Qwen2.5-VL",
    model_class=Qwen2_5_VLForConditionalGeneration,
    config_class=Qwen2_5_VLConfig,
    lora_targets=DECODER_LINEARS,
    tower_targets=r".*visual\.blocks\..*\.(qkv|proj|gate_proj|up_proj|down_proj)",
    patch_form=PATCH_FORM,
    step_tokens=0,
    is_time_text=False,
    num_features=lambda _: 1,
    encode_prompt=encode_prompt,
    encode_video=encode_video,
    exported=exported,
    published=PUBLISHED,
)
