"""Tables that compare variants over seeds: scores in the paper's layout, significance, budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev

from tartvg.evaluation.score import paired_p_value
from tartvg.report.cells import Comparison, Entry, config_of
from tartvg.report.paper import METRICS, paper_cells, paper_note
from tartvg.report.runs import RunFolder
from tartvg.report.seeds import COLUMNS, spread
from tartvg.report.tables import DASH, PAPER_COLUMN, Cell, Table, duration
from tartvg.types import GroundingSample, Prediction, Scorecard

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table the normal one.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
ALPHA = 0.05
ORDER = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "format", "valid: 2+ anchors", "refined")
PHASES = ("decode", "vision", "sample", "reward", "reference", "update")


@dataclass(frozen=True)
class Difference:
    """A variant minus the reference, in mIoU points, on the seeds that both have."""

    variant: str
    reference: str
    by_seed: tuple[float, ...]
    p_value: float | None
    """Of the paired test by video; None where it cannot be made."""
    adjusted: float | None = None
    """The same by Holm's method over all rows."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % t-interval of the mean over seeds; None for a single seed."""
        n = len(self.by_seed)
        if n < 2:
            return None
        quantile = T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else 1.96
        half = quantile * stdev(self.by_seed) / sqrt(n)
        return mean(self.by_seed) - half, mean(self.by_seed) + half


def card_of(entry: Entry) -> Scorecard | None:
    """Scores of the entry's final policy."""
    return entry.run.scores[entry.final] if entry.run and entry.final else None


def comparison_table(comparison: Comparison) -> Table:
    """One row per variant: its final policy, mean ± standard deviation over seeds; the paper's numbers beside ours."""
    papers = {v: paper_cells(comparison.overrides(v)) for v in comparison.variants}
    finals = {
        v: "/".join(dict.fromkeys(e.final or DASH for e in comparison.of(v))) or DASH for v in comparison.variants
    }
    has_paper, has_policies = any(papers.values()), len(set(finals.values()) - {DASH}) > 1
    rows = []
    for variant in comparison.variants:
        cards = [card for card in map(card_of, comparison.of(variant)) if card is not None]
        planned = sum(e.variant == variant for e in comparison.entries)
        row = [Cell(variant), *([Cell(finals[variant])] if has_policies else []), Cell(f"{len(cards)} of {planned}")]
        for name in ORDER:
            row.append(Cell(spread([COLUMNS[name](card) for card in cards])))
            if has_paper and name in METRICS:
                row.append((papers[variant] or {}).get(name) or Cell(DASH, is_paper=True))
        row.append(Cell(spread([card.anchors_mean for card in cards])))
        rows.append(tuple(row))
    names = [n for name in ORDER for n in ((name, PAPER_COLUMN + name) if has_paper and name in METRICS else (name,))]
    columns = ("variant", *(["policy"] if has_policies else []), "seeds", *names, "anchors")
    queries = {card.num_queries for e in comparison.entries if (card := card_of(e))}
    note = (
        f"Percent, and anchors as a count; mean ± standard deviation over seeds of the last policy of each run, "
        f"{'/'.join(map(str, sorted(queries))) or 'no'} test queries. "
    )
    return Table("Scores by variant", columns, tuple(rows), note + (paper_note(comparison.axes) if has_paper else ""))


def reference_of(comparison: Comparison) -> str:
    """The variant that the others are compared with: the one that repeats the paper's method, else the first."""
    defaults = ("anchors=two", "reward=tar", "grpo.kl_coef=0.04", "grpo.group_size=8", "reward.tar2_form=abs",
                "experiments=stage_order/grpo_sft_grpo")  # fmt: skip
    for variant in comparison.variants:
        if any(o in defaults for o in comparison.overrides(variant)):
            return variant
    return comparison.variants[0]


