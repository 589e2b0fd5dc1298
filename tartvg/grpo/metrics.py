"""What a batch of rollout groups looks like, in the fixed vocabulary of the metrics. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean, pstdev

from tartvg.spans import refinement, refinement_rates
from tartvg.types import Fault, Rollout, RolloutGroup


def rollout_metrics(groups: Sequence[RolloutGroup], target: int) -> dict[str, float]:
    """Means and rates over all rollouts of `groups` (at least one rollout); `target` is K, the wanted anchor count.

    Every key is always there and finite. Rates are in [0, 1], standard deviations are over the population, lengths
    are tokens; a rate of nothing (no successive anchors, no answers) is 0.

    - reward/<term>_mean: each term of the rewards before its weight
    - anchors/valid_rate: right format and N >= 2 (the paper's format figure); target_rate: right format and N == K
    - anchors/anchored_rate: share of completions whose reasoning holds an anchor; pairs_mean: successive anchors each
    - anchors/refinement_rate: share of successive anchors whose soft IoU grew (delta_i = +1 of TAR3)
    - anchors/answer_match_rate: share of readable answers that equal the last anchor
    - anchors/first_iou_mean, last_iou_mean: IoU, in [0, 1], of the first and of the last anchor, over completions with
      at least two of them (one where K is 1); gain_mean: last minus first
    - anchors/held_back_mean: IoU of a completion's own best anchor minus that of its first: what it could have said at
      once. Over the same completions, and so are
    - anchors/equal_rate: the last anchor repeats the first; first_exact_rate: the first is the truth, to 0.005 s
    - anchors/inexact_refined_rate, inexact_worsened_rate: of those whose first anchor is not exact, how many end closer
      to the truth, and how many farther from it
    - group/zero_variance_rate: share of groups whose rewards are all equal, which teach nothing

    - rollout/entropy: mean of -log p over all sampled tokens, in nats: an unbiased estimate of the policy's entropy per
      token at the sampling temperature (with top-p or top-k: of the cross-entropy to the whole distribution)

    A mix of data sets adds reward/<source>/<name> and anchors/<source>/<name> for each source that is among the groups,
    and group/<source>/count.

    Source: arXiv 2508.07683, failure signatures.
    """
    return _pooled_metrics(groups, target) | _source_metrics(groups, target)


def _pooled_metrics(groups: Sequence[RolloutGroup], target: int) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert rollouts, "metrics of no rollouts"
    rewards = [r.reward for r in rollouts]
    totals = [[r.reward.total for r in group.rollouts] for group in groups if group.rollouts]
    lengths = [len(r.completion.token_ids) for r in rollouts]
    return {
        "reward/total_mean": fmean(r.total for r in rewards),
        "reward/total_std": pstdev([r.total for r in rewards]),
        **{f"reward/{name}_mean": fmean(r.terms[name] for r in rewards) for name in rewards[0].terms},
        **_anchor_metrics(rollouts, target),
        **_first_and_last(groups, target),
        "group/zero_variance_rate": _rate(min(group) == max(group) for group in totals),
        "group/reward_std_mean": fmean(pstdev(group) for group in totals),
        "rollout/entropy": -sum(sum(r.completion.logps) for r in rollouts) / max(1, sum(lengths)),
        "rollout/length_mean": fmean(lengths),
        "rollout/length_max": float(max(lengths)),
        "rollout/truncated_rate": _rate(not r.completion.is_finished for r in rollouts),
        "rollout/unparsed_rate": _rate(r.response.answer is None for r in rollouts),
    }


def _source_metrics(groups: Sequence[RolloutGroup], target: int) -> dict[str, float]:
    """The rewards and the rates of anchors and format of each source of a mix, and the number of its groups."""
    by_source: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        if group.prompt.sample.source:
            by_source.setdefault(group.prompt.sample.source, []).append(group)
    found: dict[str, float] = {}
    for source, own in sorted(by_source.items()):
        found[f"group/{source}/count"] = float(len(own))
        for name, value in _pooled_metrics(own, target).items():
            prefix, _, rest = name.partition("/")
            if prefix in ("reward", "anchors"):
                found[f"{prefix}/{source}/{rest}"] = value
    return found


def _anchor_metrics(rollouts: Sequence[Rollout], target: int) -> dict[str, float]:
    well_formed = [r.response.num_anchors if r.reward.terms["format"] == 1.0 else 0 for r in rollouts]
    answered = [r.response for r in rollouts if r.response.answer is not None]
    return {
        "anchors/count_mean": fmean(r.response.num_anchors for r in rollouts),
        "anchors/valid_rate": _rate(count >= 2 for count in well_formed),
        "anchors/target_rate": _rate(count == target for count in well_formed),
        "anchors/anchored_rate": _rate(r.response.num_anchors > 0 for r in rollouts),
        "anchors/pairs_mean": fmean(max(0, r.response.num_anchors - 1) for r in rollouts),
        "anchors/refinement_rate": _rate(b > a for r in rollouts for a, b in pairwise(r.reward.anchor_ious)),
        "anchors/answer_match_rate": _rate(
            bool(response.anchors) and Fault.ANSWER_MISMATCH not in response.faults for response in answered
        ),
    }


def _first_and_last(groups: Sequence[RolloutGroup], target: int) -> dict[str, float]:
    found = [
        refinement(r.response.anchors, group.prompt.sample.windows)
        for group in groups
        for r in group.rollouts
        if r.response.num_anchors >= min(2, target)
    ]
    return {
        "anchors/first_iou_mean": _mean([r.first for r in found]),
        "anchors/last_iou_mean": _mean([r.last for r in found]),
        "anchors/gain_mean": _mean([r.last - r.first for r in found]),
        "anchors/held_back_mean": _mean([r.best - r.first for r in found]),
        **{f"anchors/{name}": rate for name, rate in refinement_rates(found).items()},
    }


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _rate(flags: Iterable[bool]) -> float:
    """Share of true flags; 0 of none."""
    values = list(flags)
    return sum(values) / len(values) if values else 0.0
