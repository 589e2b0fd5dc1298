"""Tables that compare variants over seeds: scores in the paper's layout, significance, budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev

from tartvg.evaluation.score import paired_p_value
from tartvg.launch.sweeps import FINISHED
from tartvg.report.cells import Comparison, Entry
from tartvg.report.paper import METRICS, paper_cells, paper_note, repeats_paper
from tartvg.report.questions import are_alike, data_label
from tartvg.report.runs import RunFolder, config_of
from tartvg.report.seeds import ANCHOR_COLUMNS, COLUMNS, spread
from tartvg.report.tables import DASH, PAPER_COLUMN, Cell, Table, duration
from tartvg.timing import PHASES
from tartvg.types import GroundingSample, Prediction, Scorecard

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table the normal one.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
ALPHA = 0.05
ORDER = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "format", "valid: 2+ anchors", "refined")
MIN_TESTED_VIDEOS = 6
"""With fewer the test cannot reach 5 %, whatever the answers are."""


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


def miou_of(entry: Entry) -> float:
    """mIoU in [0, 1] of an entry that has a final policy."""
    card = card_of(entry)
    assert card is not None
    return card.miou.value


def comparison_table(comparison: Comparison) -> Table:
    """One row per variant: its final policy, mean ± standard deviation over seeds; the paper's numbers beside ours."""
    variants = comparison.variants
    papers = {v: paper_cells(comparison.choices(v)) for v in variants}
    # What the rows are about, where it is not the same for all.
    subjects = {
        "policy": {v: _joined(e.expected for e in comparison.of(v)) for v in variants},
        "data set": {v: _joined(map(_data_label, comparison.of(v))) for v in variants},
    }
    shown = {name: of for name, of in subjects.items() if len(set(of.values()) - {DASH}) > 1}
    has_paper = any(papers.values())
    rows = []
    for variant in variants:
        cards = [card for card in map(card_of, comparison.of(variant)) if card is not None]
        planned = sum(e.variant == variant for e in comparison.entries)
        row = [Cell(variant), *(Cell(of[variant]) for of in shown.values()), Cell(f"{len(cards)} of {planned}")]
        for name in ORDER:
            row.append(Cell(spread([COLUMNS[name](card) for card in cards])))
            if has_paper and name in METRICS:
                row.append((papers[variant] or {}).get(name) or Cell(DASH, is_paper=True))
        row.append(Cell(spread([card.count_mean for card in cards])))
        rows.append(tuple(row))
    names = [n for name in ORDER for n in ((name, PAPER_COLUMN + name) if has_paper and name in METRICS else (name,))]
    note = _scores_note(comparison) + (paper_note(comparison.axes) if has_paper else "")
    return Table("Scores by variant", ("variant", *shown, "seeds", *names, "anchors"), tuple(rows), note)


def anchors_table(comparison: Comparison) -> Table:
    """One row per variant: what the first anchor is worth and what the last adds, over seeds."""
    rows = []
    for variant in comparison.variants:
        cards = [card for card in map(card_of, comparison.of(variant)) if card is not None]
        cells = [Cell(spread([read(card) for card in cards if card.count_mean])) for read in ANCHOR_COLUMNS.values()]
        rows.append((Cell(variant), *cells))
    note = (
        "Percent, of greedy answers. Equal: the last anchor repeats the first. Refined and made worse: of the answers "
        "whose first anchor is not exact to the second decimal, which leaves nothing to refine. Scores of versions "
        "that did not measure this show 0."
    )
    return Table("First and last anchor", ("variant", *ANCHOR_COLUMNS), tuple(rows), note)


def _scores_note(comparison: Comparison) -> str:
    queries = {card.num_queries for e in comparison.entries if (card := card_of(e))}
    lacks = "; ".join(f"{e.variant}, seed {e.seed}: {e.lack}" for e in comparison.entries if e.lack)
    return (
        "Percent, and anchors as a count; mean ± standard deviation over seeds of the last policy that each run's own "
        f"settings evaluate, {'/'.join(map(str, sorted(queries))) or 'no'} test queries. "
    ) + (f"Not counted: {lacks}. " if lacks else "")


def _joined(values: Iterable[str | None]) -> str:
    return "/".join(dict.fromkeys(v for v in values if v)) or DASH


def _data_label(entry: Entry) -> str | None:
    return data_label(entry.run, entry.final) if entry.run and entry.final else None


def reference_of(comparison: Comparison) -> str:
    """The variant that the others are compared with: the one that repeats the paper's method, else the first."""
    repeating = (v for v in comparison.variants if repeats_paper(comparison.choices(v)))
    return next(repeating, comparison.variants[0])


