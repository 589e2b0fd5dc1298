"""GRPO as Algorithm 1 has it: sample a group per prompt, score it, compare within the group, update.

Dimensions: P prompts, G rollouts per prompt, T tokens. Lists named `_P` have one entry per prompt of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tartvg.config import Aggregation, AnchorsConfig, GrpoConfig
from tartvg.data.packets import VideoError
from tartvg.grpo import LossInputs, LossOutput, LossSettings, grpo_loss, merged_metrics, rollout_metrics
from tartvg.grpo.aggregation import divisor
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch, token_batch
from tartvg.policy.sampling import stream_seed
from tartvg.records import append_jsonl, group_from_json, to_json, with_rounded_logps
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training import distributed
from tartvg.training.batches import StepBatch
from tartvg.training.checkpoint import Checkpoint
from tartvg.training.credit import kl_coefs, segment_advantages, token_advantages
from tartvg.training.out_of_memory import ALL_ROWS, free_cached_memory, in_fewest_parts, is_out_of_memory
from tartvg.training.probes import Row, control_rows, drift_rows, is_due, measured, rows_of, sampler_gap
from tartvg.training.step import StageRun, StepModule
from tartvg.training.update import UpdateResult
from tartvg.training.validation import Validation
from tartvg.types import Completion, Prompt, Rollout, RolloutGroup


@dataclass(frozen=True)
class TrainingGroup:
    """One group to learn from, with all that its updates have in common."""

    index: int
    """Among the groups of all ranks."""
    prepared: PreparedPrompt
    group: RolloutGroup
    tokens: TokenBatch
    reference_GT: Tensor | None
    """log-probabilities under the reference; None without a KL penalty."""
    old_GT: Tensor
    """log-probabilities under the policy that sampled, filled by the first update. Those recorded while sampling come
    from other kernels: in 16 bits they differ enough to leave a narrow clip range before any update."""
    kl_coef_GT: Tensor | None = None
    """Weight of the KL penalty at each token; None: `grpo.kl_coef` everywhere."""


@dataclass(frozen=True)
class Experience:
    """What one rank sampled and learns from in one step."""

    sampled: list[tuple[int, RolloutGroup]]
    """All its groups, with their indices among those of all ranks."""
    groups: list[TrainingGroup]
    probes: list[Row]
    """What was measured for the monitors: so many kinds of rows, each with one row per entry of `groups`."""


class GrpoModule(StepModule):
    """One stage of GRPO. `settings` and `rubric` are the whole difference between its variants."""

    settings: GrpoConfig

    def __init__(
        self, policy: Policy, rubric: Rubric, settings: GrpoConfig, anchors: AnchorsConfig, run: StageRun,
        tracker: Tracker, checkpoint: Checkpoint | None = None, validation: Validation | None = None,
    ) -> None:  # fmt: skip
        super().__init__(policy, settings, run, tracker, checkpoint, validation)
        self.rubric = rubric
        self.anchors = anchors
        self.loss_settings = LossSettings.from_config(settings)
        if settings.num_iterations > 1:  # with one update the ratio is exactly 1, whatever rounds
            policy.compute_logits_in_float32()

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        """Collect experience: everything without gradient."""
        self.begin(batch.step)
        self.experience = self.without_gradient(lambda: self.collect_experience(batch))

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Learn from it, and record it."""
        experience = self.experience
        del self.experience  # free before the next step collects its own
        metrics = self.probe_metrics(experience) | self.learn(experience, batch.step)
        groups = self.gathered_groups(experience)
        self.record(groups, batch.step)
        self.end(batch.step, metrics | (rollout_metrics(groups, self.anchors.count) if groups else {}))

    # -- collect -------------------------------------------------------------------------------------------------------

    def collect_experience(self, batch: StepBatch) -> Experience:
        """Sample and score groups; compute reference log-probabilities and what the monitors ask for."""
        sampled = self.sample_and_score(self.prepare(batch), batch.step)
        kept = [each for each in sampled if self.has_reward_spread(each[2])]
        prepared_P = [prepared for _, prepared, _ in kept]
        tokens_P = [token_batch([r.completion for r in group.rollouts], self.policy.device) for _, _, group in kept]
        reference_P = (
            self.reference_logps(prepared_P, tokens_P) if self.settings.needs_reference else [None] * len(kept)
        )
        probes = self.probe(prepared_P, tokens_P, reference_P, batch.step)
        groups = [
            TrainingGroup(
                index, prepared, group, tokens, reference_GT, torch.zeros_like(tokens.logps), self.kl_coefs(group)
            )
            for (index, prepared, group), tokens, reference_GT in zip(kept, tokens_P, reference_P, strict=True)
        ]
        return Experience([(index, group) for index, _, group in sampled], groups, probes)

    def prepare(self, batch: StepBatch) -> list[tuple[int, PreparedPrompt]]:
        """Encode prompts and videos; skip a prompt whose video cannot be decoded."""
        prepared = []
        for index, prompt in zip(batch.indices, batch.prompts, strict=True):
            try:
                prepared.append((index, self.policy.prepare(prompt, batch.clips.get(prompt.sample.video))))
            except VideoError as error:
                print(f"step {batch.step}: training goes on without {prompt.sample.sample_id}: {error}")
        return prepared

    def sample_and_score(
        self, prompts: Sequence[tuple[int, PreparedPrompt]], step: int
    ) -> list[tuple[int, PreparedPrompt, RolloutGroup]]:
        """Sample G completions of each prompt, `sampling_batch_size` prompts at a time, then parse and score them."""
        size = self.settings.sampling_batch_size or max(1, len(prompts))
        sampled = []
        for start in range(0, len(prompts), size):
            sampled += self.sample(prompts[start : start + size], step)
        self.throughput.num_sampled += sum(len(c.token_ids) for _, _, completions in sampled for c in completions)
        with self.policy.timer("reward"):
            return [(index, p, self.score(p.prompt, completions, step)) for index, p, completions in sampled]

    def sample(
        self, prompts: Sequence[tuple[int, PreparedPrompt]], step: int
    ) -> list[tuple[int, PreparedPrompt, list[Completion]]]:
        """Sample all prompts together; if they do not fit into memory, each half alone. Drop one that never fits.

        A group depends on its own seed only, so it is the same either way.
        """
        prepared = [p for _, p in prompts]
        ids = [p.prompt.sample.sample_id for p in prepared]
        seeds = [stream_seed(self.run.seed, self.run.stage, step, sample_id) for sample_id in ids]
        try:
            groups = self.policy.sample(prepared, self.settings.group_size, self.settings.sampling, seeds)
            return [(index, p, group) for (index, p), group in zip(prompts, groups, strict=True)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_cached_memory()  # outside: inside, the error's traceback still holds the tensors
        half = len(prompts) // 2
        action = "sampled in two halves" if half else "left out"
        self.faults.record_own(step, "out_of_memory", samples=ids, action=action, phase="sample")
        return [*self.sample(prompts[:half], step), *self.sample(prompts[half:], step)] if half else []

    def score(self, prompt: Prompt, completions: Sequence[Completion], step: int) -> RolloutGroup:
        """Parse the completions of one prompt and score them."""
        rollouts = []
        for completion in completions:
            response = parse_response(completion.text, is_direct=self.anchors.is_direct)
            rollouts.append(Rollout(completion, response, self.rubric.score(response, prompt.sample)))
        return RolloutGroup(prompt, tuple(rollouts), step)

    def has_reward_spread(self, group: RolloutGroup) -> bool:
        """Return whether a group is trained on: with `drop_zero_variance` only if rewards or advantages differ."""
        if not self.settings.drop_zero_variance or len({r.reward.total for r in group.rollouts}) > 1:
            return True
        return bool(segment_advantages(group, self.rubric, self.settings).any())

    def reference_logps(self, prepared_P: Sequence[PreparedPrompt], tokens_P: Sequence[TokenBatch]) -> list[Tensor]:
        """log-probabilities (G, T) of each group under the policy at the start of the stage."""
        with self.policy.timer("reference"), self.policy.as_reference():
            return [
                torch.cat(in_fewest_parts(partial(self.logps, prepared, tokens), len(tokens.ids)))
                for prepared, tokens in zip(prepared_P, tokens_P, strict=True)
            ]

    def logps(self, prepared: PreparedPrompt, tokens: TokenBatch, part: slice) -> Tensor:
        """log-probabilities of some completions of a group, at the sampling temperature."""
        return self.policy.logps(prepared, rows_of(tokens, part), self.settings.sampling.temperature)

    def probe(
        self, prepared_P: Sequence[PreparedPrompt], tokens_P: Sequence[TokenBatch],
        reference_P: Sequence[Tensor | None], step: int,
    ) -> list[Row]:  # fmt: skip
        """Measure what the monitors need and the loss does not, where it is due."""
        rows: list[Row] = []
        with self.policy.timer.booked_as("monitor"):
            known = [reference_GT for reference_GT in reference_P if reference_GT is not None]
            if not known and is_due(self.run.monitors.kl_every, step):
                known = self.reference_logps(prepared_P, tokens_P)
            if known:
                rows += drift_rows(tokens_P, known)
            if is_due(self.run.faithfulness.every, step):
                rows += control_rows(self.policy, prepared_P, self.settings.sampling)
        return rows

    def probe_metrics(self, experience: Experience) -> dict[str, float]:
        """Metrics of the probes of all ranks."""
        num_kinds = len(experience.probes) // max(1, len(experience.groups))
        indices = [group.index for group in experience.groups] * num_kinds
        return measured(distributed.all_gather_ordered(indices, experience.probes))

    # -- learn ---------------------------------------------------------------------------------------------------------

    def learn(self, experience: Experience, step: int) -> dict[str, float]:
        """Compute advantages and make `num_iterations` updates; return their metrics."""
        groups = experience.groups
        num_sampled, num_groups = map(int, distributed.all_reduce_sum(len(experience.sampled), len(groups)))
        if not num_groups:
            return self.skip(step, is_fault=not num_sampled)
        advantages_P = [self.advantages(group.group) for group in groups]
        normaliser = self.normaliser(groups, num_groups)
        metrics: dict[str, float] = {}
        for iteration in range(self.settings.num_iterations):
            loss = partial(self.loss, num_groups=num_groups, normaliser=normaliser, is_first=iteration == 0)
            losses = [
                self.as_group_loss(group.prepared, group.tokens, partial(loss, group, advantages_GT))
                for group, advantages_GT in zip(groups, advantages_P, strict=True)
            ]
            with self.policy.timer("update"):
                result = self.update(losses, step)
            if result is None:
                return metrics | self.skip(step, is_fault=True)
            metrics |= self.loss_metrics(groups, result)
            metrics |= self.check_update(step, result, partial(self.offending_groups, groups, advantages_P))
        return metrics

    def advantages(self, group: RolloutGroup) -> Tensor:
        """Compare what was earned within the group, by `grpo.credit`: (G, T), or (G, 1) if the same for all tokens."""
        return token_advantages(group, self.rubric, self.settings, self.policy.tokenizer).to(self.device)

    def kl_coefs(self, group: RolloutGroup) -> Tensor | None:
        """Weight of the KL penalty at each token, with `grpo.kl_time_coef`."""
        coef_GT = kl_coefs(group, self.settings, self.policy.tokenizer)
        return None if coef_GT is None else coef_GT.to(self.device)

    def normaliser(self, groups: Sequence[TrainingGroup], num_groups: int) -> float | None:
        """Tokens of all groups of all ranks over the number of groups, where the loss is a mean over tokens; else None.

        The other aggregations divide by constants: the mean over groups is right for them.
        """
        if self.settings.loss_aggregation is not Aggregation.token_mean:
            return None
        num_tokens = sum(float(self.mask(group.tokens, group.group).sum()) for group in groups)
        return max(1.0, distributed.all_reduce_sum(num_tokens)[0]) / num_groups

    def mask(self, tokens: TokenBatch, group: RolloutGroup) -> Tensor:
        """Tokens that count in the loss: bool (G, T)."""
        if not self.settings.mask_truncated:
            return tokens.mask
        is_finished_G = torch.tensor([r.completion.is_finished for r in group.rollouts], device=tokens.mask.device)
        return tokens.mask & is_finished_G[:, None]

    def loss(
        self, group: TrainingGroup, advantages_GT: Tensor, part: slice, *, num_groups: int,
        normaliser: float | None = None, is_first: bool = True,
    ) -> LossOutput:  # fmt: skip
        """Share of some rows of one group in the step's loss.

        The first update keeps its log-probabilities for the later ones, so its ratio is exactly 1.
        """
        mask_GT = self.mask(group.tokens, group.group)
        if normaliser is None and part != ALL_ROWS:
            normaliser = divisor(mask_GT, self.settings.loss_aggregation, self.loss_settings.max_new_tokens)
        logps_GT = self.logps(group.prepared, group.tokens, part)
        if is_first:
            group.old_GT[part] = logps_GT.detach()
        reference_GT = None if group.reference_GT is None else group.reference_GT[part]
        kl_coef_GT = None if group.kl_coef_GT is None else group.kl_coef_GT[part]
        inputs = LossInputs(logps_GT, group.old_GT[part], reference_GT, advantages_GT[part], mask_GT[part], kl_coef_GT)
        output = grpo_loss(inputs, self.loss_settings, normaliser)
        gap = sampler_gap(rows_of(group.tokens, part), group.old_GT[part])
        return replace(output, loss=output.loss / num_groups, metrics=output.metrics | {"rollout/logp_gap": gap})

    def loss_metrics(self, groups: Sequence[TrainingGroup], result: UpdateResult) -> dict[str, float]:
        """Loss metrics averaged over the groups of all ranks."""
        pairs = zip(groups, result.outputs, strict=True)
        done = [(group.index, merged_metrics(outputs)) for group, outputs in pairs if outputs]
        rows = [{name: float(value) for name, value in metrics.items()} for _, metrics in done]
        everyone = distributed.all_gather_ordered([index for index, _ in done], rows)
        return {name: float(torch.tensor([row[name] for row in everyone]).mean()) for name in everyone[0]}

    def offending_groups(
        self, groups: Sequence[TrainingGroup], advantages_P: Sequence[Tensor], result: UpdateResult
    ) -> list[dict[str, Any]]:
        """Describe the groups of this rank with their losses, for the record of a step that was not finite."""
        return [
            {
                "sample_id": group.group.prompt.sample.sample_id,
                "loss": float(merged_metrics(outputs)["loss/total"]),
                "advantages": advantages_GT.tolist(),
                "group": to_json(group.group),
            }
            for group, advantages_GT, outputs in zip(groups, advantages_P, result.outputs, strict=True)
            if outputs
        ]

    # -- record --------------------------------------------------------------------------------------------------------

    def gathered_groups(self, experience: Experience) -> list[RolloutGroup]:
        """Groups of all ranks, in the order of one process."""
        groups = [group for _, group in experience.sampled]
        if distributed.world_size() == 1:
            return groups
        indices = [index for index, _ in experience.sampled]
        rows = distributed.all_gather_ordered(indices, list(map(with_rounded_logps, groups)))
        return [group_from_json(row) for row in rows]

    def record(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """Append the completions to rollouts.jsonl, one line per group, and show some of them at checkpoints."""
        if distributed.is_rank_zero():
            append_jsonl(self.run.folder / "rollouts.jsonl", [with_rounded_logps(g) for g in groups])
        if (step + 1) % self.run.trainer.checkpoint_every == 0 or step + 1 == self.run.max_steps:
            self.tracker.examples(groups, step)
