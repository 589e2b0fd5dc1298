"""Is a training going wrong? One pure function per failure: metrics so far -> finding. No torch.

A line is what a step logs (see tartvg.tracking); null and missing values are allowed. Most functions judge the mean of
the last `window` steps. The bounds are ours unless a line says that the paper states one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tartvg.config import MonitorName, MonitorsConfig

Line = Mapping[str, float | None]

WINDOW = 5
"""Steps over which a metric is averaged before it is judged: one step of a few groups is mostly noise."""
SURPLUS_ANCHORS = 0.5
"""reward_hacking: mean number of anchors above `anchors.count` [stated: 0.5]."""
FORMAT_SHARE = 0.5
"""format_collapse: the format rate is below this share of its best running mean [stated: half]."""
FORMAT_HIGH = 0.2
"""format_collapse: that best must have reached this much. Below it the rate of a few hundred completions halves by
chance, and nothing that was learned is lost."""
REFINEMENT_RATE = 0.2
"""stagnant_refinement: share of refined anchors below this [stated: 0.2]. Chance is near one half."""
MIN_PAIRS = 0.1
"""stagnant_refinement: successive anchors per completion that it takes to speak of refinement at all."""
HELD_RISE = 0.06
"""sandbagging: a completion's best anchor minus its first is this far above its lowest running mean. With the paper's
reward it rises by 0.09 to 0.12 in each of three seeds, where every anchor is paid for itself by 0.04 at most."""
ZERO_VARIANCE_RATE = 0.75
"""zero_variance: share of groups without any difference in reward above this. They teach nothing: at three quarters, a
step costs four times what it teaches."""
TRUNCATED_RATE = 0.5
"""truncation: share of completions that hit the length limit above this. Their answers are cut off, so most of the
reward then depends on a setting."""
ENTROPY_MIN = 0.02
"""entropy_collapse: nats per token below this. 0.02 is a policy that says the likeliest token 99.7 times in 100 (if it
has two to choose from): groups become copies."""
ENTROPY_SHARE = 0.1
"""entropy_collapse: also when below this share of the first window's entropy. Healthy runs of the tiny policy keep four
fifths of theirs while they learn the format; at a tenth there is nothing left to choose from."""
KL_MAX = 0.5
"""kl_blowup: nats per token from the reference above this. At 0.5 a completion of 100 tokens is e^50 times less likely
under the reference: the language has become another one. Estimated by k1: a few odd tokens of a healthy run lifted k3,
which is exponential in them, to 0.7 for one step."""
BLIND_AGREEMENT = 0.9
"""video_blindness: mean IoU above this between the answers to a video and to the same frames in another order."""


@dataclass(frozen=True)
class Finding:
    """A metric beyond its bound."""

    metric: str
    value: float
    bound: float
    words: str
    """What it means, for people."""


@dataclass(frozen=True)
class Alarm:
    """A monitor that has just begun to fire. `alarms.jsonl` holds one per line."""

    monitor: str
    step: int
    metric: str
    value: float | None
    """None when it is not finite."""
    bound: float
    text: str
    """One line for the terminal and for W&B."""


def reward_hacking(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """More anchors than wanted: surplus ones are being paid for (arXiv 2508.07683, failure signatures)."""
    value, bound = _recent(lines, "anchors/count_mean", window), target + SURPLUS_ANCHORS
    if value is None or value <= bound:
        return None
    return Finding("anchors/count_mean", value, bound, f"anchors multiply beyond the {target} that are wanted")


def format_collapse(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """The format is being unlearnt: its rate fell from its best (arXiv 2508.07683, failure signatures)."""
    values = _values(lines, "reward/format_mean")
    means = [fmean(values[end - window : end]) for end in range(window, len(values) + 1)]
    if not means or max(means) < FORMAT_HIGH or means[-1] >= FORMAT_SHARE * max(means):
        return None
    bound = FORMAT_SHARE * max(means)
    return Finding("reward/format_mean", means[-1], bound, f"the format is being lost; it was at {max(means):.3g}")


def stagnant_refinement(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """Later anchors are hardly ever better than earlier ones (arXiv 2508.07683, failure signatures)."""
    rates = _values(lines, "anchors/refinement_rate")[-window:]
    pairs = _values(lines, "anchors/pairs_mean")[-window:]
    if len(rates) < window or len(pairs) < len(rates) or fmean(pairs) < MIN_PAIRS or sum(pairs) == 0:
        return None
    value = sum(r * p for r, p in zip(rates, pairs, strict=True)) / sum(pairs)
    if value >= REFINEMENT_RATE:
        return None
    return Finding("anchors/refinement_rate", value, REFINEMENT_RATE, "anchors no longer refine one another")


def sandbagging(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """The best anchor pulls away from a first one that gets no better: it is paid for leaving room to refine it."""
    pairs = [(line.get("anchors/held_back_mean"), line.get("anchors/first_iou_mean")) for line in lines]
    known = [(held, first) for held, first in pairs if held is not None and first is not None]
    if target < 2 or len(known) < window:
        return None
    ends = range(window, len(known) + 1)
    helds, firsts = ([fmean(v[side] for v in known[end - window : end]) for end in ends] for side in (0, 1))
    least = min(range(len(helds)), key=helds.__getitem__)
    bound = helds[least] + HELD_RISE
    if helds[-1] <= bound or firsts[-1] > firsts[least]:
        return None
    words = f"the first anchor holds back what the policy knows; it was {firsts[least]:.3g} and is {firsts[-1]:.3g}"
    return Finding("anchors/held_back_mean", helds[-1], bound, words)


def zero_variance(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """Groups whose rewards are all equal have no advantage and teach nothing."""
    return _above(lines, "group/zero_variance_rate", ZERO_VARIANCE_RATE, window, "most groups teach nothing")


def truncation(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """Completions that the length limit cuts have no answer left to judge."""
    words = "most completions are cut off by max_new_tokens"
    return _above(lines, "rollout/truncated_rate", TRUNCATED_RATE, window, words)


def entropy_collapse(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """The policy has stopped exploring: its completions are becoming copies."""
    values = _values(lines, "rollout/entropy")
    if len(values) < window:
        return None
    value = fmean(values[-window:])
    bound = max(ENTROPY_MIN, ENTROPY_SHARE * fmean(values[:window]))
    return Finding("rollout/entropy", value, bound, "completions are becoming copies") if value < bound else None


def kl_blowup(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """The policy has left the language of its reference. Judged at once: it is measured over thousands of tokens."""
    return _above(lines, "rollout/kl", KL_MAX, 1, "the policy speaks another language than its reference")


def video_blindness(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """The same answers when the frames are in another order: the policy does not look. Judged at once: it is rare."""
    words = "anchors and answers stay the same when the frames are shuffled"
    return _above(lines, "anchors/shuffled_agreement", BLIND_AGREEMENT, 1, words)


def non_finite(lines: Sequence[Line], window: int, target: int) -> Finding | None:
    """A gradient or a loss that is infinite or no number. Judged at once."""
    for metric in ("optim/grad_norm", "loss/total"):
        value = lines[-1].get(metric, 0.0) if lines else 0.0
        if value is None or not math.isfinite(value):
            return Finding(metric, math.nan, math.inf, f"{metric} is not finite; the step changed no weight")
    return None


Monitor = Callable[[Sequence[Line], int, int], Finding | None]
"""(lines, window, K) -> what is wrong, if anything."""
MONITORS: dict[MonitorName, Monitor] = {
    MonitorName.reward_hacking: reward_hacking,
    MonitorName.format_collapse: format_collapse,
    MonitorName.stagnant_refinement: stagnant_refinement,
    MonitorName.sandbagging: sandbagging,
    MonitorName.zero_variance: zero_variance,
    MonitorName.truncation: truncation,
    MonitorName.entropy_collapse: entropy_collapse,
    MonitorName.kl_blowup: kl_blowup,
    MonitorName.video_blindness: video_blindness,
    MonitorName.non_finite: non_finite,
}


class Watch:
    """Remembers the lines of one stage and says which monitors begin to fire. One that goes on firing is not repeated.

    `target` is K, the wanted number of anchors. Fed with the lines of an interrupted run, it continues as if there had
    been no interruption.
    """

    def __init__(self, rule: MonitorsConfig, target: int, window: int = WINDOW) -> None:
        self.rule = rule
        self.target = target
        self.window = window
        self.lines: list[Line] = []
        self.firing: set[MonitorName] = set()

    def replay(self, lines: Iterable[Line]) -> None:
        """See again what was seen before an interruption."""
        for step, line in enumerate(lines):
            self.see(line, step)

    def see(self, line: Line, step: int) -> list[Alarm]:
        """Judge one more step; the alarms that begin with it."""
        self.lines.append(dict(line))
        found = {name: MONITORS[name](self.lines, self.window, self.target) for name in self.rule.watch}
        begun = [_alarm(name, step, f) for name, f in found.items() if f is not None and name not in self.firing]
        self.firing = {name for name, finding in found.items() if finding is not None}
        return begun

    def stops(self, alarms: Sequence[Alarm]) -> list[Alarm]:
        """Those of `alarms` that should end the stage."""
        names = {name.value for name in self.rule.stop}
        return [alarm for alarm in alarms if alarm.monitor in names]


def _alarm(name: MonitorName, step: int, finding: Finding) -> Alarm:
    value = finding.value if math.isfinite(finding.value) else None
    bound = finding.bound if math.isfinite(finding.bound) else 0.0
    numbers = "" if value is None else f": {finding.metric} is {value:.3g}, the bound is {finding.bound:.3g}"
    return Alarm(name.value, step, finding.metric, value, bound, f"step {step}: {finding.words}{numbers}")


def _values(lines: Sequence[Line], metric: str) -> list[float]:
    """The finite values of a metric, in order."""
    found = (line.get(metric) for line in lines)
    return [value for value in found if value is not None and math.isfinite(value)]


def _recent(lines: Sequence[Line], metric: str, window: int) -> float | None:
    """Mean of the last `window` values; None while there are fewer."""
    values = _values(lines, metric)[-window:]
    return fmean(values) if len(values) == window else None


def _above(lines: Sequence[Line], metric: str, bound: float, window: int, words: str) -> Finding | None:
    value = _recent(lines, metric, window)
    return Finding(metric, value, bound, words) if value is not None and value > bound else None