def differences(
    comparison: Comparison, reference: str, samples_by_id: Mapping[str, GroundingSample]
) -> list[Difference]:
    """Every other variant against the reference, with Holm's correction; without a common seed it is left out."""
    found = []
    for variant in comparison.variants:
        pairs = pairs_of(comparison, reference, variant) if variant != reference else []
        if not pairs:
            continue
        gaps = tuple(100 * (miou_of(other) - miou_of(base)) for base, other in pairs)
        answers = [(_answers(other), _answers(base)) for base, other in pairs]
        found.append(Difference(variant, reference, gaps, pooled_p_value(samples_by_id, answers)))
    return _holm(found)


def pairs_of(comparison: Comparison, reference: str, variant: str) -> list[tuple[Entry, Entry]]:
    """(reference, variant) of every seed in which both have scores of the same questions."""
    others = {e.seed: e for e in comparison.of(variant) if card_of(e)}
    pairs = [(base, others[base.seed]) for base in comparison.of(reference) if card_of(base) and base.seed in others]
    return [pair for pair in pairs if _is_same_test(*pair)]


def _is_same_test(a: Entry, b: Entry) -> bool:
    first, second = _answers(a), _answers(b)
    counts = {card.num_queries for e in (a, b) if (card := card_of(e))}
    return len(counts) == 1 and (not first or not second or are_alike(first, second))


def pooled_p_value(
    samples_by_id: Mapping[str, GroundingSample],
    pairs: Sequence[tuple[Sequence[Prediction], Sequence[Prediction]]],
) -> float | None:
    """The paired sign-flip test by video over several seeds: all queries about a video, in all seeds, flip together.

    It speaks of other videos, not of other seeds: three seeds are too few to resample. None where a prediction's sample
    is unknown, the two answered different questions, or there are fewer videos than a test at 5 % needs.
    """
    samples: list[GroundingSample] = []
    first: list[Prediction] = []
    second: list[Prediction] = []
    for number, pair in enumerate(pairs):
        ids = sorted({p.sample_id for predictions in pair for p in predictions})
        if not are_alike(*pair) or any(i not in samples_by_id or not samples_by_id[i].windows for i in ids):
            return None
        samples += [replace(samples_by_id[i], sample_id=f"{number}/{i}") for i in ids]
        first += [replace(p, sample_id=f"{number}/{p.sample_id}") for p in pair[0]]
        second += [replace(p, sample_id=f"{number}/{p.sample_id}") for p in pair[1]]
    if len({s.video for s in samples}) < MIN_TESTED_VIDEOS:
        return None
    return paired_p_value(samples, first, second)


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
        f"Against “{found[0].reference}”, on the seeds in which both answered the same questions. Over seeds: "
        "t-interval of the mean difference. By video: paired sign-flip permutation test of the greedy answers, all "
        "seeds of a video together; it speaks of other videos, not of other seeds. A difference is claimed from three "
        "seeds on, if Holm's p is below 0.05 and every seed agrees."
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
        entries = comparison.of(variant)
        # Half a run would pass for a cheap one.
        whole = [e.run for e in entries if e.run is not None and e.status == FINISHED]
        phases = [[_phase(run, phase) for run in whole] for phase in PHASES]
        hours = [wall_seconds(run) * _devices(run) / 3600 for run in whole]
        spent = sum(wall_seconds(e.run, is_spent=True) for e in entries if e.run is not None)
        rows.append(
            (
                Cell(variant),
                *(Cell(_amount(values)) for values in phases),
                Cell(_amount([sampled_tokens(run) for run in whole])),
                Cell(_amount([wall_seconds(run) for run in whole])),
                Cell(f"{mean(hours):.2f}" if hours else DASH),
                Cell(duration(spent) if entries else DASH),
            )
        )
    kinds = {str(config_of(run, "trainer.accelerator", "cpu")) for run in comparison.runs}
    unit = "GPU-hours" if kinds == {"gpu"} else "CPU process-hours" if kinds <= {"cpu"} else "device hours"
    columns = ("variant", *(f"{p}, s" for p in PHASES), "tokens sampled", "whole run, s", unit, "spent on all seeds")
    note = (
        "Mean ± standard deviation over the seeds that are finished of what one run takes, all stages, its evaluation "
        "and its controls together; phases are those of training and of drawing rollouts, and “monitor” is what "
        "monitors alone ask for. “Spent” counts unfinished runs as well, and a stage that several runs share once, "
        "where it was computed."
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
        result = e.lack or e.final or DASH
        name = f"{e.variant}, seed {e.seed}"
        rows.append((Cell(name), Cell(e.status), Cell(result), Cell(e.error), Cell(", ".join(copied))))
    return Table("Runs", ("run", "status", "policy", "error", "stages taken from another run"), tuple(rows))
