"""The scorer that stands alone: `python -m tartvg.evaluation --dataset NAME --annotations FILE --predictions FILE`.

It scores files of any model (formats: `tartvg.evaluation.formats`; readings: `tartvg.evaluation.readings`). What moves
the numbers is printed above them: the denominator, the reading, the rule for several windows, the comparison with the
threshold and whether windows that end after the video were cut. `--convention` sets them as another work has them, and
`--convention all` prints the scores under every work's (`tartvg.evaluation.conventions`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tartvg.config import DatasetName
from tartvg.data.annotations import SPLITS, Annotations, LateWindows
from tartvg.data.datasets import read_files
from tartvg.data.parsing import shorten
from tartvg.evaluation.conventions import CONVENTIONS, Convention, rounded
from tartvg.evaluation.detection import mean_average_precision
from tartvg.evaluation.formats import Predictions, read_predictions
from tartvg.evaluation.lengths import scores_by_length
from tartvg.evaluation.readings import READINGS, best_reading
from tartvg.evaluation.report import Comparison, ConventionReport, FileScores, Report, render, render_conventions
from tartvg.evaluation.score import ALL_THRESHOLDS, RULES, paired_p_value, score
from tartvg.records import dumps, write_atomic
from tartvg.types import GroundingSample, Prediction

ALL = "all"
"""In place of a convention's name."""
MAX_UNREAD = 0.1
"""Share of the texts: what more than this means is most likely another wording."""