def differences(
    comparison: Comparison, reference: str, samples_by_id: Mapping[str, GroundingSample]
) -> list[Difference]:
    """Every other variant against the reference, with Holm's correction; without a common seed it is left out."""
    found = []
    base = {e.seed: e for e in comparison.of(reference) if card_of(e)}
    for variant in comparison.variants:
        other = {e.seed: e for e in comparison.of(variant) if card_of(e)}
        seeds = [seed for seed in base if seed in other]
        if variant == reference or not seeds:
            continue
        gaps = tuple(100 * (_miou(other[s]) - _miou(base[s])) for s in seeds)
        pairs = [(_answers(other[s]), _answers(base[s])) for s in seeds]
        found.append(Difference(variant, reference, gaps, pooled_p_value(samples_by_id, pairs)))
    return _holm(found)


def pooled_p_value(
    samples_by_id: Mapping[str, GroundingSample],
    pairs: Sequence[tuple[Sequence[Prediction], Sequence[Prediction]]],
) -> float | None:
    """The paired sign-flip test by video over several seeds: all queries about a video, in all seeds, flip together.

    It speaks of other videos, not of other seeds: three seeds are too few to resample. None where a prediction's sample
    is unknown or there are fewer videos than a test at 5 % needs.
    """
    samples: list[GroundingSample] = []
    first: list[Prediction] = []
    second: list[Prediction] = []
    for number, pair in enumerate(pairs):
        ids = sorted({p.sample_id for predictions in pair for p in predictions})
        if any(i not in samples_by_id or not samples_by_id[i].windows for i in ids):
            return None
        samples += [replace(samples_by_id[i], sample_id=f"{number}/{i}") for i in ids]
        first += [replace(p, sample_id=f"{number}/{p.sample_id}") for p in pair[0]]
        second += [replace(p, sample_id=f"{number}/{p.sample_id}") for p in pair[1]]
    if len({s.video for s in samples}) < 6:
        return None
    return paired_p_value(samples, first, second)


def _miou(entry: Entry) -> float:
    card = card_of(entry)
    assert card is not None
    return card.miou.value


def _answers(entry: Entry) -> list[Prediction]:
    assert entry.run is not None and entry.final is not None
    return [p for p in entry.run.predictions.get(entry.final, []) if p.sample_index == 0]


def _holm(found: Sequence[Difference]) -> list[Difference]:
    """Adjusted p-values: the k-th smallest of m times m - k + 1, never smaller than the one before."""
    tested = sorted((d for d in found if d.p_value is not None), key=lambda d: d.p_value or 0.0)
    adjusted, highest = {}, 0.0
    for rank, d in enumerate(tested):
        highest = max(highest, min(1.0, (d.p_value or 0.0) * (len(tested) - rank)))
        adjusted[d.variant] = highest
    return [replace(d, adjusted=adjusted.get(d.variant)) for d in found]


def verdict(d: Difference) -> str:
    """What the numbers allow to say, in words."""
    better = "better" if mean(d.by_seed) > 0 else "worse"
    is_one_sided = all(g > 0 for g in d.by_seed) or all(g < 0 for g in d.by_seed)
    if len(d.by_seed) < 3:
        return f"{len(d.by_seed)} seeds: no claim"
    if d.adjusted is None:
        return "not tested by video"
    if d.adjusted < ALPHA and is_one_sided:
        return f"{better} in every seed"
    return "no difference shown"


def significance_table(found: Sequence[Difference]) -> Table | None:
    """One row per variant; None without any."""
    if not found:
        return None
    rows = []
    for d in found:
        interval = f"[{d.interval[0]:+.1f}, {d.interval[1]:+.1f}]" if d.interval else DASH
        rows.append(
            (
                Cell(d.variant),
                Cell(f"{mean(d.by_seed):+.1f}"),
                Cell(interval),
                Cell(f"{sum(g > 0 for g in d.by_seed)} of {len(d.by_seed)}"),
                Cell(_p(d.p_value)),
                Cell(_p(d.adjusted)),
                Cell(verdict(d)),
            )
        )
    columns = ("variant", "mIoU points", "95 % over seeds", "seeds better", "p by video", "p, Holm", "verdict")
    note = (
        f"Against “{found[0].reference}”, on the seeds that both have. Over seeds: t-interval of the mean difference. "
        "By video: paired sign-flip permutation test of the greedy answers, all seeds of a video together; it speaks "
        "of other videos, not of other seeds. A difference is claimed from three seeds on, if Holm's p is below 0.05 "
        "and every seed agrees."
    )
    return Table("Differences in mIoU", columns, tuple(rows), note)


