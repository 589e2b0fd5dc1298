"""The rules by which works score, as named conventions: the same predictions, and numbers that can be compared.

What differs between works: how a text is read, whether answers are rounded, the truth where a query has several
windows, whether these were cut at the end of the video, `>=` or `>` at a threshold, and whether queries without any
prediction count. `CONVENTIONS` holds each work's choice, as its own evaluator has it.

Each says what that evaluator does with one answer per query. Not covered: several predicted windows per query (UniTime,
VideoChat-R1.5), and queries that an evaluator leaves out because of their videos.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tartvg.evaluation.score import Rule
from tartvg.types import Prediction, Span


@dataclass(frozen=True)
class Convention:
    """How one work scores."""

    source: str
    """Repository and file from which this is known."""
    reading: str | None = None
    """A key of `tartvg.evaluation.readings.READINGS`; None: it scores stored windows, and texts are read strictly."""
    rounding: float | None = None
    """Seconds to whose multiples an answer is rounded before it is scored."""
    rule: Rule = "first"
    """The truth where a query has several windows: see `tartvg.evaluation.score.answer_iou`."""
    is_clipped: bool = False
    """Windows that end after their video are cut there."""
    is_strict: bool = False
    """R1 counts IoU > threshold instead of >=."""
    is_only_predicted: bool = True
    """Queries without any prediction are left out."""


CONVENTIONS: dict[str, Convention] = {
    "ours": Convention("tartvg.evaluation.score", rule="best", is_clipped=True, is_only_predicted=False),
    "moment_detr": Convention(
        "jayleicn/moment_detr standalone_eval/eval.py", rule="best", is_only_predicted=False
    ),
    "timechat": Convention("RenShuhuai-Andy/TimeChat metrics/tvg/eval_tvg.py --sample"),
    "timezero": Convention("www-Ye/Time-R1 evaluate.py", reading="timezero"),
    "time_r1": Convention(
        "xiaomi-research/time-r1 src/vllm_inference/eval_all.py", reading="timezero", is_strict=True
    ),
    "timelens": Convention(
        "TencentARC/TimeLens evaluation/eval_dataloader.py, compute_metrics.py", reading="timelens", rounding=1.0
    ),
    "omnivtg": Convention(
        "oceanflowlab/OmniVTG standalone_eval/evaluate_vtg.py", reading="last_two", rule="best"
    ),
    "unitime": Convention("Lzq5/UniTime eval_metrics.py", rule="union", is_strict=True),
}  # fmt: skip
"""By the name that `--convention` takes."""


def rounded(prediction: Prediction, unit: float | None) -> Prediction:
    """The prediction with its answer at multiples of `unit` seconds; a half goes to the even one, as in Python."""
    if unit is None or prediction.answer is None:
        return prediction
    start, end = (round(time / unit) * unit for time in prediction.answer)
    return replace(prediction, answer=Span(start, end))