@dataclass(frozen=True)
class Options:
    """The command line, checked. Raises ValueError naming an option out of range."""

    dataset: DatasetName
    annotations: tuple[Path, ...]
    predictions: tuple[Path, ...]
    """One file, or two to compare."""
    split: str
    convention: Convention
    is_under_all: bool
    """Score under every convention instead."""
    resamples: int
    seed: int
    json: Path | None

    def __post_init__(self) -> None:
        for name in ("resamples", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be >= 0, got {getattr(self, name)}")
        if self.is_under_all and len(self.predictions) > 1:
            raise ValueError("--convention all takes one file: leave --predictions-b out")
        if self.json is not None:
            _check_place(self.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 1 with one line on stderr when a file or a value cannot be used."""
    parsed = _parser().parse_args(arguments)
    try:
        options = _options(parsed)
        report: Report | ConventionReport = evaluate_under_all(options) if options.is_under_all else evaluate(options)
        print(render(report) if isinstance(report, Report) else render_conventions(report))
        if options.json is not None:
            write_atomic(options.json, dumps(report) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tartvg.evaluation", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset", required=True, choices=[name.value for name in DatasetName])
    add("--annotations", required=True, nargs="+", type=Path, metavar="FILE", help="the truth; Charades: .txt and .csv")
    add("--predictions", required=True, type=Path, metavar="FILE")
    add("--predictions-b", type=Path, metavar="FILE", help="a second file, compared with the first")
    add("--split", choices=SPLITS, help="what the annotations are (default: test; QVHighlights: val)")
    add("--convention", choices=[*CONVENTIONS, ALL], default="ours", help="whose rules, before those given below")
    add("--reading", choices=READINGS, help="how texts are read (default: answers as stored, other texts strictly)")
    add("--rule", choices=RULES, help="the truth where a query has several windows (ours: best)")
    add("--strict", action="store_true", help="R1 counts IoU > threshold instead of >=")
    add("--raw-windows", action="store_true", help="keep windows that end after their video as annotated")
    add("--only-predicted", action="store_true", help="leave queries without any prediction out of the denominator")
    add("--resamples", type=int, default=1000, help="of the bootstrap; 0: no intervals")
    add("--seed", type=int, default=0, help="of the bootstrap and of the permutations")
    add("--json", type=Path, metavar="OUT", help="write everything to this file, too")
    return parser


def _options(parsed: argparse.Namespace) -> Options:
    name, is_under_all = DatasetName(parsed.dataset), parsed.convention == ALL
    given = (parsed.reading, parsed.rule, parsed.strict, parsed.raw_windows, parsed.only_predicted)
    if is_under_all and any(given):
        raise ValueError("--convention all sets --reading, --rule, --strict, --raw-windows and --only-predicted itself")
    base = CONVENTIONS["ours" if is_under_all else parsed.convention]
    return Options(
        dataset=name,
        annotations=tuple(parsed.annotations),
        predictions=tuple(path for path in (parsed.predictions, parsed.predictions_b) if path is not None),
        split=parsed.split or ("val" if name is DatasetName.qvhighlights else "test"),
        convention=replace(
            base,
            reading=parsed.reading or base.reading,
            rule=parsed.rule or base.rule,
            is_strict=parsed.strict or base.is_strict,
            is_clipped=base.is_clipped and not parsed.raw_windows,
            is_only_predicted=parsed.only_predicted or base.is_only_predicted,
        ),
        is_under_all=is_under_all,
        resamples=parsed.resamples,
        seed=parsed.seed,
        json=parsed.json,
    )


def _check_place(path: Path) -> None:
    """Refuse a place that cannot be written to, before minutes are spent on what is to be put there."""
    try:
        if path.is_dir():
            raise ValueError(f"--json {path}: a folder; name a file in it")
        above = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise ValueError(f"--json: {error}") from error
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--json {path}: {above} is no folder that can be written to")


@dataclass(frozen=True)
class _Read:
    """The files of a command line, read under a convention."""

    annotations: Annotations
    predictions: list[Predictions]
    samples: list[GroundingSample]
    """The denominator."""
    answers: list[list[Prediction]]
    """Of each prediction file, those that answer one of the `samples`."""


def _annotations(options: Options, is_clipped: bool) -> Annotations:
    late_windows: LateWindows = "clip" if is_clipped else "keep"
    return read_files(options.dataset, options.annotations, options.split, late_windows=late_windows)


def _read(options: Options, convention: Convention, annotations: Annotations) -> _Read:
    read = [read_predictions(path, annotations.samples, convention.reading) for path in options.predictions]
    samples = _denominator(annotations, read, convention.is_only_predicted)
    ids = {s.sample_id for s in samples}
    answers = [
        [rounded(p, convention.rounding) for p in predictions.items if p.sample_id in ids] for predictions in read
    ]
    return _Read(annotations, read, samples, answers)


def evaluate(options: Options) -> Report:
    """Read and score. Raises ValueError naming what cannot be used."""
    convention = options.convention
    read = _read(options, convention, _annotations(options, convention.is_clipped))
    files = tuple(
        _score_file(path, predictions, items, read.samples, options)
        for path, predictions, items in zip(options.predictions, read.predictions, read.answers, strict=True)
    )
    comparison = None
    if len(files) == 2:
        a, b = (file.scorecard.miou.value for file in files)
        first, second = read.answers
        p_value = paired_p_value(read.samples, first, second, rule=convention.rule, seed=options.seed)
        comparison = Comparison(b - a, p_value)
    return Report(
        dataset=options.dataset.value,
        split=options.split,
        annotations={str(path): _sha256(path) for path in options.annotations},
        num_queries=len(read.samples),
        num_videos=len({s.video for s in read.samples}),
        quirks=read.annotations.quirks.summary(),
        convention=convention,
        files=files,
        comparison=comparison,
    )


def evaluate_under_all(options: Options) -> ConventionReport:
    """Score one prediction file under every convention, without intervals. Raises ValueError as `evaluate` does."""
    path = options.predictions[0]
    annotations = {is_clipped: _annotations(options, is_clipped) for is_clipped in (True, False)}
    cards = {}
    for name, convention in CONVENTIONS.items():
        read = _read(options, convention, annotations[convention.is_clipped])
        cards[name] = score(
            read.samples, read.answers[0], ALL_THRESHOLDS, convention.rule, convention.is_strict, resamples=0
        )
    return ConventionReport(
        dataset=options.dataset.value,
        split=options.split,
        annotations={str(path): _sha256(path) for path in options.annotations},
        path=str(path),
        sha256=_sha256(path),
        conventions=dict(CONVENTIONS),
        scorecards=cards,
    )


def _denominator(annotations: Annotations, read: Sequence[Predictions], only_predicted: bool) -> list[GroundingSample]:
    """All annotated queries, or those that every file answers."""
    if not only_predicted:
        return list(annotations.samples)
    answered = set.intersection(*({p.sample_id for p in predictions.items} for predictions in read))
    if not answered:
        raise ValueError("--only-predicted: the files answer no query in common")
    return [s for s in annotations.samples if s.sample_id in answered]


def _score_file(
    path: Path,
    predictions: Predictions,
    items: Sequence[Prediction],
    samples: Sequence[GroundingSample],
    options: Options,
) -> FileScores:
    """`items` are those of the `predictions` that answer one of the `samples`."""
    rule, strict = options.convention.rule, options.convention.is_strict
    card = score(samples, items, ALL_THRESHOLDS, rule, strict, options.resamples, options.seed)
    detection, by_length = None, None
    if options.dataset is DatasetName.qvhighlights:
        ranking = predictions.ranking()
        detection = mean_average_precision(samples, ranking)
        by_length = scores_by_length(samples, items, ranking, rule, strict)
    warning = unread_warning(items)
    return FileScores(str(path), _sha256(path), predictions.format, card, warning, detection, by_length)


def unread_warning(items: Sequence[Prediction]) -> str | None:
    """What to say when more than `MAX_UNREAD` of the texts that are scored are unread; None otherwise."""
    texts = [p for p in items if p.sample_index == 0 and p.text.strip()]
    unread = [p.text for p in texts if p.answer is None]
    if len(unread) <= MAX_UNREAD * len(texts):
        return None
    name, count = best_reading(unread)
    advice = f"--reading {name} reads {count} of them" if count else "no --reading reads them"
    return f"{len(unread)} of {len(texts)} texts are unread, the first is {shorten(unread[0])}; {advice}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
