"""TimeLens (arXiv 2512.14698) and TimeLens2 (arXiv 2607.17423) -> annotations.

TimeLens-Bench re-annotates the tests of Charades-STA, ActivityNet-Captions and QVHighlights, with one window per query:
`{charades,activitynet,qvhighlights}-timelens.json`, `{ID: {duration, spans: [[a, b], ...], queries: [...]}}`. Videos
are `<ID>.mp4`. The id of a sample is the video and the number of the query within its entry.

TimeLens-100K and TimeLens2-93K are for training: JSON Lines, `{video_path, duration, source, events: [{query, span:
[[a, b], ...]}, ...]}`, or flat with `query` and `span` in place of `events`. A span may be one window, `[a, b]`.
`video_path` is a file below the folder of videos. The id of a sample is the file, the row and the event, counted from
0; its tag is the source.

- A row of TimeLens2-93K may name a folder of extracted frames, or ask about a part of its video (`video_start`): both
  are refused, since frames without their times and clips are not read.
- Rows that a rollout wrote (`rollouts`) have the query inside the prompt of TimeLens2; it is taken out of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tartvg.data.annotations import Annotations, ReadOptions, Row, build
from tartvg.data.parsing import field as required
from tartvg.data.parsing import (
    length,
    mapping,
    per_video,
    read_json_objects,
    sequence,
    shorten,
    span,
    text_of,
)
from tartvg.types import Span

ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
PROMPTS = (
    ('Given the query: "', '", return ALL time spans'),
    ("described by the sentence '", "', determining its starting and ending times"),
)
"""What stands before and after the query in TimeLens2's prompts for TimeLens2-93K and TimeLens-100K."""


def read_bench(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.json` file of TimeLens-Bench. Raises ValueError naming file and video."""
    return build(_bench_rows(_only(paths, "TimeLens-Bench", ".json"), options.split), options)


def read(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.jsonl` file of TimeLens-100K or TimeLens2-93K. Raises ValueError naming file and line."""
    return build(_rows(_only(paths, "TimeLens-100K", ".jsonl")), options)


def _only(paths: Sequence[Path], name: str, kind: str) -> Path:
    if len(paths) != 1:
        raise ValueError(f"{name} needs one {kind} file, got {[str(p) for p in paths]}")
    return paths[0]


def _bench_rows(path: Path, split: str) -> Iterator[Row]:
    for where, video, entry, pairs in per_video(path, "spans", "queries"):
        duration = length(required(entry, "duration", where), where)
        for number, (window, query) in enumerate(pairs):
            yield Row(where, f"timelens_{split}_{video}_{number}", f"{video}.mp4", query, (window,), duration)


def _rows(path: Path) -> Iterator[Row]:
    stem = path.name.split(".")[0].replace("-", "_")
    for number, (where, value) in enumerate(read_json_objects(path)):
        video, duration = _video(value, where), length(required(value, "duration", where), where)
        tags = (text_of(value["source"], "source", where),) if value.get("source") is not None else ()
        events = sequence(value["events"], where) if "events" in value else [value]
        for count, event in enumerate(events):
            entry = mapping(event, where)
            query = text_of(required(entry, "query", where), "query", where)
            if "rollouts" in value:
                query = _unwrapped(query)
            _refuse_part({**value, **entry}, where)
            windows = _windows(required(entry, "span", where), where)
            yield Row(where, f"{stem}_{number}_{count}", video, query, windows, duration, tags)


def _video(value: dict[str, Any], where: str) -> str:
    video = text_of(required(value, "video_path", where), "video_path", where)
    if PurePosixPath(video).suffix.lower() not in ENDINGS:
        raise ValueError(
            f"{where}: video_path {shorten(video)} is no video file but, it seems, a folder of frames, whose times "
            "nothing says; make a video of it (ffmpeg) or leave its rows out"
        )
    return video


def _refuse_part(value: dict[str, Any], where: str) -> None:
    for name in ("video_start", "video_end"):
        if value.get(name) is not None:
            raise ValueError(
                f"{where}: {name} {shorten(value[name])} asks about a part of the video; cut it out beforehand (ffmpeg)"
            )


def _windows(value: Any, where: str) -> tuple[Span, ...]:
    """One window or several."""
    listed = sequence(value, where)
    if listed and not isinstance(listed[0], list):
        return (span(listed, where),)
    return tuple(span(window, where) for window in listed)


def _unwrapped(query: str) -> str:
    """The query inside a prompt of TimeLens2; any other text as it is."""
    for before, after in PROMPTS:
        _, is_wrapped, rest = query.partition(before)
        inner, is_closed, _ = rest.rpartition(after)
        if is_wrapped and is_closed:
            return inner
    return query
