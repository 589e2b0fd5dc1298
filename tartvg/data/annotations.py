"""Rows of an annotation file -> `Annotations`: the one place where the quirks of benchmarks are handled and counted.

What happens to a quirk (nothing is repaired in a file, and nothing happens without being counted in `Quirks`):

| quirk | in a training file | in a validation or test file |
|---|---|---|
| start > end (reversed) | `reversed_windows`: drop (default), swap or keep | kept: such a query always scores 0 |
| start = end, or wholly beyond the end | dropped | kept as it is |
| ends after the video | `late_windows`: clip (default: cut at the end), drop or keep | cut, or with keep kept |
| empty query | dropped | kept |
| exact duplicate row | kept, as in the literature | kept |
| outer or double whitespace, final full stop | normalised, as prompts need | the same |

Validation and test rows are never dropped: a denominator that depends on the code that reads it settles nothing.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from tartvg.data.parsing import shorten
from tartvg.prompts import normalise_query
from tartvg.spans import clip
from tartvg.types import GroundingSample, Span

ReversedWindows = Literal["drop", "swap", "keep"]
LateWindows = Literal["clip", "drop", "keep"]
SPLITS = ("train", "val", "test")
ROUNDING = 1e-6
"""Seconds by which a window may end after its video without being counted: 245 windows of ActivityNet-Captions end
1e-14 s late."""


@dataclass(frozen=True)
class ReadOptions:
    """How a reader turns rows into samples."""

    split: str
    """`train`, `val` or `test`: what the file is, which decides whether its rows may be dropped."""
    videos: Path | None = None
    """Folder of the video files; None leaves the paths relative and looks at no file."""
    late_windows: LateWindows = "clip"
    """Policy for windows that end after their video: cut at its end, leave out of a training file (and cut in others),
    or keep as annotated, as works do that do not cut."""
    reversed_windows: ReversedWindows = "drop"
    """Policy for start > end in a training file."""


@dataclass(frozen=True)
class Row:
    """One query as its file has it: unchecked against the video, unnormalised."""

    where: str
    """File and line or entry, for messages."""
    sample_id: str
    video: str
    """Name of the file below the folder of videos."""
    query: str
    windows: tuple[Span, ...]
    """In seconds; empty in a blind test file."""
    duration: float
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quirks:
    """Counts over a whole file, before anything was dropped or cut."""

    queries: int = 0
    windows: int = 0
    """(query, window) pairs."""
    videos: int = 0
    blind: int = 0
    """Queries without a window."""
    reversed: int = 0
    """Windows with start > end."""
    zero_length: int = 0
    """Windows with start = end."""
    negative_start: int = 0
    beyond_end: int = 0
    """Windows that end after the video by more than `ROUNDING`."""
    outside: int = 0
    """Windows that start at or after the end of the video."""
    max_overshoot: float = 0.0
    """Largest end - duration in seconds; 0 when no window ends after its video."""
    duplicates: int = 0
    """(query, window) pairs that repeat an earlier one of the same video to the letter."""
    ambiguous: int = 0
    """(video, query) pairs with more than one distinct window."""
    whitespace: int = 0
    """Queries with leading or trailing whitespace."""
    empty: int = 0
    """Queries without any text."""
    other_split: int = 0
    """Rows that say that they belong to another split, and were left to it."""
    clipped: int = 0
    """Windows that were cut, by more than `ROUNDING`."""
    swapped: int = 0
    """Windows whose ends were exchanged."""
    dropped_windows: int = 0
    """Windows that were left out, by the policy of the table above."""
    dropped: int = 0
    """Queries that were left out: those without any window left, or without any text."""

    def summary(self) -> str:
        """The counts that are not zero, in words."""
        counts = {name.replace("_", " "): value for name, value in asdict(self).items() if value}
        return ", ".join(f"{value:g} {name}" for name, value in counts.items())


@dataclass(frozen=True)
class Annotations:
    """What a reader gives: the samples in the order of the file, and what was odd about it."""

    samples: tuple[GroundingSample, ...]
    quirks: Quirks = field(default_factory=Quirks)


def build(rows: Iterable[Row], options: ReadOptions, other_split: int = 0) -> Annotations:
    """Apply the policies of the table above. Raises ValueError for a repeated id and for a video outside its folder."""
    rows = tuple(rows)
    folder = VideoFolder(options.videos)
    where_of: dict[str, str] = {}
    for row in rows:
        if row.sample_id in where_of:
            raise ValueError(f"{row.where}: id {shorten(row.sample_id)} is also in {where_of[row.sample_id]}")
        where_of[row.sample_id] = row.where
    samples: list[GroundingSample] = []
    clipped = swapped = kept = 0
    for row in rows:
        video = folder.path(row.video, row.where)
        windows, num_clipped, num_swapped = _windows(row, options)
        clipped, swapped = clipped + num_clipped, swapped + num_swapped
        kept += len(windows)
        query = normalise_query(row.query)
        if options.split == "train" and (not query or (row.windows and not windows)):
            continue
        samples.append(GroundingSample(row.sample_id, video, query, windows, row.duration, options.split, row.tags))
    quirks = _count(rows)
    counted = replace(
        quirks,
        clipped=clipped,
        swapped=swapped,
        dropped_windows=quirks.windows - kept,
        dropped=len(rows) - len(samples),
        other_split=other_split,
    )
    return Annotations(tuple(samples), counted)


def _windows(row: Row, options: ReadOptions) -> tuple[tuple[Span, ...], int, int]:
    """The windows that the policies leave, how many were cut and how many had their ends exchanged."""
    kept: list[Span] = []
    clipped = swapped = 0
    is_training = options.split == "train"
    for window in row.windows:
        is_reversed = window.length < 0
        if is_reversed and is_training:
            if options.reversed_windows == "drop":
                continue
            if options.reversed_windows == "swap":
                window, swapped, is_reversed = Span(window.end, window.start), swapped + 1, False
        if not is_reversed:
            inside = clip(window, row.duration)
            is_late = window.end > row.duration + ROUNDING
            if is_training and (inside.length == 0 or (is_late and options.late_windows == "drop")):
                continue
            # A cut that leaves nothing would only hide what is wrong with a test row.
            if options.late_windows != "keep" and inside.length > 0:
                clipped += max(inside.start - window.start, window.end - inside.end) > ROUNDING
                window = inside
        kept.append(window)
    return tuple(kept), clipped, swapped


def _count(rows: Sequence[Row]) -> Quirks:
    windows = [(row, window) for row in rows for window in row.windows]
    seen: set[tuple[str, Span, str]] = {(row.video, window, row.query) for row, window in windows}
    answers: dict[tuple[str, str], set[Span]] = defaultdict(set)
    for row, window in windows:
        answers[row.video, row.query].add(window)
    return Quirks(
        queries=len(rows),
        windows=len(windows),
        videos=len({row.video for row in rows}),
        blind=sum(not row.windows for row in rows),
        reversed=sum(window.length < 0 for _, window in windows),
        zero_length=sum(window.length == 0 for _, window in windows),
        negative_start=sum(window.start < 0 for _, window in windows),
        beyond_end=sum(window.end > row.duration + ROUNDING for row, window in windows),
        outside=sum(window.start >= row.duration for row, window in windows),
        max_overshoot=max((max(0.0, window.end - row.duration) for row, window in windows), default=0.0),
        duplicates=len(windows) - len(seen),
        ambiguous=sum(len(spans) > 1 for spans in answers.values()),
        whitespace=sum(row.query != row.query.strip() for row in rows),
        empty=sum(not row.query.strip() for row in rows),
    )


class VideoFolder:
    """Names from an annotation file -> paths that stay inside one folder.

    Absolute names, `..`, control characters and symbolic links that lead outside are refused: a file from the internet
    must not choose what is opened on this machine. The folder itself may be a link. In the Hub's cache every file is a
    link from `snapshots/<commit>/` into `blobs/` of the same repository, and those are followed.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        real = os.path.realpath(folder) if folder is not None and folder.is_dir() else None
        self.allowed = [] if real is None else [real, *_blobs_of(Path(real))]
        self._known: dict[str, Path] = {}

    def path(self, name: str, where: str) -> Path:
        """The path of a video. Raises ValueError naming `where`."""
        if name not in self._known:
            self._known[name] = self._check(name, where)
        return self._known[name]

    def _check(self, name: str, where: str) -> Path:
        relative = PurePosixPath(name)
        is_plain = bool(relative.parts) and name.isprintable() and "\\" not in name and len(name) <= 1000
        if not is_plain or relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"{where}: video {shorten(name)} is not a file below the folder of videos")
        if self.folder is None:
            return Path(relative)
        path = self.folder / relative
        if self.allowed:
            real = os.path.realpath(path)
            if not any(os.path.commonpath([real, top]) == top for top in self.allowed):
                raise ValueError(
                    f"{where}: video {shorten(name)} is a link that leads out of {self.folder}; set dataset.videos to "
                    "the folder that holds the files themselves (hf download: --local-dir FOLDER)"
                )
        return path


def _blobs_of(folder: Path) -> list[str]:
    """Where the Hub's cache keeps the files that it links to from a folder of its snapshots; empty elsewhere."""
    snapshots = next((p for p in folder.parents if p.name == "snapshots"), None)
    return [] if snapshots is None else [str(p) for p in [snapshots.parent / "blobs"] if p.is_dir()]
