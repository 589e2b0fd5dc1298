"""GRPO as the paper's algorithm: sample, judge, compare within the group, update.

Dimensions: P prompts, G rollouts per prompt, T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tartvg.config import Aggregation, AnchorsConfig, GrpoConfig
from tartvg.data.packets import VideoError
from tartvg.grpo import LossInputs, LossSettings, group_advantages, grpo_loss, rollout_metrics
from tartvg.grpo.aggregation import divisor
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch, stream_seed, token_batch
from tartvg.records import append_jsonl, group_from_json, to_json
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training import distributed
from tartvg.training.batches import StepBatch
from tartvg.training.out_of_memory import WHOLE, NothingFits, fit_rows, merge_parts
from tartvg.training.probes import Row, control_rows, drift_rows, is_due, measured, rows_of, sampler_gap
from tartvg.training.step import StageRun, StepModule
from tartvg.types import Completion, Prompt, Rollout, RolloutGroup

Parts = list[tuple[dict[str, Tensor], int]]
"""Loss metrics and number of tokens of each part of a group that was computed at once."""


@dataclass(frozen=True)
class TrainingGroup:
    """One group to learn from, with everything that the updates have in common."""

    place: int
    """Among the groups of all processes."""
    prepared: PreparedPrompt
    group: RolloutGroup
    tokens: TokenBatch
    reference_GT: Tensor | None
    """None without a KL penalty."""
    old_GT: Tensor
    """Of the policy that sampled, as the first update computes them. Those recorded while sampling come from other
    kernels: in 16 bits they differ enough to leave a narrow clip range before any update."""


@dataclass(frozen=True)
class Experience:
    """What one process drew and trains on in one step."""

    drawn: list[tuple[int, RolloutGroup]]
    """All its groups, with their places."""
    works: list[TrainingGroup]
    rows: list[Row]
    """What was measured for the monitors: so many kinds of rows, each with one row per group of `works`."""


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

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        """Everything without gradient: rollouts, rewards, reference. Not in the step, see `Engine.whole`."""
        self.begin_step(batch.step)
        self.experience = self.with_whole_weights(lambda: self.collect_experience(batch))

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One step of Algorithm 1: what was drawn is learned from, recorded and measured."""
        mine = self.experience
        del self.experience  # not to be kept until the next step has its own
        metrics = self.measured_by_all(mine) | self.learn(mine, batch.step)
        groups = self.all_groups(mine)
        self.record(groups, batch.step)
        self.end_step(batch.step, metrics | (rollout_metrics(groups, self.anchors.target) if groups else {}))

    # -- the steps of the step ---------------------------------------------------------------------------------------

    def collect_experience(self, batch: StepBatch) -> Experience:
        """Rollouts of this process's prompts, what the reference thinks of them, and what monitors ask.

        No process waits for another here.
        """
        drawn = self.rollout(self.prepare(batch), batch.step)
        kept = [each for each in drawn if self.has_reward_spread(each[2])]
        at_least = 2 if self.engine.is_even else 1  # one token alone needs one pass fewer
        device = self.policy.device
        prepared = [prompt for _, prompt, _ in kept]
        tokens = [token_batch([r.completion for r in group.rollouts], device, at_least) for _, _, group in kept]
        references = self.reference_logps(prepared, tokens)
        rows = self.measure(prepared, tokens, references, batch.step)
        works = [
            TrainingGroup(place, prompt, group, batch_of, reference, torch.zeros_like(batch_of.logps))
            for (place, prompt, group), batch_of, reference in zip(kept, tokens, references, strict=True)
        ]
        return Experience([(place, group) for place, _, group in drawn], works, rows)

    def measured_by_all(self, mine: Experience) -> dict[str, float]:
        """What was measured for the monitors, over all processes."""
        kinds = len(mine.rows) // max(1, len(mine.works))
        return measured(self.of_all([work.place for work in mine.works] * kinds, mine.rows))

    def has_reward_spread(self, group: RolloutGroup) -> bool:
        """Whether a group is trained on: with `drop_zero_variance`, one whose rewards differ."""
        return not self.settings.drop_zero_variance or len({r.reward.total for r in group.rollouts}) > 1

    def learn(self, mine: Experience, step: int) -> dict[str, float]:
        """Advantages, and `num_iterations` updates on the rollouts; their metrics."""
        works = mine.works
        num_drawn, num_works = map(int, distributed.all_reduce_sum(len(mine.drawn), len(works)))
        if not num_works:
            return self.nothing_to_learn(step, is_fault=not num_drawn)
        advantages = [self.advantages(work.group) for work in works]
        chunks = self.even_chunks([work.tokens for work in works])
        normaliser = self.normaliser(works)
        metrics: dict[str, float] = {}
        for iteration in range(self.settings.num_iterations):
            parts: list[Parts] = [[] for _ in works]
            share = partial(
                self.group_loss, num_groups=num_works, normaliser=normaliser, num_chunks=chunks,
                is_first=iteration == 0,
            )  # fmt: skip
            losses = [
                self.loss_of(work.prepared, work.tokens, partial(share, work, advantages_G, part), part)
                for work, advantages_G, part in zip(works, advantages, parts, strict=True)
            ]
            try:
                with self.policy.timer("update"):
                    metrics["optim/grad_norm"] = self.fitting_update(losses, step, chunks)
            except NothingFits:
                return metrics | self.nothing_to_learn(step, is_fault=True)
            metrics |= self.loss_metrics([work.place for work in works], parts)
            self.judge_update(step, metrics, partial(self.offending_groups, works, advantages, parts))
        return metrics

    def prepare(self, batch: StepBatch) -> list[tuple[int, PreparedPrompt]]:
        """Prompts with their videos and places; one that cannot be decoded is left out, and says so."""
        prepared = []
        for place, prompt, clip in zip(batch.places, batch.prompts, batch.clips, strict=True):
            try:
                prepared.append((place, self.policy.prepare(prompt, clip)))
            except VideoError as error:
                print(f"step {batch.step}: training goes on without {prompt.sample.sample_id}: {error}")
        return prepared

    def normaliser(self, works: Sequence[TrainingGroup]) -> float | None:
        """The tokens of all groups of all processes, where the loss is a mean over tokens; else None.

        The other aggregations divide by constants: the mean over groups is right for them.
        """
        if self.settings.aggregation is not Aggregation.token_mean:
            return None
        return max(1.0, distributed.all_reduce_sum(sum(float(self.mask(w.tokens, w.group).sum()) for w in works))[0])

    def mask(self, tokens: TokenBatch, group: RolloutGroup) -> Tensor:
        """The tokens that count in the loss: bool (G, T)."""
        if not self.settings.mask_truncated:
            return tokens.mask
        finished = torch.tensor([r.completion.is_finished for r in group.rollouts], device=tokens.mask.device)
        return tokens.mask & finished[:, None]

    def loss_metrics(self, places: Sequence[int], parts: Sequence[Parts]) -> dict[str, float]:
        """The loss metrics of all groups of all processes, averaged over groups."""
        done = [(place, merge_parts(part)) for place, part in zip(places, parts, strict=True) if part]
        rows = [{name: float(value) for name, value in metrics.items()} for _, metrics in done]
        everyone = self.of_all([place for place, _ in done], rows)
        return {name: float(torch.tensor([m[name] for m in everyone]).mean()) for name in everyone[0]}

    def all_groups(self, mine: Experience) -> list[RolloutGroup]:
        """The groups of all processes, in the order of a single one."""
        groups = [group for _, group in mine.drawn]
        if distributed.world_size() == 1:
            return groups
        rows = self.of_all([place for place, _ in mine.drawn], list(map(with_rounded_logps, groups)))
        return [group_from_json(row) for row in rows]

    def of_all(self, places: Sequence[int], rows: Sequence[Any]) -> list[Any]:
        """One row per place of this process -> the rows of all processes as JSON values, in order of their places.

        Numbers that are not finite stay what they are: the words NaN and Infinity are no JSON, but Python's own.
        """
        if distributed.world_size() == 1:
            return list(rows)
        lines = distributed.all_gather_lines(
            [json.dumps(to_json([place, row])) for place, row in zip(places, rows, strict=True)]
        )
        return [row for _, row in sorted(map(json.loads, lines), key=lambda pair: int(pair[0]))]

    def rollout(
        self, found: Sequence[tuple[int, PreparedPrompt]], step: int
    ) -> list[tuple[int, PreparedPrompt, RolloutGroup]]:
        """G completions for each prompt, read and judged; a prompt that memory does not suffice for is left out."""
        size = self.settings.prompts_at_once or max(1, len(found))
        kept = []
        for start in range(0, len(found), size):
            kept += self.sample_fitting(found[start : start + size], step)
        with self.policy.timer("reward"):
            return [(place, p, self.score(p.prompt, group, step)) for place, p, group in kept]

    def sample_fitting(
        self, found: Sequence[tuple[int, PreparedPrompt]], step: int
    ) -> list[tuple[int, PreparedPrompt, list[Completion]]]:
        """All prompts together; where they do not fit, each half on its own. One that never fits is left out.

        A group depends on its own seed only: together or alone, it is the same.
        """
        prepared = [p for _, p in found]
        ids = [p.prompt.sample.sample_id for p in prepared]
        seeds = [stream_seed(self.run.seed, self.run.stage, step, name) for name in ids]
        try:
            groups = self.policy.sample(prepared, self.settings.group_size, self.settings.sampling, seeds)
            return [(place, p, group) for (place, p), group in zip(found, groups, strict=True)]
        except Exception as error:
            if not self.is_survivable(error):
                raise
        half = len(found) // 2
        action = "sampled in two halves" if half else "left out"
        self.faults.record_own(step, "out_of_memory", samples=ids, action=action, phase="sample")
        if not half:
            return []
        return [*self.sample_fitting(found[:half], step), *self.sample_fitting(found[half:], step)]

    def score(self, prompt: Prompt, completions: Sequence[Completion], step: int) -> RolloutGroup:
        """Responses and rewards of one group."""
        rollouts = []
        for completion in completions:
            response = parse_response(completion.text)
            rollouts.append(Rollout(completion, response, self.rubric.score(response, prompt.sample)))
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
        return self.reference_pass(prepared, tokens)

    def reference_pass(self, prepared: Sequence[PreparedPrompt], tokens: Sequence[TokenBatch]) -> list[Tensor]:
        """log-probabilities under the policy at the start of the stage."""
        with self.policy.timer("reference"), self.policy.as_reference():
            temperature = self.settings.sampling.temperature
            return [
                torch.cat(fit_rows(partial(self.logps_of_rows, p, t, temperature), len(t.ids), self.is_survivable))
                for p, t in zip(prepared, tokens, strict=True)
            ]

    def logps_of_rows(
        self, prepared: PreparedPrompt, tokens: TokenBatch, temperature: float, part: slice, num_chunks: int = 0
    ) -> Tensor:
        """log-probabilities of some completions of a group."""
        return self.policy.logps(prepared, rows_of(tokens, part), temperature, num_chunks)

    def group_loss(
        self, work: TrainingGroup, advantages_G: Tensor, parts: Parts, part: slice, *, num_groups: int,
        normaliser: float | None = None, num_chunks: int = 0, is_first: bool = True,
    ) -> Tensor:  # fmt: skip
        """The share of some rows of one group in the step's loss; their metrics are appended to `parts`.

        The first update keeps its log-probabilities for the later ones: the ratio of the first is exactly 1.
        """
        mask_GT = self.mask(work.tokens, work.group)
        if normaliser is not None:  # the groups' losses add up, and their mean is what is logged
            whole: float | None = normaliser / num_groups
        elif part == WHOLE:
            whole = None
        else:
            whole = divisor(mask_GT, self.settings.aggregation, self.loss_settings.max_new_tokens)
        logps_GT = self.logps_of_rows(work.prepared, work.tokens, self.settings.sampling.temperature, part, num_chunks)
        if is_first:
            work.old_GT[part] = logps_GT.detach()
        reference_GT = None if work.reference_GT is None else work.reference_GT[part]
        inputs = LossInputs(logps_GT, work.old_GT[part], reference_GT, advantages_G[part], mask_GT[part])
        output = grpo_loss(inputs, self.loss_settings, whole)
        gap = {"rollout/logp_gap": sampler_gap(rows_of(work.tokens, part), work.old_GT[part])}
        parts.append((output.metrics | gap, int(inputs.mask_GT.sum())))
        return output.loss / num_groups

    def measure(
        self, prepared: Sequence[PreparedPrompt], tokens: Sequence[TokenBatch],
        references: list[Tensor] | list[None], step: int,
    ) -> list[Row]:  # fmt: skip
        """What the monitors need and the loss does not, where it is due."""
        due = self.run.monitors
        rows: list[Row] = []
        with self.policy.timer.booked_as("monitor"):
            known = [r for r in references if r is not None]
            if not known and is_due(due.kl_every, step):
                known = self.reference_pass(prepared, tokens)
            if known:
                rows += drift_rows(tokens, known)
            if is_due(due.control_every, step):
                rows += control_rows(self.policy, prepared, self.settings.sampling, self.is_survivable)
        return rows

    def offending_groups(
        self, works: Sequence[TrainingGroup], advantages: Sequence[Tensor], parts: Sequence[Parts]
    ) -> list[dict[str, Any]]:
        """The groups of this process with their losses: what to look at when a step was not finite."""
        return [
            {
                "sample_id": work.group.prompt.sample.sample_id,
                "loss": float(merge_parts(part)["loss/total"]),
                "advantages": advantages_G.tolist(),
                "group": to_json(work.group),
            }
            for work, advantages_G, part in zip(works, advantages, parts, strict=True)
            if part
        ]

    def record(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """What the model said, one line per group."""
        if distributed.is_rank_zero():
            append_jsonl(self.run.folder / "rollouts.jsonl", [with_rounded_logps(g) for g in groups])
        if (step + 1) % self.run.checkpoint_every == 0 or step + 1 == self.run.max_steps:
            self.tracker.examples(groups, step)


UNKNOWN_LOGP = -1e9
"""Stands for a log-probability that is not finite."""


def with_rounded_logps(group: RolloutGroup) -> RolloutGroup:
    """The group with rounded log-probabilities: rollouts are read by people and by the filter, not trained on again."""
    rollouts = []
    for rollout in group.rollouts:
        # a policy whose weights broke must still be readable; JSON has no NaN
        rounded = tuple(round(v, 5) if math.isfinite(v) else UNKNOWN_LOGP for v in rollout.completion.logps)
        rollouts.append(replace(rollout, completion=replace(rollout.completion, logps=rounded)))
    return replace(group, rollouts=tuple(rollouts))
