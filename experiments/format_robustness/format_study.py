"""How well completions keep the format, by the complexity of the query: compliance, progress of the anchors, faults.

`python -m experiments.format_robustness.format_study runs/x/evaluate/base ...` prints the tables of finished
evaluations as Markdown.

A query's complexity is its number of words, in three classes of about equal size: unlike a class by meaning, it exists
for every data set. Shares are over the sampled completions where there are any (see `tartvg.evaluation.score`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

from omegaconf import OmegaConf

from tartvg.evaluation.score import score
from tartvg.records import prediction_from_json, read_jsonl
from tartvg.report.runs import parsed
from tartvg.report.tables import DASH, Cell, Table, to_markdown
from tartvg.spans import soft_iou
from tartvg.types import Estimate, GroundingSample, Prediction

MIN_ANCHORS = 2
"""A completion with fewer shows no refinement (arXiv 2508.07683)."""


def read_predictions(folder: Path) -> list[Prediction]:
    """The predictions of one evaluated policy. Raises ValueError naming what is missing."""
    path = folder / "predictions.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}: run stage=evaluate first")
    return [prediction_from_json(row) for row in read_jsonl(path)]


def cap_of(folder: Path) -> int | None:
    """The most anchors of a valid answer in the settings of an evaluation; None without settings that say it."""
    path = folder / "config.yaml"
    cap = OmegaConf.select(parsed(path.read_text(encoding="utf-8")), "anchors.max") if path.is_file() else None
    return None if cap is None else int(cap)


def by_complexity(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions by the number of words of their query: three classes of about as many queries, then all of them."""
    words = sorted(num_words(query) for query in {p.sample_id: p.query for p in predictions}.values())
    bounds = sorted({words[len(words) // 3], words[2 * len(words) // 3], words[-1] + 1} - {words[0]})
    classes: dict[str, list[Prediction]] = {}
    low = words[0]
    for bound in bounds:
        name = f"{low} words" if bound - low == 1 else f"{low} to {bound - 1} words"
        classes[name] = [p for p in predictions if low <= num_words(p.query) < bound]
        low = bound
    return classes | {"all": list(predictions)}


def num_words(query: str) -> int:
    """Words of a query."""
    return len(query.split())


def sampled_of(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The completions that describe the policy's distribution: the sampled ones, else the greedy ones."""
    return [p for p in predictions if p.sample_index > 0] or list(predictions)


def compliance_table(predictions: Sequence[Prediction], max_anchors: int | None = None) -> Table:
    """Share with the right format, and with two anchors or more but not above the cap, with 95 % intervals by video."""
    rows = []
    for name, part in by_complexity(predictions).items():
        samples = list({p.sample_id: sample_of(p) for p in part}.values())
        card = score(samples, part, max_anchors=max_anchors)
        rows.append(
            (
                Cell(name),
                Cell(str(len(samples))),
                Cell(str(len(sampled_of(part)))),
                _share(card.format_rate),
                _share(card.valid_rate),
                Cell(f"{card.count_mean:.2f}"),
                _share(card.miou),
            )
        )
    columns = ("query", "queries", "completions", "format", "valid: 2+ anchors", "anchors", "greedy mIoU")
    cap = "without a cap on anchors" if max_anchors is None else f"at most {max_anchors} anchors"
    note = f"Percent with 95 % intervals by video; anchors as a count. Valid: {cap}."
    return Table("Format compliance", columns, tuple(rows), note)


def progress_table(predictions: Sequence[Prediction]) -> Table:
    """Mean soft IoU of the first anchor, the last one and the answer, over completions with at least two anchors."""
    rows = []
    for name, part in by_complexity(predictions).items():
        steps = [soft_ious(p) for p in sampled_of(part) if len(p.anchors) >= MIN_ANCHORS and p.answer is not None]
        pairs = [(a, b) for ious in steps for a, b in pairwise(ious[:-1])]
        cells = [Cell(f"{mean(ious[place] for ious in steps):.3f}" if steps else DASH) for place in (0, 1, -2, -1)]
        refined = f"{100 * mean(b > a for a, b in pairs):.1f}" if pairs else DASH
        rows.append((Cell(name), Cell(str(len(steps))), *cells, Cell(refined)))
    columns = ("query", "completions", "first anchor", "second anchor", "last anchor", "answer", "refined, %")
    note = "Mean soft IoU with the best window, of completions with two anchors and a readable answer."
    return Table("Progress over the anchors", columns, tuple(rows), note)


def faults_table(predictions: Sequence[Prediction]) -> Table:
    """Share of completions that have each fault, the most frequent first; one completion may have several."""
    classes = {name: sampled_of(part) for name, part in by_complexity(predictions).items()}
    counts = {name: Counter(fault for p in part for fault in p.faults) for name, part in classes.items()}
    cut = {name: sum(not p.is_finished for p in part) for name, part in classes.items()}
    rows = [
        (Cell(fault), *(Cell(f"{100 * counts[name][fault] / len(part):.1f}") for name, part in classes.items()))
        for fault, _ in counts["all"].most_common()
    ]
    last = (Cell("(ran into the length limit)"), *(Cell(f"{100 * cut[n] / len(p):.1f}") for n, p in classes.items()))
    return Table("Failure modes", ("fault", *classes), (*rows, last), "Percent of completions.")


def soft_ious(prediction: Prediction) -> list[float]:
    """Soft IoU with the best window, of every anchor and then of the answer (which has to be there)."""
    assert prediction.answer is not None
    spans = [*prediction.anchors, prediction.answer]
    return [max(soft_iou(span, window) for window in prediction.windows) for span in spans]


def sample_of(prediction: Prediction) -> GroundingSample:
    """The query that a prediction's record repeats."""
    return GroundingSample(
        prediction.sample_id, Path(prediction.video), prediction.query, prediction.windows, prediction.duration, ""
    )


def _share(value: Estimate) -> Cell:
    return Cell(f"{100 * value.value:.1f}", f"[{100 * value.low:.1f}, {100 * value.high:.1f}]")


def main(arguments: list[str]) -> int:
    """Print the tables; returns the exit code."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        for folder in map(Path, arguments):
            predictions = read_predictions(folder)
            print(f"{folder}\n")
            compliance = compliance_table(predictions, cap_of(folder))
            for table in (compliance, progress_table(predictions), faults_table(predictions)):
                print(to_markdown(table))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
