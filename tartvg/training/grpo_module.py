"""GRPO as the paper's algorithm: sample, judge, compare within the group, update.

Dimensions: P prompts, G rollouts per prompt, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tartvg.config import AnchorsConfig, GrpoConfig
from tartvg.data.video import VideoError
from tartvg.grpo import LossInputs, LossSettings, group_advantages, grpo_loss, rollout_metrics
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch, stream_seed, token_batch
from tartvg.records import append_jsonl
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training.loop import StageRun, StepModule
from tartvg.training.plan import StepBatch
from tartvg.types import Completion, Prompt, Rollout, RolloutGroup


class GrpoModule(StepModule):
    """One stage of GRPO. `settings` and `rubric` are the whole difference between its variants."""

    settings: GrpoConfig

    def __init__(
        self, policy: Policy, rubric: Rubric, settings: GrpoConfig, anchors: AnchorsConfig, run: StageRun,
        tracker: Tracker,
    ) -> None:  # fmt: skip
        super().__init__(policy, settings, run, tracker)
        self.rubric = rubric
        self.anchors = anchors
        self.loss_settings = LossSettings.from_config(settings)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One step of Algorithm 1: rollouts, rewards, advantages, and `num_iterations` updates on them."""
        self.begin_step(batch.step)
        prepared = self.prepare(batch)
        groups = self.rollout(prepared, batch.step)
        tokens = [token_batch([r.completion for r in g.rollouts], self.device) for g in groups]
        advantages = [self.advantages(g) for g in groups]
        references = self.reference_logps(prepared, tokens)
        metrics: dict[str, float] = {}
        for _ in range(self.settings.num_iterations):
            parts: list[dict[str, Tensor]] = []
            rows = zip(prepared, tokens, references, advantages, groups, strict=True)
            micro = [partial(self.group_loss, *row, parts, len(groups)) for row in rows]
            with self.policy.timer("update"):
                metrics["optim/grad_norm"] = self.update(micro)
            metrics |= {name: float(torch.stack([m[name] for m in parts]).mean()) for name in parts[0]}
        self.record(groups, batch.step)
        self.end_step(batch.step, metrics | rollout_metrics(groups, self.anchors.target))

    # -- the steps of the step ---------------------------------------------------------------------------------------

    def prepare(self, batch: StepBatch) -> list[PreparedPrompt]:
        """Videos and prompts; one that cannot be decoded is left out, and says so."""
        prepared = []
        for prompt, clip in zip(batch.prompts, batch.clips, strict=True):
            try:
                prepared.append(self.policy.prepare(prompt, clip))
            except VideoError as error:
                print(f"step {batch.step}: training goes on without {prompt.sample.sample_id}: {error}")
        if not prepared:
            raise VideoError(f"step {batch.step}: none of its {len(batch.prompts)} videos can be decoded")
        return prepared

    def rollout(self, prepared: Sequence[PreparedPrompt], step: int) -> list[RolloutGroup]:
        """G completions for each prompt, read and judged."""
        seeds = [stream_seed(self.run.seed, self.run.stage, step, p.prompt.sample.sample_id) for p in prepared]
        completions = self.policy.sample(prepared, self.settings.group_size, self.settings.sampling, seeds)
        with self.policy.timer("reward"):
            return [self.judge(p.prompt, group, step) for p, group in zip(prepared, completions, strict=True)]

    def judge(self, prompt: Prompt, completions: Sequence[Completion], step: int) -> RolloutGroup:
        """Responses and rewards of one group."""
        rollouts = []
        for completion in completions:
            response = parse_response(completion.text)
            rollouts.append(Rollout(completion, response, self.rubric.judge(response, prompt.sample)))
        return RolloutGroup(prompt, tuple(rollouts), step)

    def advantages(self, group: RolloutGroup) -> Tensor:
        """A_G: each reward compared with its group."""
        rewards_G = torch.tensor([r.reward.total for r in group.rollouts], dtype=torch.float32)
        return group_advantages(rewards_G, self.settings.advantage, self.settings.advantage_eps).to(self.device)

    def reference_logps(
        self, prepared: Sequence[PreparedPrompt], tokens: Sequence[TokenBatch]
    ) -> list[Tensor] | list[None]:
        """log-probabilities under the policy at the start of the stage; not needed without a KL penalty."""
        if self.settings.kl_coef == 0:
            return [None] * len(tokens)
        with self.policy.timer("reference"), self.policy.as_reference():
            temperature = self.settings.sampling.temperature
            return [self.policy.logps(p, t, temperature) for p, t in zip(prepared, tokens, strict=True)]

    def group_loss(
        self, prepared: PreparedPrompt, tokens: TokenBatch, reference_GT: Tensor | None, advantages_G: Tensor,
        group: RolloutGroup, metrics: list[dict[str, Tensor]], num_groups: int,
    ) -> Tensor:  # fmt: skip
        """One group's share of the step's loss; its metrics are appended to `metrics`."""
        mask_GT = tokens.mask
        if self.settings.mask_truncated:
            finished = torch.tensor([r.completion.is_finished for r in group.rollouts], device=self.device)
            mask_GT = mask_GT & finished[:, None]
        logps_GT = self.policy.logps(prepared, tokens, self.settings.sampling.temperature)
        output = grpo_loss(LossInputs(logps_GT, tokens.logps, reference_GT, advantages_G, mask_GT), self.loss_settings)
        metrics.append(output.metrics)
        return output.loss / num_groups

    def record(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """What the model said, one line per group."""
        append_jsonl(self.run.folder / "rollouts.jsonl", [light(g) for g in groups])
        if (step + 1) % self.run.checkpoint_every == 0 or step + 1 == self.run.max_steps:
            self.tracker.examples(groups, step)


def light(group: RolloutGroup) -> RolloutGroup:
    """The group with rounded log-probabilities: rollouts are read by people and by the filter, not trained on again."""
    rollouts = []
    for rollout in group.rollouts:
        rounded = tuple(round(value, 5) for value in rollout.completion.logps)
        rollouts.append(replace(rollout, completion=replace(rollout.completion, logps=rounded)))
    return replace(group, rollouts=tuple(rollouts))
