"""Annotations of any reader -> the forms that other code trains on and scores with. No torch, no video.

| form | one entry | for |
|---|---|---|
| `jsonl` | our JSON Lines: `tartvg.data.jsonl` | this package; nothing is lost |
| `timezero` | `{ID: {duration, timestamps, sentences}}` | TimeZero, Time-R1 and what reads Charades-STA as they do |
| `timelens` | `{video_path, duration, source, events: [{query, span}]}`, a line | TimeLens, TimeLens2 (training) |
| `timelens_bench` | `{ID: {duration, spans, queries}}` | TimeLens (evaluation) |
| `moment_detr` | `{qid, query, vid, duration, relevant_windows}`, a line | Moment-DETR, lighthouse |

Every file is read back and compared with what it was made from: that gives the losses, by name and number. A form with
one window per query gets the first; queries without any window are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tartvg.config import DatasetName
from tartvg.data import activitynet, jsonl, qvhighlights, timelens
from tartvg.data.annotations import Annotations, ReadOptions
from tartvg.data.datasets import SOURCES
from tartvg.data.qvhighlights import ID_PREFIX
from tartvg.records import dumps, write_atomic
from tartvg.types import GroundingSample

Samples = Sequence[GroundingSample]
Writer = Callable[[Samples], tuple[list[GroundingSample], str]]
"""Gives the samples in the order in which their file has them, and the file's text."""
LABELS = {
    "sample_id": "ids", "video": "names of videos", "query": "queries", "windows": "windows", "duration": "durations",
    "split": "splits", "tags": "tags",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One form that annotations are written in."""

    write: Writer
    read: Callable[[Sequence[Path], ReadOptions], Annotations]
    ending: str


@dataclass(frozen=True)
class Conversion:
    """What was written, and what of it the new form does not say."""

    num_queries: int
    num_windows: int
    num_videos: int
    source: str
    """Counts of the file that was read: `tartvg.data.annotations.Quirks.summary`."""
    losses: dict[str, int]
    """What is lost -> queries that lose it."""


def convert(name: DatasetName, paths: Sequence[Path], split: str, form: str, out: Path) -> Conversion:
    """Read annotation files as `name` and write them in the form (a key of `FORMS`) to `out`.

    Windows stay as they are annotated, late and reversed ones too; queries are normalised, and a training file loses
    the rows that no training uses. Raises ValueError naming the file and line of what cannot be read, and for an `out`
    that exists or has another ending than its form.
    """
    chosen = FORMS[form]
    if out.suffix != chosen.ending:
        raise ValueError(f"{out}: a file of the form {form} ends in {chosen.ending}")
    if out.exists():
        raise ValueError(f"{out}: exists already; name another file")
    source = SOURCES[name].read(paths, ReadOptions(split, late_windows="keep", reversed_windows="keep"))
    if not source.samples:
        raise ValueError(f"{paths[0]}: no queries of split {split}")
    written, text = chosen.write(source.samples)
    write_atomic(out, text)
    # Only our own form has splits; as a test, no other loses a row to the rules of training.
    options = ReadOptions(split if form == "jsonl" else "test", late_windows="keep", reversed_windows="keep")
    try:
        read = chosen.read([out], options).samples
    except ValueError as error:
        out.unlink()
        raise ValueError(f"the form {form} cannot hold this: {error}") from error
    return Conversion(
        num_queries=len(read),
        num_windows=sum(len(s.windows) for s in read),
        num_videos=len({s.video for s in read}),
        source=source.quirks.summary(),
        losses=losses(source.samples, written, read),
    )


def losses(source: Samples, written: Samples, read: Samples) -> dict[str, int]:
    """What of `source` is not in the file any more: `written` is what it should hold, `read` what it says."""
    found = {"left out": len(source) - len(written)}
    kept = {s.sample_id for s in written}
    found["order"] = 0 if [s for s in source if s.sample_id in kept] == list(written) else len(written)
    for item in (f for f in fields(GroundingSample) if f.name != "source"):  # of a mix, not of a file
        pairs = zip(written, read, strict=True)
        found[LABELS[item.name]] = sum(getattr(a, item.name) != getattr(b, item.name) for a, b in pairs)
    return {name: count for name, count in found.items() if count}


def _jsonl(samples: Samples) -> tuple[list[GroundingSample], str]:
    return list(samples), _lines(samples)


def _timelens(samples: Samples) -> tuple[list[GroundingSample], str]:
    groups: dict[tuple[Path, float, str], list[GroundingSample]] = {}
    for sample in samples:
        groups.setdefault((sample.video, sample.duration, sample.tags[0] if sample.tags else ""), []).append(sample)
    rows = [
        {
            "video_path": video.as_posix(),
            "duration": duration,
            **({"source": source} if source else {}),
            "events": [{"query": s.query, "span": s.windows} for s in group],
        }
        for (video, duration, source), group in groups.items()
    ]
    return [s for group in groups.values() for s in group], _lines(rows)


def _moment_detr(samples: Samples) -> tuple[list[GroundingSample], str]:
    numbers = [s.sample_id.removeprefix(ID_PREFIX) for s in samples]
    is_official = all(s.sample_id == f"{ID_PREFIX}{n}" and n.isdecimal() for s, n in zip(samples, numbers, strict=True))
    _refuse_collisions(samples)
    rows = [
        {
            "qid": int(number) if is_official else row,
            "query": sample.query,
            "vid": _id(sample),
            "duration": sample.duration,
            **({"relevant_windows": sample.windows} if sample.windows else {}),
        }
        for row, (sample, number) in enumerate(zip(samples, numbers, strict=True))
    ]
    return list(samples), _lines(rows)


def _per_video(times: str, texts: str) -> Writer:
    """A writer of `{ID: {duration, times, texts}}`; one duration per video, the first."""

    def write(samples: Samples) -> tuple[list[GroundingSample], str]:
        groups: dict[str, list[GroundingSample]] = {}
        _refuse_collisions(samples)
        for sample in samples:
            if sample.windows:
                groups.setdefault(_id(sample), []).append(sample)
        entries: dict[str, Any] = {
            video: {
                "duration": group[0].duration,
                times: [s.windows[0] for s in group],
                texts: [s.query for s in group],
            }
            for video, group in groups.items()
        }
        return [s for group in groups.values() for s in group], dumps(entries) + "\n"

    return write


FORMS = {
    "jsonl": Form(_jsonl, jsonl.read, ".jsonl"),
    "timezero": Form(_per_video("timestamps", "sentences"), activitynet.read, ".json"),
    "timelens": Form(_timelens, timelens.read, ".jsonl"),
    "timelens_bench": Form(_per_video("spans", "queries"), timelens.read_bench, ".json"),
    "moment_detr": Form(_moment_detr, qvhighlights.read, ".jsonl"),
}


def _id(sample: GroundingSample) -> str:
    """The video without its ending, which these forms leave to whoever reads them."""
    return sample.video.with_suffix("").as_posix()


def _refuse_collisions(samples: Samples) -> None:
    """Refuse two files that these forms call the same."""
    video_of: dict[str, Path] = {}
    for sample in samples:
        other = video_of.setdefault(_id(sample), sample.video)
        if other != sample.video:
            raise ValueError(f"{other} and {sample.video} have the same name in this form, which has no endings")


def _lines(rows: Sequence[Any]) -> str:
    return "".join(dumps(row) + "\n" for row in rows)
