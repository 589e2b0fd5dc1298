"""Who earned the reward? What a group earned -> advantages of each segment of its completions.

Dimensions: G rollouts per prompt, K most paid anchors of a completion of the group, S segments, T tokens.

Segment k < K holds the tokens after anchor k - 1 up to the end of anchor k, counted from 0. Segment K is the last one
of every completion: what follows its last anchor, the answer among it. A completion with fewer anchors has no segments
between, and one without any is its last segment alone. So S is K + 1, or 1 where all tokens have the same advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tartvg.config import AdvantageScale, Credit, Normalise
from tartvg.grpo.advantages import group_advantages

ANSWER = "iou"
"""Term of the answer alone."""
REFINEMENT = "tar3"
"""Term that compares an anchor with the one before: what makes a poor first anchor pay."""
TURN_WEIGHT = 1.0
"""lambda of `turn`: weight of an anchor's own terms beside the outcome (MT-GRPO, arXiv 2505.11821)."""


@dataclass(frozen=True)
class Earned:
    """What the completions of one group earned: terms before their weights."""

    totals_G: Tensor
    """R: the weighted sum of all terms."""
    terms_G: Mapping[str, Tensor]
    """What no anchor earned: format, IoU of the answer, count; 0 for a term that is all of anchors."""
    shares_GK: Mapping[str, Tensor]
    """Terms of anchors, as the share of each; 0 where a completion has no such anchor."""
    ious_GK: Tensor
    """Soft IoU of each anchor; 0 where there is none."""
    num_anchors_G: Tensor
    """Paid anchors of each completion, at most K."""

    @property
    def has_anchor_GK(self) -> Tensor:
        """Which completions have a k-th anchor."""
        return torch.arange(self.ious_GK.shape[1]) < self.num_anchors_G[:, None]

    @property
    def last_iou_G(self) -> Tensor:
        """Soft IoU of the last anchor; 0 without any."""
        padded = torch.nn.functional.pad(self.ious_GK, (1, 0))
        return padded.gather(1, self.num_anchors_G[:, None])[:, 0]

    def since(self, anchor: int) -> dict[str, Tensor]:
        """Every term without what the anchors before `anchor` earned."""
        shares = {name: values_GK[:, anchor:].sum(dim=-1) for name, values_GK in self.shares_GK.items()}
        return {name: term_G + shares.get(name, 0.0) for name, term_G in self.terms_G.items()}


@dataclass(frozen=True)
class Comparison:
    """How completions of a group are compared: each minus the mean, over the spread."""

    weights: Mapping[str, float]
    """Of the terms in the total, negative for a cost; 1 for what is no term."""
    normalise: Normalise
    scale: AdvantageScale

    def __call__(self, terms: Mapping[str, Tensor], is_in_G: Tensor | None = None) -> Tensor:
        """Advantages (G,) of the weighted sum of `terms`, each (G,); 0 outside `is_in_G`, and if fewer than two are in.

        With `Normalise.terms` each term is normalised before its weight, and the sum again, so that its scale beside
        the KL penalty stays (GDPO, arXiv 2601.05242, which does the latter over the batch).
        """
        some = next(iter(terms.values()))
        rows = torch.ones_like(some, dtype=torch.bool) if is_in_G is None else is_in_G
        found_G = torch.zeros_like(some)
        if int(rows.sum()) < 2:
            return found_G
        chosen = {name: value_G[rows] for name, value_G in terms.items()}
        if self.normalise is Normalise.terms:
            chosen = {name: group_advantages(values, self.scale) for name, values in chosen.items()}
        weighted = [self.weights.get(name, 1.0) * values for name, values in chosen.items()]
        found_G[rows] = group_advantages(torch.stack(weighted).sum(dim=0), self.scale)
        return found_G


Scheme = Callable[[Earned, Comparison], Tensor]
"""What a group earned -> advantages (G, S)."""