def _p(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def budget_table(comparison: Comparison) -> Table:
    """What each variant costs: seconds by phase, sampled tokens, wall clock and device hours."""
    rows = []
    for variant in comparison.variants:
        runs = [e.run for e in comparison.of(variant) if e.run is not None]
        phases = [[_phase(run, phase) for run in runs] for phase in PHASES]
        walls = [wall_seconds(run) for run in runs]
        hours = [wall_seconds(run) * _devices(run) / 3600 for run in runs]
        spent = sum(wall_seconds(run, is_spent=True) for run in runs)
        rows.append(
            (
                Cell(variant),
                *(Cell(_amount(values)) for values in phases),
                Cell(_amount([sampled_tokens(run) for run in runs])),
                Cell(_amount(walls)),
                Cell(f"{mean(hours):.2f}" if hours else DASH),
                Cell(duration(spent) if runs else DASH),
            )
        )
    kinds = {str(config_of(e.run, "trainer.accelerator", "cpu")) for e in comparison.entries if e.run}
    unit = "GPU-hours" if kinds == {"gpu"} else "CPU process-hours" if kinds <= {"cpu"} else "device hours"
    columns = ("variant", *(f"{p}, s" for p in PHASES), "tokens sampled", "whole run, s", unit, "spent on all seeds")
    note = (
        "Mean ± standard deviation over seeds of what one run takes, all stages and its evaluation together; phases "
        "are those of training. “Spent” counts a stage that several runs share once, where it was computed."
    )
    return Table("Budget", columns, tuple(rows), note)


def _amount(values: Sequence[float]) -> str:
    if not values:
        return DASH
    digits = 0 if mean(values) >= 100 else 1
    text = f"{mean(values):,.{digits}f}"
    return f"{text} ± {stdev(values):,.{digits}f}" if len(values) > 1 else text


def _phase(run: RunFolder, phase: str) -> float:
    name = f"time/{phase}_s"
    return sum(line.get(name) or 0.0 for lines in run.metrics.values() for line in lines)


def sampled_tokens(run: RunFolder) -> float:
    """Completion tokens of all rollouts: the mean length of each step times its rollouts."""
    per_step = float(config_of(run, "grpo.group_size", 0)) * float(config_of(run, "grpo.prompts_per_step", 0))
    lengths = (line.get("rollout/length_mean") for lines in run.metrics.values() for line in lines)
    return sum(length * per_step for length in lengths if length is not None)


def wall_seconds(run: RunFolder, *, is_spent: bool = False) -> float:
    """Seconds of all stages; `is_spent` leaves out the ones that were copied from another run."""
    total = 0.0
    for manifest in run.manifests.values():
        if not (is_spent and manifest.get("copied_from")):
            total += float(manifest.get("seconds") or 0.0)
    return total


def _devices(run: RunFolder) -> int:
    return int(config_of(run, "trainer.devices", 1)) * int(config_of(run, "trainer.num_nodes", 1))


def status_table(comparison: Comparison) -> Table:
    """What became of each run."""
    rows = []
    for e in comparison.entries:
        copied = [s for s, m in (e.run.manifests if e.run else {}).items() if m.get("copied_from")]
        rows.append((Cell(f"{e.variant}, seed {e.seed}"), Cell(e.status), Cell(e.error), Cell(", ".join(copied))))
    return Table("Runs", ("run", "status", "error", "stages taken from another run"), tuple(rows))
