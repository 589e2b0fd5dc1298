"""Prompts whose video is wrong on purpose: what a policy that looks at the frames must answer differently.

Legend: T temporal grid steps (two frames each), N tokens per step.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tartvg.policy.features import VideoFeatures
from tartvg.policy.policy import Policy, PreparedPrompt
from tartvg.policy.sampling import stream_seed


def shuffled(prepared: PreparedPrompt) -> PreparedPrompt:
    """Reorder the frames of a prompt, in a fixed order for each sample; positions stay.

    The vision tower sees each temporal grid step by itself, so features may be reordered in place of frames: the result
    is what encoding the reordered pairs of frames gives, without decoding or encoding anything again.
    """
    sample_id = prepared.prompt.sample.sample_id
    generator = torch.Generator().manual_seed(stream_seed("shuffled", sample_id))
    order_T = torch.randperm(prepared.video.grid_thw[0], generator=generator)
    return replace(prepared, video=in_order(prepared.video, order_T))


def with_shifted_stamps(policy: Policy, prepared: PreparedPrompt, seconds: float) -> PreparedPrompt:
    """Tell the same frames with other times: each stamp of the prompt later by so many seconds.

    For a family that writes times into the prompt: whoever reads them must answer as much later, and whoever counts
    steps or knows usual times answers the same.
    """
    assert policy.family.is_time_text, f"{policy.family.title} writes no stamps"
    video = replace(prepared.video, stamps=tuple(stamp + seconds for stamp in prepared.video.stamps))
    return replace(prepared, video=video, inputs=policy.encode_prompt(prepared.prompt.text, video))


def in_order(video: VideoFeatures, order_T: torch.Tensor) -> VideoFeatures:
    """Reorder the features of a video, so that grid step t shows what step `order_T[t]` showed."""
    steps = video.grid_thw[0]
    assert sorted(order_T.tolist()) == list(range(steps)), "an order holds every step once"
    order_T = order_T.to(video.embeddings.device)
    return video.mapped(lambda features: features.unflatten(0, (steps, -1))[order_T].flatten(0, 1))
