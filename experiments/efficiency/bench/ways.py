"""The same work in several ways: one group's update and one group's rollout.

Legend: P prompt tokens, C completion tokens, G rollouts per prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tartvg.config import SamplingConfig
from tartvg.grpo import LossInputs, LossSettings, grpo_loss
from tartvg.policy.inputs import ClipPatches
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch

LOSS = LossSettings(clip_low=0.2, clip_high=0.2, kl_coef=0.04)
NAIVE, VISION_ONCE, SHARED, SAVING = "naive", "vision once", "vision once + shared prefix", "memory-saving"
SETTINGS: dict[str, dict[str, Any]] = {
    NAIVE: dict(shared_prefix=False, activation_checkpointing=False),
    VISION_ONCE: dict(shared_prefix=False, activation_checkpointing=False),
    SHARED: dict(shared_prefix=True, activation_checkpointing=False),
    SAVING: dict(shared_prefix=True, activation_checkpointing=True),
}
"""`naive` also encodes the video once per row in every pass, as engines do that repeat the pixels G times."""


@dataclass(frozen=True)
class Group:
    """One group's work."""

    item: PreparedPrompt
    clip: ClipPatches
    tokens: TokenBatch
    advantages: Tensor
    """float32 (G,)."""


def spread_advantages(group: int, device: torch.device) -> Tensor:
    """G advantages with mean 0."""
    return torch.linspace(-1.5, 1.5, group, device=device)


@contextmanager
def going(policy: Policy, way: str) -> Iterator[None]:
    """Inside the block the policy works that way."""
    before = policy.settings
    policy.settings = replace(before, **SETTINGS[way])
    try:
        yield
    finally:
        policy.settings = before


def see(policy: Policy, clip: ClipPatches, copies: int) -> None:
    """Encode the video `copies` times in one pass of the tower."""
    grid = torch.tensor([clip.grid_thw] * copies, device=policy.device)
    with torch.no_grad():
        policy.core.model.get_video_features(clip.patches.to(policy.device).repeat(copies, 1), grid)


def reference(policy: Policy, group: Group, way: str) -> Tensor:
    """Reference log-probabilities: float32 (G, C)."""
    with going(policy, way), policy.as_reference():
        if way == NAIVE:
            see(policy, group.clip, len(group.advantages))
        return policy.logps(group.item, group.tokens)


def learn(policy: Policy, group: Group, way: str, reference_GT: Tensor) -> Tensor:
    """Policy pass, loss and backward pass; gradients are left in place. Returns the log-probabilities."""
    policy.zero_grad()
    return accumulate(policy, group, way, reference_GT)


def accumulate(policy: Policy, group: Group, way: str, reference_GT: Tensor) -> Tensor:
    """`learn` on top of the gradients that are there."""
    with going(policy, way):
        if way == NAIVE:
            see(policy, group.clip, len(group.advantages))
        logps = policy.logps(group.item, group.tokens)
        tokens = group.tokens
        inputs = LossInputs(logps, tokens.logps, reference_GT, group.advantages[:, None], tokens.mask)
        grpo_loss(inputs, LOSS).loss.backward()
    return logps.detach()


def one_row(group: Group, row: int) -> Group:
    """A group of one of its completions."""
    tokens, only = group.tokens, slice(row, row + 1)
    return replace(
        group,
        tokens=TokenBatch(tokens.ids[only], tokens.mask[only], tokens.logps[only]),
        advantages=group.advantages[only],
    )


def update(policy: Policy, group: Group, way: str) -> None:
    """What one group costs in an update: reference and policy, forward and backward."""
    learn(policy, group, way, reference(policy, group, way))


def gradient(policy: Policy) -> Tensor:
    """The gradient of all trainable weights in one row."""
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad and p.grad is not None])


@contextmanager
def never_ending(policy: Policy) -> Iterator[None]:
    """Inside the block no token ends a row: every rollout has its full length."""
    before, policy.end_ids = policy.end_ids, set()
    try:
        yield
    finally:
        policy.end_ids = before


def our_rollout(policy: Policy, item: PreparedPrompt, group: int, completion: int) -> None:
    """G completions of exactly C tokens from `Policy.sample`."""
    with never_ending(policy):
        policy.sample([item], group, SamplingConfig(max_new_tokens=completion), [0])


def library_rollout(
    policy: Policy, item: PreparedPrompt, clip: ClipPatches, group: int, completion: int, *, is_vision_repeated: bool
) -> None:
    """The same from transformers' `generate`: the prompt's pixels G times, or once with `num_return_sequences=G`."""
    rows = group if is_vision_repeated else 1
    ids = item.inputs.ids[None].repeat(rows, 1).to(policy.device)
    grid = torch.tensor([clip.grid_thw] * rows, device=policy.device)
    was_training = policy.training
    policy.eval()
    policy.core.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=clip.patches.to(policy.device).repeat(rows, 1),
        video_grid_thw=grid,
        **({} if policy.family.is_time_text else {"second_per_grid_ts": [clip.seconds_per_grid] * rows}),
        mm_token_type_ids=2 * item.inputs.is_video[None].repeat(rows, 1).to(ids),
        num_return_sequences=group // rows,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=completion,
        min_new_tokens=completion,
        pad_token_id=0,
    )
    policy.train(was_training)


def rollouts(policy: Policy, item: PreparedPrompt, clip: ClipPatches, group: int, completion: int) -> dict[str, Any]:
    """The three ways to draw one group, as calls."""
    theirs = partial(library_rollout, policy, item, clip, group, completion)
    return {
        NAIVE: partial(theirs, is_vision_repeated=True),
        VISION_ONCE: partial(theirs, is_vision_repeated=False),
        SHARED: partial(our_rollout, policy, item, group, completion),
    }
