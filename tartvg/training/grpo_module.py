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

from tartvg.config import Aggregation, AnchorsConfig, GrpoConfig, SettingError, Strategy
from tartvg.config.preemption import PREEMPTION
from tartvg.data.packets import VideoError
from tartvg.grpo import LossInputs, LossSettings, group_advantages, grpo_loss, rollout_metrics
from tartvg.grpo.aggregation import divisor
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch, stream_seed, token_batch
from tartvg.records import append_jsonl, group_from_json, to_json
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training import ranks
from tartvg.training.fitting import WHOLE, LossOfRows, fit_rows, fit_update, is_out_of_memory, merge_parts
from tartvg.training.loop import StageRun, StepModule, require_any
from tartvg.training.measures import Row, control_rows, drift_rows, is_due, measured
from tartvg.training.plan import StepBatch
from tartvg.types import Completion, Prompt, Rollout, RolloutGroup

Parts = list[tuple[dict[str, Tensor], int]]
"""Loss metrics and number of tokens of each part of a group that was computed at once."""


@dataclass(frozen=True)
class Experience:
    """What one process trains on in one step: lists with one entry per group of its own."""

    places: list[int]
    """Of the groups among those of all processes."""
    prepared: list[PreparedPrompt]
    groups: list[RolloutGroup]
    tokens: list[TokenBatch]
    references: list[Tensor] | list[None]
    num_groups: int
    """Of all processes."""
    metrics: dict[str, float]
    """What was measured for the monitors, over all processes."""


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
        with self.engine.whole():
            self.experience = self.explore(batch)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One step of Algorithm 1: advantages, and `num_iterations` updates on the rollouts."""
        mine = self.experience
        del self.experience  # not to be kept until the next step has its own
        advantages = [self.advantages(g) for g in mine.groups]
        chunks = self.even_chunks(mine.tokens)
        normaliser = self.normaliser(mine)
        metrics = dict(mine.metrics)
        for _ in range(self.settings.num_iterations):
            parts: list[Parts] = [[] for _ in mine.groups]
            rows = zip(mine.prepared, mine.tokens, mine.references, advantages, mine.groups, parts, strict=True)
            losses: list[LossOfRows] = [
                partial(partial(self.group_loss, normaliser=normaliser, num_chunks=chunks), mine.num_groups, *row)
                for row in rows
            ]
            with self.policy.timer("update"):
                metrics["optim/grad_norm"] = self.fitting_update(losses, mine.groups, parts, batch.step, chunks)
            metrics |= self.loss_metrics(mine.places, parts)
            self.judge_update(batch.step, metrics, partial(self.suspects, mine.groups, advantages, parts))
        groups = self.all_groups(mine)
        self.record(groups, batch.step)
        self.end_step(batch.step, metrics | rollout_metrics(groups, self.anchors.target))

    # -- the steps of the step ---------------------------------------------------------------------------------------

    def explore(self, batch: StepBatch) -> Experience:
        """Rollouts of this process's prompts, what the reference thinks of them, and what monitors ask."""
        drawn = self.rollout(self.prepare(batch), batch.step)
        places, prepared = [place for place, _, _ in drawn], [prompt for _, prompt, _ in drawn]
        groups = [group for _, _, group in drawn]
        num_groups = int(ranks.total(len(groups))[0])
        at_least = 2 if self.engine.is_even else 1  # one token alone needs one pass fewer
        device = self.policy.device
        tokens = [token_batch([r.completion for r in g.rollouts], device, at_least) for g in groups]
        references = self.reference_logps(prepared, tokens)
        rows = self.measure(prepared, tokens, references, batch.step)
        kinds = len(rows) // max(1, len(places))
        metrics = measured(self.of_all(places * kinds, rows))
        return Experience(places, prepared, groups, tokens, references, num_groups, metrics)

    def prepare(self, batch: StepBatch) -> list[tuple[int, PreparedPrompt]]:
        """Prompts with their videos and places; one that cannot be decoded is left out, and says so."""
        prepared = []
        for place, prompt, clip in zip(batch.places, batch.prompts, batch.clips, strict=True):
            try:
                prepared.append((place, self.policy.prepare(prompt, clip)))
            except VideoError as error:
                print(f"step {batch.step}: training goes on without {prompt.sample.sample_id}: {error}")
        require_any(batch.step, len(prepared), len(batch.prompts))
        return prepared

    def normaliser(self, mine: Experience) -> float | None:
        """The tokens of all groups of all processes, where the loss is a mean over tokens; else None.

        The other aggregations divide by constants: the mean over groups is right for them.
        """
        if self.settings.aggregation is not Aggregation.token_mean:
            return None
        pairs = zip(mine.tokens, mine.groups, strict=True)
        return max(1.0, ranks.total(sum(float(self.mask(t, g).sum()) for t, g in pairs))[0])

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
        if ranks.world_size() == 1:
            return mine.groups
        return [group_from_json(row) for row in self.of_all(mine.places, list(map(light, mine.groups)))]

    def of_all(self, places: Sequence[int], rows: Sequence[Any]) -> list[Any]:
        """One row per place of this process -> the rows of all processes as JSON values, in order of their places.

        Numbers that are not finite stay what they are: the words NaN and Infinity are no JSON, but Python's own.
        """
        if ranks.world_size() == 1:
            return list(rows)
        lines = ranks.gather([json.dumps(to_json([place, row])) for place, row in zip(places, rows, strict=True)])
        return [row for _, row in sorted(map(json.loads, lines), key=lambda pair: int(pair[0]))]

    def rollout(
        self, found: Sequence[tuple[int, PreparedPrompt]], step: int
    ) -> list[tuple[int, PreparedPrompt, RolloutGroup]]:
        """G completions for each prompt, read and judged; a prompt that memory does not suffice for is left out."""
        size = self.settings.prompts_at_once or max(1, len(found))
        kept = []
        for start in range(0, len(found), size):
            kept += self.sample_fitting(found[start : start + size], step)
        if found and not kept:
            raise SettingError("no prompt of this step can be sampled in this memory; lower grpo.group_size")
        with self.policy.timer("reward"):
            return [(place, p, self.judge(p.prompt, group, step)) for place, p, group in kept]

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
        self.faults.record(step, "out_of_memory", samples=ids, action=action, phase="sample")
        if not half:
            return []
        return [*self.sample_fitting(found[:half], step), *self.sample_fitting(found[half:], step)]

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

    def is_survivable(self, error: BaseException) -> bool:
        """Whether memory ran out at a place from which this process, alone, can try again."""
        is_alone = self.run.strategy is Strategy.single
        return is_out_of_memory(error) and is_alone and not PREEMPTION.is_held

    def fitting_update(
        self, losses: Sequence[LossOfRows], groups: Sequence[RolloutGroup], parts: Sequence[Parts], step: int,
        num_chunks: int = 0,
    ) -> float:  # fmt: skip
        """`update`, in smaller parts where memory asks for it; every such retreat is recorded. In one process only."""
        if self.run.strategy is not Strategy.single:
            return self.update([partial(loss, WHOLE) for loss in losses], num_chunks)

        def begin() -> None:
            for part in parts:
                part.clear()

        def note(group: int, num_parts: int, error: str) -> None:
            action = f"tried in {num_parts} parts" if num_parts else "left out"
            sample = groups[group].prompt.sample.sample_id
            self.faults.record(step, "out_of_memory", samples=[sample], action=action, error=error.splitlines()[0])

        rows = [len(group.rollouts) for group in groups]
        return fit_update(self.update, losses, rows, self.is_survivable, begin, note)

    def group_loss(
        self, num_groups: int, prepared: PreparedPrompt, tokens: TokenBatch, reference_GT: Tensor | None,
        advantages_G: Tensor, group: RolloutGroup, parts: Parts, part: slice, normaliser: float | None = None,
        num_chunks: int = 0,
    ) -> Tensor:  # fmt: skip
        """The share of some rows of one group in the step's loss; their metrics are appended to `parts`."""
        mask_GT = self.mask(tokens, group)
        if normaliser is not None:  # the groups' losses add up, and their mean is what is logged
            whole: float | None = normaliser / num_groups
        elif part == WHOLE:
            whole = None
        else:
            whole = divisor(mask_GT, self.settings.aggregation, self.loss_settings.max_new_tokens)
        logps_GT = self.logps_of_rows(prepared, tokens, self.settings.sampling.temperature, part, num_chunks)
        old_GT, reference_GT = tokens.logps[part], None if reference_GT is None else reference_GT[part]
        inputs = LossInputs(logps_GT, old_GT, reference_GT, advantages_G[part], mask_GT[part])
        output = grpo_loss(inputs, self.loss_settings, whole)
        parts.append((output.metrics, int(inputs.mask_GT.sum())))
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
                rows += control_rows(self.policy, prepared, self.settings.sampling)
        return rows

    def suspects(
        self, groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], parts: Sequence[Parts]
    ) -> list[dict[str, Any]]:
        """The groups of this process with their losses: what to look at when a step was not finite."""
        return [
            {
                "sample_id": group.prompt.sample.sample_id,
                "loss": float(merge_parts(part)["loss/total"]),
                "advantages": advantages_G.tolist(),
                "group": to_json(group),
            }
            for group, advantages_G, part in zip(groups, advantages, parts, strict=True)
            if part
        ]

    def record(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """What the model said, one line per group."""
        if ranks.is_leader():
            append_jsonl(self.run.folder / "rollouts.jsonl", [light(g) for g in groups])
        if (step + 1) % self.run.checkpoint_every == 0 or step + 1 == self.run.max_steps:
            self.tracker.examples(groups, step)


UNKNOWN_LOGP = -1e9
"""Stands for a log-probability that is not finite."""


def rows_of(tokens: TokenBatch, part: slice) -> TokenBatch:
    """Some completions of a group."""
    return tokens if part == WHOLE else TokenBatch(tokens.ids[part], tokens.mask[part], tokens.logps[part])


def light(group: RolloutGroup) -> RolloutGroup:
    """The group with rounded log-probabilities: rollouts are read by people and by the filter, not trained on again."""
    rollouts = []
    for rollout in group.rollouts:
        # a policy whose weights broke must still be readable; JSON has no NaN
        rounded = tuple(round(v, 5) if math.isfinite(v) else UNKNOWN_LOGP for v in rollout.completion.logps)
        rollouts.append(replace(rollout, completion=replace(rollout.completion, logps=rounded)))
    return replace(group, rollouts=tuple(rollouts))
