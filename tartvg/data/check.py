"""Is this data set fit to spend GPU-hours on? Annotations and every video, in parallel, into one report.

Nothing is repaired here: what the readers do about a quirk is in the table of `tartvg.data.annotations`, and what
training does about a video that cannot be decoded is to go on without it. This says beforehand how much that will be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tartvg.config import DatasetConfig, FramesConfig
from tartvg.data.ahead import ahead
from tartvg.data.annotations import Annotations, Quirks
from tartvg.data.clips import examine_isolated
from tartvg.data.datasets import load_annotations
from tartvg.data.examine import VideoFault
from tartvg.records import dumps, write_atomic
from tartvg.types import GroundingSample

AHEAD = 100
"""Videos per process that are examined beyond one that takes its time."""
MAX_SHOWN = 5
"""Videos of each fault on the screen; the file has all of them."""

EXIT_CLEAN, EXIT_FAULTY, EXIT_UNREADABLE = 0, 1, 2
LOST = frozenset({VideoFault.MISSING, VideoFault.UNREADABLE, VideoFault.NO_VIDEO_STREAM})
"""Training goes on without these videos; one of another length is used as it is."""


@dataclass(frozen=True)
class VideoFinding:
    """One video with something to report."""

    video: str
    faults: tuple[VideoFault, ...]
    detail: str
    num_queries: int
    """Queries of the split that ask about it."""


@dataclass(frozen=True)
class ValidationReport:
    """What `validation.json` holds."""

    dataset: str
    split: str
    num_queries: int
    num_videos: int
    quirks: Quirks
    """Of the annotation file, before the policies."""
    faulty_videos: dict[str, int]
    """Fault -> videos that have it; every fault is listed."""
    affected_queries: dict[str, int]
    """Fault -> queries about those videos."""
    lost_queries: int
    """Queries about videos that cannot be used (`LOST`), each counted once."""
    video_hours: float
    """Length of all videos that could be read."""
    findings: tuple[VideoFinding, ...]
    exit_code: int


def check_split(config_dataset: DatasetConfig, frames: FramesConfig, split: str, output: Path, workers: int) -> int:
    """Validate one split, print a table and write `validation.json` into the folder `output`.

    So many processes (`workers`) examine videos, at least one. Returns the exit code: 0 when every video can be used
    (quirks of annotations have policies and are only reported), 1 when a video has an error, 2 when the annotations
    themselves cannot be read, hold no query, or the split does not exist.
    """
    console = Console()
    try:
        annotations = load_annotations(config_dataset, split)
        if not annotations.samples:
            raise ValueError(
                f"dataset={config_dataset.name.value} has no queries in split {split}: nothing to train on"
            )
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        failure = {"dataset": config_dataset.name.value, "split": split, "error": str(error)}
        write_atomic(output / "validation.json", dumps({**failure, "exit_code": EXIT_UNREADABLE}) + "\n")
        return EXIT_UNREADABLE
    report = validate(annotations, frames, config_dataset.name.value, split, workers)
    for line in examples(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(summary_table(report))
    write_atomic(output / "validation.json", dumps(report) + "\n")
    console.print(f"everything: {output / 'validation.json'}", markup=False, highlight=False, soft_wrap=True)
    return report.exit_code


def validate(
    annotations: Annotations, frames: FramesConfig, dataset: str, split: str, workers: int = 0
) -> ValidationReport:
    """Examine every video of `annotations` once; see `check_split`. Prints a progress bar, writes nothing."""
    queries_of = Counter(s.video for s in annotations.samples)
    jobs = _jobs(annotations.samples)
    examined = ahead(
        ((path,) for path in jobs), tuple, lambda path: examine_isolated(path, frames, jobs[path]), workers,
        AHEAD * workers,
    )  # fmt: skip
    facts_of = {
        path: facts
        for _, found in track(examined, description=f"examining {len(jobs)} videos", total=len(jobs))
        for path, facts in found.items()
    }
    findings = tuple(
        VideoFinding(path.as_posix(), facts.faults, facts.detail, queries_of[path])
        for path, facts in sorted(facts_of.items())
        if facts.faults
    )
    is_faulty = any(fault.is_error for finding in findings for fault in finding.faults)
    return ValidationReport(
        dataset=dataset,
        split=split,
        num_queries=len(annotations.samples),
        num_videos=len(jobs),
        quirks=annotations.quirks,
        faulty_videos={x.value: sum(x in f.faults for f in findings) for x in VideoFault},
        affected_queries={x.value: sum(f.num_queries for f in findings if x in f.faults) for x in VideoFault},
        lost_queries=sum(f.num_queries for f in findings if LOST & {*f.faults}),
        video_hours=sum(facts.duration or 0.0 for facts in facts_of.values()) / 3600,
        findings=findings,
        exit_code=EXIT_FAULTY if is_faulty else EXIT_CLEAN,
    )


def examples(report: ValidationReport) -> list[str]:
    """What the report is about, and the first videos of each fault."""
    lines = [
        f"{report.dataset} {report.split}: {report.num_queries} queries about {report.num_videos} videos, "
        f"{report.video_hours:.2f} h of them readable"
    ]
    for fault in VideoFault:
        having = [finding for finding in report.findings if fault in finding.faults]
        lines += [f"{fault.value}: {finding.detail}" for finding in having[:MAX_SHOWN]]
        if len(having) > MAX_SHOWN:
            lines.append(f"{fault.value}: and {len(having) - MAX_SHOWN} more")
    return lines


def summary_table(report: ValidationReport) -> Table:
    """The report on the screen: quirks that occur, then all faults of videos."""
    table = Table()
    table.add_column("finding")
    table.add_column("count", justify="right")
    table.add_column("queries", justify="right")
    for name, count in vars(report.quirks).items():
        if count and name not in ("queries", "windows", "videos"):
            table.add_row(f"annotations: {name.replace('_', ' ')}", f"{count:g}", "")
    table.add_section()
    for fault in VideoFault:
        count, queries = report.faulty_videos[fault.value], report.affected_queries[fault.value]
        colour = "" if not count else "red" if fault.is_error else "yellow"
        table.add_row(f"videos: {fault.value.replace('_', ' ')}", str(count), str(queries), style=colour)
    table.add_section()
    table.add_row("queries that would be lost", "", str(report.lost_queries))
    return table


def _jobs(samples: Iterable[GroundingSample]) -> dict[Path, float]:
    """Each video once, with its annotated length."""
    annotated: dict[Path, float] = {}
    for sample in samples:
        annotated.setdefault(sample.video, sample.duration)
    return annotated
