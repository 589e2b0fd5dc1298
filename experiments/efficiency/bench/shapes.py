"""What is measured: a model of either family and any size, random weights; prompts and completions of exact lengths.

Legend: P prompt tokens, C completion tokens, G rollouts per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from experiments.tiny_base.model import build_tokenizer, tiny3_config, tiny_config
from tartvg.config import FramesConfig, PolicyConfig, Precision
from tartvg.policy.families.family import family_of
from tartvg.policy.features import VideoFeatures
from tartvg.policy.inputs import ClipPatches
from tartvg.policy.loading import DTYPES
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch
from tartvg.types import GroundingSample, Prompt, Span

NUM_TEXT = 32
"""Text tokens of a prompt at least, what the chat template and the stamps write included."""
FRAMES = FramesConfig(min_frames=4, max_frames=768, min_pixels=12544, max_pixels=12544)
"""112 x 112 pixels: 16 tokens a second."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the language model and, where they differ from the tiny tower's, of the tower."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int | None = None
    """null: the tokenizer's."""
    vision: dict[str, Any] = field(default_factory=dict)
    config_of: Callable[[Any], Any] = tiny_config
    """The tiny model of the family, whose sizes are changed."""


SMALL = Shape(hidden=512, layers=6, intermediate=1536, heads=8, kv_heads=2)
"""Its cost is in its layers, not in Python or the head, and it fits a laptop."""
SMALLER = Shape(hidden=256, layers=6, intermediate=768, heads=4, kv_heads=2)
"""A third of it; at a thousand tokens attention, which sharing saves less of, is a third of its work."""
TOWER = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31])
QWEN_3B = Shape(2048, 36, 11008, 16, 2, 151936, TOWER)
QWEN_7B = Shape(3584, 28, 18944, 28, 4, 152064, TOWER)
BASES = {"tiny": tiny_config, "tiny3": tiny3_config}
"""The two families, by the base that ships."""


def build_policy(
    shape: Shape, folder: Path, *, precision: Precision = Precision.fp32, device: str = "cpu", **settings: Any
) -> Policy:
    """A policy of that shape with random weights, loaded from `folder` like any other base."""
    if not (folder / "config.json").is_file():
        _write_base(shape, folder, precision, device)
    policy = Policy(PolicyConfig(name="bench", path=str(folder), precision=precision, frames=FRAMES, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # a fresh adapter is the identity, and half of its gradient is zero
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    policy.to(torch.device(device))
    policy.train()
    return policy


def _write_base(shape: Shape, folder: Path, precision: Precision, device: str) -> None:
    tokenizer = build_tokenizer(["<think> the red circle </think><answer>1.00 to 2.00</answer>"] * 3)
    tiny = shape.config_of(tokenizer)
    config = tiny.to_dict()
    text, width = config["text_config"], shape.hidden // shape.heads
    text.pop("layer_types", None)
    sections = [width // 2 - 2 * (3 * width // 16), 3 * width // 16, 3 * width // 16]  # 16, 24, 24 of 64, as released
    text.update(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary or len(tokenizer),
        max_position_embeddings=32768,
        rope_parameters={**text["rope_parameters"], "mrope_section": sections},
    )
    if "head_dim" in text:
        text["head_dim"] = width
    config["vision_config"].update(shape.vision, out_hidden_size=shape.hidden)
    torch.manual_seed(0)
    with torch.device(device):  # in the type that is saved: the 7B in fp32 would take 33 GB
        model = family_of(tiny.model_type).model_class._from_config(type(tiny)(**config), dtype=DTYPES[precision])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_prompt(policy: Policy, length: int, steps: int = 1, seed: int = 0) -> tuple[PreparedPrompt, ClipPatches]:
    """A prompt of exactly `length` tokens around a random video of `steps` grid steps, and the video's patches."""
    generator = torch.Generator().manual_seed(seed)
    stamps = tuple(0.25 + step for step in range(steps))
    facts = VideoFeatures(torch.empty(0), (steps, 2, 2), 1.0, float(steps), stamps=stamps)
    num_written = policy.encode_prompt("", facts).length - facts.num_tokens
    per_step = (length - max(NUM_TEXT, num_written)) // steps
    if per_step < 1:
        raise ValueError(f"a prompt of {length} tokens has no room for {steps} video tokens")
    rows = math.isqrt(per_step)
    facts = replace(facts, grid_thw=(steps, 2 * rows, 2 * (per_step // rows)))
    inputs = policy.encode_prompt("7" * (length - num_written - facts.num_tokens), facts)  # every digit is a token
    assert inputs.length == length, "the prompt has another length"
    text = torch.randint(100, 200, (length,), generator=generator)
    inputs = replace(inputs, ids=torch.where(inputs.is_video, inputs.ids, text))
    width = 3 * 2 * policy.family.patch_form.size**2
    patches = torch.randn(4 * facts.num_tokens, width, generator=generator)
    clip = ClipPatches(patches, facts.grid_thw, 1.0, stamps)
    with torch.no_grad():
        embeddings, *deepstack = policy._encode(clip.patches, clip.grid_thw)
    video = replace(facts, embeddings=embeddings, deepstack=tuple(deepstack))
    sample = GroundingSample("bench", Path("absent.mp4"), "bench", (Span(0, 1),), float(steps), "train")
    return PreparedPrompt(Prompt(sample, "bench"), inputs, video), clip


def make_tokens(policy: Policy, item: PreparedPrompt, group: int, completion: int, seed: int = 0) -> TokenBatch:
    """G random completions of C tokens, as if a slightly older policy had drawn them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 200, (group, completion), generator=generator).to(policy.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        logps = policy.logps(item, TokenBatch(ids, mask, torch.zeros(ids.shape, device=policy.device)))
    noise = 0.1 * torch.randn(ids.shape, generator=generator)
    return TokenBatch(ids, mask, logps + noise.to(policy.device))
