"""Qwen3-VL: time is text. Every temporal step of a video is written as its stamp, then its video tokens.

The same stamps and positions are handed to sampling and to training; the library's own processor and positions are
what tests hold them against.

Legend: S prompt tokens, T temporal steps, N patches; the first axis 3 is (temporal, height, width).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tartvg.config import PolicyConfig, VideoWrapper
from tartvg.policy.families.family import DECODER_LINEARS, Exported, Family
from tartvg.policy.features import VideoFeatures
from tartvg.policy.inputs import VIDEO_PAD, PromptInputs, chat_text
from tartvg.policy.patches import MERGE, TEMPORAL_PATCH, PatchForm

PATCH_FORM = PatchForm(size=16, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5), white=1.0)
"""Mean and deviation 0.5, in the order of arithmetic of the library's processor: equal to its last bit."""
START, END = "<|vision_start|>", "<|vision_end|>"
STEP = "<{time:.1f} seconds>" + START + VIDEO_PAD + END
"""What the prompt has for each temporal step."""


def _published(hidden: int, intermediate: int, layers: int, heads: int, vision: dict[str, Any]) -> dict[str, Any]:
    is_tied = hidden < 4096
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)
    text = dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=262144, rope_parameters=rope,
        tie_word_embeddings=is_tied,
    )  # fmt: skip
    return dict(text_config=text, vision_config={**vision, "out_hidden_size": hidden}, tie_word_embeddings=is_tied)


SMALL_TOWER = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
LARGE_TOWER = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
PUBLISHED = {
    "Qwen/Qwen3-VL-2B-Instruct": _published(2048, 6144, 28, 16, SMALL_TOWER),
    "Qwen/Qwen3-VL-4B-Instruct": _published(2560, 9728, 36, 32, SMALL_TOWER),
    "Qwen/Qwen3-VL-8B-Instruct": _published(4096, 12288, 36, 32, LARGE_TOWER),
}


def place_of(wrapper: VideoWrapper) -> str:
    """Return what is replaced by the steps of a video in the chat template's text."""
    return VIDEO_PAD if wrapper is VideoWrapper.outer else START + VIDEO_PAD + END


def prompt_text(tokenizer: Any, user_text: str, stamps: tuple[float, ...], wrapper: VideoWrapper) -> str:
    """The whole prompt with one video token for each temporal step, stamps in seconds before them."""
    text, place = chat_text(tokenizer, user_text), place_of(wrapper)
    if place not in text:
        raise ValueError(f"the chat template does not write {START}{VIDEO_PAD}{END} where the video stands")
    return text.replace(place, "".join(STEP.format(time=stamp) for stamp in stamps))


def prompt_positions(is_video: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
    """Positions of a prompt whose video tokens are marked: int64 (3, S).

    A text token moves the position on by one. In the block of a temporal step T stays, H and W run from the current
    position, which then moves on by the block's longer side (Qwen3-VL's `get_rope_index`).
    """
    rows, columns = grid_thw[1] // MERGE, grid_thw[2] // MERGE
    is_first = is_video & ~torch.cat([is_video.new_zeros(1), is_video[:-1]])
    assert int(is_first.sum()) == grid_thw[0], "text stands between two temporal steps"
    moves = torch.where(is_video, is_first * max(rows, columns), 1)
    current = moves.cumsum(0) - moves
    block = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij"))
    positions = current.repeat(3, 1)
    begun = current[is_first].repeat_interleave(rows * columns)
    positions[:, is_video] = begun + block.reshape(3, -1).repeat(1, grid_thw[0])
    return positions


def encode_prompt(
    tokenizer: Any, user_text: str, video: VideoFeatures, config: Any, settings: PolicyConfig
) -> PromptInputs:
    """Token ids and M-RoPE positions of a prompt with one video.

    The text is encoded as one: a stamp may share a token with the word before it.
    """
    assert len(video.stamps) == video.grid_thw[0], "one stamp for each temporal step"
    text = prompt_text(tokenizer, user_text, video.stamps, settings.video_wrapper)
    short = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    is_step = short == tokenizer.convert_tokens_to_ids(VIDEO_PAD)
    times = torch.where(is_step, video.num_tokens // video.grid_thw[0], 1)
    is_video = is_step.repeat_interleave(times)
    return PromptInputs(short.repeat_interleave(times), prompt_positions(is_video, video.grid_thw), is_video)


def encode_video(model: Any, patches: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
    """Run the vision tower once: (N, 1536) -> its features, and those of the blocks that DeepStack takes."""
    out = model.get_video_features(patches, grid)
    return tuple(torch.cat(tuple(parts)) for parts in (out.pooler_output, *out.deepstack_features))


def exported(settings: PolicyConfig) -> Exported:
    """What stage=export writes about videos."""
    frames = settings.frames
    return Exported(
        processor="Qwen3VLProcessor",
        images={
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": frames.min_pixels, "longest_edge": frames.max_pixels},
        },
        videos={
            "video_processor_type": "Qwen3VLVideoProcessor",
            # for each frame the least; for all frames of a video, which are two to a temporal step, the most
            "size": {"shortest_edge": frames.min_pixels, "longest_edge": TEMPORAL_PATCH * frames.total_pixels},
            "cap_pixels_per_frame": True, "max_video_tokens": frames.max_pixels // PATCH_FORM.side**2,
        },
        place=place_of(settings.video_wrapper),
        step=STEP,
    )  # fmt: skip


FAMILY = Family(
    title="Qwen3-VL",
    model_class=Qwen3VLForConditionalGeneration,
    config_class=Qwen3VLConfig,
    lora_targets=DECODER_LINEARS,
    tower_targets=r".*visual\.blocks\..*\.(qkv|proj|linear_fc1|linear_fc2)",
    patch_form=PATCH_FORM,
    step_tokens=12,  # <1234.5 seconds> has ten, and two marks
    is_time_text=True,
    num_features=lambda config: 1 + len(config.vision_config.deepstack_visual_indexes),
    encode_prompt=encode_prompt,
    encode_video=encode_video,
    exported=exported,
    published=PUBLISHED,
)
