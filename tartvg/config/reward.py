"""Settings of the reward."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from tartvg.config.choices import CountPenalty, FormatKind, IouKind, Truth
from tartvg.config.fields import Settings, setting


@dataclass
class RewardConfig(Settings, path="reward"):
    """Weights and forms of the reward's terms; they apply as written."""

    format_weight: float = setting(3.0, at_least=0, below=inf)
    """Weight of the format term."""
    format_kind: FormatKind = FormatKind.strict
    """Whether the format term is 1 or 0, or graded: part of it for a closed think block and for the order of blocks."""
    iou_weight: float = setting(1.0, at_least=0, below=inf)
    """Weight of the answer's IoU."""
    tar1_weight: float = setting(1.0, at_least=0, below=inf)
    """Weight of the anchors' position-weighted IoU (TAR1)."""
    beta: float = setting(5.0, at_least=0, below=inf)
    """Weight of the penalty for a wrong number of anchors (TAR2)."""
    gamma: float = setting(1.0, at_least=0, below=inf)
    """Weight of the refinement term (TAR3)."""
    iou: IouKind = IouKind.soft
    """The IoU of all terms."""
    truth: Truth = Truth.best
    """What an answer to a query with several windows is compared with: the `first`, the one of highest soft IoU
    (`best`), or the union (`all`). The anchors are compared with the same."""
    tar2_form: CountPenalty = CountPenalty.abs
    """How TAR2 grows with the distance from `anchors.count`."""
    needs_anchors: bool = True
    """The format needs at least one anchor; False for the TimeZero baseline."""
    answer_is_last_anchor: bool = True
    """The format needs the answer to equal the last anchor."""
    unparsed_iou: float = setting(-1.0, at_least=-1, at_most=0)
    """IoU reward of an answer that cannot be read: the infimum of soft IoU."""
