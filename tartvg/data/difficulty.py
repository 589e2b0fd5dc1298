"""How hard each training query is for a policy, from its rollouts, and which queries a rule keeps. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from statistics import fmean
from typing import Any

from tartvg.config import DifficultyConfig, DifficultyRule
from tartvg.spans import iou
from tartvg.types import Prompt, RolloutGroup, Span

NUM_BINS = 10


@dataclass(frozen=True)
class Difficulty:
    """What a policy made of one query. `difficulty.jsonl` holds one per line."""

    sample_id: str
    rewards: tuple[float, ...]
    """Total reward of each rollout."""
    ious: tuple[float, ...]
    """IoU of each answer with the window that it overlaps most; 0 where it could not be read."""

    def mean(self, measure: str) -> float:
        """The mean of `iou` or `reward` over the rollouts."""
        return fmean(self.ious if measure == "iou" else self.rewards)


@dataclass(frozen=True)
class Selection:
    """What a rule makes of the queries. `<stage>/difficulty.json` holds it."""

    rule: str
    """In words."""
    num_queries: int
    num_kept: int
    num_unmeasured: int
    """Queries without a rollout: they are left out."""
    edges: tuple[float, ...]
    """Of the bins of means, one more than there are bins; empty where nothing was measured."""
    measured: tuple[int, ...]
    """Queries in each bin."""
    kept: tuple[int, ...]
    """Queries in each bin that are kept."""


def difficulties(groups: Iterable[RolloutGroup]) -> list[Difficulty]:
    """One entry per query, in the order of the first rollout; a query that was asked again has all its rollouts."""
    rewards: dict[str, list[float]] = {}
    ious: dict[str, list[float]] = {}
    for group in groups:
        sample = group.prompt.sample
        for rollout in group.rollouts:
            rewards.setdefault(sample.sample_id, []).append(rollout.reward.total)
            ious.setdefault(sample.sample_id, []).append(_answer_iou(rollout.response.answer, sample.windows))
    return [Difficulty(key, tuple(values), tuple(ious[key])) for key, values in rewards.items()]


def difficulty_from_json(value: Mapping[str, Any]) -> Difficulty:
    """Inverse of `records.to_json`. Raises KeyError or TypeError for something else."""
    return Difficulty(value["sample_id"], tuple(map(float, value["rewards"])), tuple(map(float, value["ious"])))


def select(
    prompts: Sequence[Prompt], known: Mapping[str, Difficulty], rule: DifficultyConfig, seed: int
) -> tuple[list[Prompt], Selection]:
    """The prompts that the rule keeps, in their order, and what it makes of all; `known` is by sample id.

    Whether a query is kept depends on its own rollouts, on its id and on the seed, not on the other queries.
    """
    is_kept, words = _RULES[rule.keep](rule, seed)
    asked = [p for p in prompts if p.sample.sample_id in known]
    chosen = [p for p in asked if is_kept(known[p.sample.sample_id])]
    means = [known[p.sample.sample_id].mean(rule.measure) for p in asked]
    edges = _edges(means, rule.measure)
    counts = _histogram(means, edges)
    kept = _histogram([known[p.sample.sample_id].mean(rule.measure) for p in chosen], edges)
    return chosen, Selection(words, len(prompts), len(chosen), len(prompts) - len(asked), edges, counts, kept)


Judge = Callable[[Difficulty], bool]


def _band(rule: DifficultyConfig, seed: int) -> tuple[Judge, str]:
    words = f"mean {_name(rule)} in [{rule.low:g}, {rule.high:g}]"
    return lambda found: rule.low <= found.mean(rule.measure) <= rule.high, words


def _gaussian(rule: DifficultyConfig, seed: int) -> tuple[Judge, str]:
    """Keep with the density of the normal distribution over its largest value (cf. arXiv 2503.13377, TimeRFT)."""

    def is_kept(found: Difficulty) -> bool:
        distance = (found.mean(rule.measure) - rule.centre) / rule.width
        return _chance(seed, found.sample_id) < exp(-(distance**2) / 2)

    return is_kept, f"a Gaussian of the mean {_name(rule)} around {rule.centre:g}, width {rule.width:g}"


def _undecided(rule: DifficultyConfig, seed: int) -> tuple[Judge, str]:
    words = f"some rollouts right (IoU >= {rule.right_iou:g}) and some wrong"
    return lambda found: len({value >= rule.right_iou for value in found.ious}) == 2, words


def _all(rule: DifficultyConfig, seed: int) -> tuple[Judge, str]:
    return lambda found: True, "every query"


_RULES: dict[DifficultyRule, Callable[[DifficultyConfig, int], tuple[Judge, str]]] = {
    DifficultyRule.all: _all,
    DifficultyRule.band: _band,
    DifficultyRule.gaussian: _gaussian,
    DifficultyRule.undecided: _undecided,
}


def _name(rule: DifficultyConfig) -> str:
    return {"iou": "IoU", "reward": "reward"}[rule.measure]


def _chance(seed: int, sample_id: str) -> float:
    """A number in [0, 1), the same on every machine."""
    digest = hashlib.sha256(f"tartvg-difficulty/{seed}/{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _answer_iou(answer: Span | None, windows: Sequence[Span]) -> float:
    return 0.0 if answer is None else max(iou(answer, window) for window in windows)


def _edges(means: Sequence[float], measure: str) -> tuple[float, ...]:
    if not means:
        return ()
    low, high = (0.0, 1.0) if measure == "iou" else (min(means), max(means))
    return tuple(low + (high - low) * number / NUM_BINS for number in range(NUM_BINS + 1))


def _histogram(means: Sequence[float], edges: Sequence[float]) -> tuple[int, ...]:
    """Means in each bin; a bin holds its lower edge, the last one both."""
    counts = [0] * max(0, len(edges) - 1)
    for mean in means:
        place = sum(mean >= edge for edge in edges[1:-1])
        counts[place] += 1
    return tuple(counts)