def outcome(earned: Earned, compare: Comparison) -> Tensor:
    """The whole reward, on all tokens: (G, 1) (GRPO, arXiv 2402.03300)."""
    terms = {"total": earned.totals_G} if compare.normalise is Normalise.total else earned.since(0)
    return compare(terms)[:, None]


def return_to_go(earned: Earned, compare: Comparison) -> Tensor:
    """The reward without what earlier anchors have earned (arXiv 2402.03300, 4.1.3, compared anchor by anchor)."""
    return _segments(earned, compare, earned.since, earned.since(earned.ious_GK.shape[1]))


def own_term(earned: Earned, compare: Comparison) -> Tensor:
    """The outcome on all tokens, and each anchor's own terms on its segment (after Zoom-Zero, arXiv 2512.14273).

    The outcome is what no anchor earned: format, IoU of the answer, count.
    """
    return compare(earned.terms_G)[:, None] + _segments(earned, compare, _own_of(earned))


def own_part(earned: Earned, compare: Comparison) -> Tensor:
    """As `own_term`, but the answer's IoU is paid to the last segment alone, and compared apart from format and count.

    So the tokens of an anchor hear of nothing but it and the form of the whole. Ours.
    """
    own = _segments(earned, compare, _own_of(earned), {ANSWER: earned.terms_G[ANSWER]})
    return compare(_form_of(earned))[:, None] + own


def turn(earned: Earned, compare: Comparison) -> Tensor:
    """As `own_term`, but TAR3 is paid to nobody and the rest is weighted (MT-GRPO, arXiv 2505.11821)."""
    kept = {name: values_GK for name, values_GK in earned.shares_GK.items() if name != REFINEMENT}
    own = _segments(earned, compare, _own_of(replace(earned, shares_GK=kept)))
    return compare(earned.terms_G)[:, None] + TURN_WEIGHT * own


def potential(earned: Earned, compare: Comparison) -> Tensor:
    """How much better the last anchor is than the one before a segment: s_K - s_{k-1}, with 0 before the first.

    The answer is paid for its own IoU; format and count are compared apart and paid on all tokens. What the first
    anchor is worth shows in the last one only, so a poor one does not pay (potential-based shaping, Ng et al. 1999).
    """
    before_GK = torch.nn.functional.pad(earned.ious_GK, (1, 0))
    last_G, answer = earned.last_iou_G, {ANSWER: earned.terms_G[ANSWER]}
    gains = _segments(earned, compare, lambda k: {"gain": last_G - before_GK[:, k]}, answer)
    return compare(_form_of(earned))[:, None] + gains


SCHEMES: dict[Credit, Scheme] = {
    Credit.outcome: outcome,
    Credit.return_to_go: return_to_go,
    Credit.own_term: own_term,
    Credit.own_part: own_part,
    Credit.turn: turn,
    Credit.potential: potential,
}


def _own_of(earned: Earned) -> Callable[[int], Mapping[str, Tensor]]:
    """What anchor k earned, term by term."""
    return lambda k: {name: values_GK[:, k] for name, values_GK in earned.shares_GK.items()}


def _form_of(earned: Earned) -> dict[str, Tensor]:
    """Terms of the completion as a whole: format and count."""
    return {name: term_G for name, term_G in earned.terms_G.items() if name != ANSWER}


def _segments(
    earned: Earned, compare: Comparison, anchor: Callable[[int], Mapping[str, Tensor]],
    last: Mapping[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Compare `anchor(k)` among those that have a k-th anchor, and `last`, if any, among all: (G, K + 1)."""
    has_GK = earned.has_anchor_GK
    columns = [compare(anchor(k), has_GK[:, k]) for k in range(has_GK.shape[1])]
    columns.append(torch.zeros_like(earned.totals_G) if last is None else compare(last))
    return torch.stack(columns, dim=1)


def per_token(advantages_GS: Tensor, segments_GT: Tensor) -> Tensor:
    """Advantages (G, T) of tokens from those of their segments; `segments_GT` numbers them from 0."""
    return advantages_GS.gather(1, segments_GT)
