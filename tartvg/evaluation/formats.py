"""Prediction files of several works -> `Predictions`: who answered what, in one shape. No torch.

| format | one record | which query |
|---|---|---|
| `tartvg` | our `predictions.jsonl` | `sample_id` |
| `moment_detr` | `{qid, query, vid, pred_relevant_windows: [[start, end, score], ...]}` a line | `qid` |
| `timechat` | `{"17": {timestamp: [[start, end]] or [], query, vid}, ...}`, one object | key = row of the truth |
| `completions` | `{qid or sample_id, output_text}` a line: what a TimeZero-style model said | id, or row at its end |

The format is recognised by the keys. Wherever a record repeats the video, the query or the target, it is compared with
the annotations: two files that belong to different splits give numbers too, and nobody notices.

Raw completions go through the parser of the house. `<timestep>` tags (TimeZero's name) count as `<timestamp>`.
An empty list of windows and a text without a readable answer are answers that score 0 (`num_unparsed`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tartvg.data.parsing import field as required
from tartvg.data.parsing import (
    mapping,
    parse_json,
    read_text,
    seconds,
    sequence,
    shorten,
    span,
    text_of,
    whole_number,
)
from tartvg.data.qvhighlights import ID_PREFIX
from tartvg.prompts import normalise_query
from tartvg.records import prediction_from_json
from tartvg.response import parse_response
from tartvg.types import GroundingSample, Prediction, Span

TEXT_KEYS = ("output_text", "completion", "output", "text")
"""Where raw completions are looked for, in this order."""
_ROW = re.compile(r"(?:.*_)?([0-9]{1,9})", re.DOTALL)
_FIELDS = {f.name for f in fields(Prediction)}


@dataclass(frozen=True)
class Predictions:
    """A prediction file, read."""

    format: str
    items: tuple[Prediction, ...]
    """In the order of the file; `sample_index` 0 is the answer that is scored."""
    ranked: dict[str, tuple[tuple[Span, float], ...]] = field(default_factory=dict)
    """Sample id -> (window, score) in the order of the file, for formats with several windows per query."""

    def ranking(self) -> dict[str, tuple[tuple[Span, float], ...]]:
        """`ranked`, or the greedy answers as rankings of one window."""
        return self.ranked or {
            p.sample_id: ((p.answer, 1.0),) if p.answer is not None else () for p in self.items if p.sample_index == 0
        }


def read_predictions(path: Path, samples: Sequence[GroundingSample]) -> Predictions:
    """Read a prediction file of any format of the table above.

    `samples` are all annotated queries, in the order of their file. Raises ValueError naming the file and line when a
    record cannot be read, belongs to none of the samples, contradicts its sample or is there twice.
    """
    text = read_text(path)
    records = list(_records(text, path))
    if not records:
        raise ValueError(f"{path}: no predictions")
    name = _format_of(records[0][2])
    if name is None:
        keys = [shorten(key) for key in sorted(records[0][2])[:8]]
        raise ValueError(f"{path}: keys {', '.join(keys)} are of no known format: {', '.join(_READERS)}")
    index = _Index(samples)
    items: list[Prediction] = []
    ranked: dict[str, tuple[tuple[Span, float], ...]] = {}
    seen: dict[tuple[str, int], str] = {}
    for where, key, record in records:
        prediction, windows = _READERS[name](record, key, where, index)
        identity = (prediction.sample_id, prediction.sample_index)
        if identity in seen:
            raise ValueError(f"{where}: {shorten(prediction.sample_id)} is already answered in {seen[identity]}")
        seen[identity] = where
        items.append(prediction)
        if windows is not None:
            ranked[prediction.sample_id] = windows
    return Predictions(name, tuple(items), ranked)


Ranked = tuple[tuple[Span, float], ...]
_Reader = Callable[[dict[str, Any], str, str, "_Index"], tuple[Prediction, Ranked | None]]


def _records(text: str, path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, key, record): the entries of one JSON object or array, or the lines of JSON Lines."""
    lines = text.split("\n")
    first = next((line.strip() for line in lines if line.strip()), "")
    if path.suffix == ".json" or first in ("{", "["):
        value = parse_json(text, str(path))
        entries = enumerate(value) if isinstance(value, list) else mapping(value, str(path)).items()
        for key, record in entries:
            where = f"{path}, entry {shorten(str(key))}"
            yield where, str(key), mapping(record, where)
        return
    for number, line in enumerate(lines):
        if line.strip():
            where = f"{path}, line {number + 1}"
            yield where, "", mapping(parse_json(line, where), where)


def _format_of(record: Mapping[str, Any]) -> str | None:
    if "sample_id" in record and "answer" in record and "anchors" in record:
        return "tartvg"
    if "pred_relevant_windows" in record:
        return "moment_detr"
    if "timestamp" in record and "vid" in record:
        return "timechat"
    return "completions" if any(key in record for key in TEXT_KEYS) else None


class _Index:
    """The annotated queries by id and by row."""

    def __init__(self, samples: Sequence[GroundingSample]) -> None:
        self.samples = samples
        self.by_id = {s.sample_id: s for s in samples}

    def by_name(self, sample_id: str, where: str) -> GroundingSample:
        if sample_id not in self.by_id:
            raise ValueError(f"{where}: {shorten(sample_id)} is not among the {len(self.samples)} annotated queries")
        return self.by_id[sample_id]

    def by_row(self, row: str, where: str) -> GroundingSample:
        match = _ROW.fullmatch(row)
        number = int(match[1]) if match else -1
        if not 0 <= number < len(self.samples):
            raise ValueError(f"{where}: {shorten(row)} is no row of the {len(self.samples)} annotated queries")
        return self.samples[number]


def _tartvg(record: dict[str, Any], key: str, where: str, index: _Index) -> tuple[Prediction, Ranked | None]:
    try:
        prediction = prediction_from_json({name: value for name, value in record.items() if name in _FIELDS})
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{where}: not a record of predictions.jsonl ({shorten(str(error))})") from error
    sample = index.by_name(text_of(prediction.sample_id, "sample_id", where), where)
    whole_number(prediction.sample_index, "sample_index", where)
    if not all(math.isfinite(t) for s in (prediction.answer, *prediction.anchors) if s is not None for t in s):
        raise ValueError(f"{where}: a time is not finite")
    _compare(sample, where, query=prediction.query)
    return prediction, None


def _moment_detr(record: dict[str, Any], key: str, where: str, index: _Index) -> tuple[Prediction, Ranked | None]:
    sample = index.by_name(f"{ID_PREFIX}{whole_number(required(record, 'qid', where), 'qid', where)}", where)
    _compare(sample, where, video=record.get("vid"), query=record.get("query"))
    ranked = []
    for window in sequence(required(record, "pred_relevant_windows", where), where):
        values = sequence(window, where)
        if len(values) not in (2, 3):
            raise ValueError(f"{where}: a window is [start, end, score], got {shorten(window)}")
        score = seconds(values[2], "score", where) if len(values) == 3 else 0.0
        ranked.append((span(values[:2], where), score))
    # The official R1 takes the first of the list, whatever its score.
    return _prediction(sample, ranked[0][0] if ranked else None), tuple(ranked)


def _timechat(record: dict[str, Any], key: str, where: str, index: _Index) -> tuple[Prediction, Ranked | None]:
    sample = index.by_row(key, where)
    _compare(sample, where, video=record.get("vid"), query=record.get("query"))
    windows = [span(window, where) for window in sequence(required(record, "timestamp", where), where)]
    return _prediction(sample, windows[0] if windows else None), None


def _completion(record: dict[str, Any], key: str, where: str, index: _Index) -> tuple[Prediction, Ranked | None]:
    name = next((record[k] for k in ("sample_id", "qid", "id") if k in record), key)
    name = str(name) if isinstance(name, int) else text_of(name, "the id", where)
    sample = index.by_id.get(name) or index.by_row(name, where)
    _compare(sample, where, video=record.get("vid"), query=record.get("query"))
    if isinstance(record.get("target"), list):
        # Only the start: the end may have been cut at the end of the video, here or there.
        target = span(record["target"], where)
        if all(abs(target.start - w.start) > 0.01 for w in sample.windows):
            raise ValueError(f"{where}: its target {list(target)} is not the truth of {shorten(sample.sample_id)}")
    said = next((record[k] for k in TEXT_KEYS if k in record), None)
    if not isinstance(said, str):
        raise ValueError(f"{where}: none of {', '.join(TEXT_KEYS)} is a string")
    text = said.replace("<timestep>", "<timestamp>").replace("</timestep>", "</timestamp>")
    response = parse_response(text)
    faults = tuple(fault.value for fault in response.faults)
    return _prediction(sample, response.answer, text, response.anchors, faults), None


_READERS: dict[str, _Reader] = {
    "tartvg": _tartvg,
    "moment_detr": _moment_detr,
    "timechat": _timechat,
    "completions": _completion,
}


def _compare(sample: GroundingSample, where: str, video: Any = None, query: Any = None) -> None:
    """Refuse a record that is about something else than its sample."""
    if isinstance(video, str) and Path(video).name not in (sample.video.name, sample.video.stem):
        raise ValueError(f"{where}: video {shorten(video)}, but {sample.sample_id} is about {sample.video.name}")
    if isinstance(query, str) and normalise_query(query) != normalise_query(sample.query):
        raise ValueError(f"{where}: query {shorten(query)}, but {sample.sample_id} asks {shorten(sample.query)}")


def _prediction(
    sample: GroundingSample,
    answer: Span | None,
    text: str = "",
    anchors: tuple[Span, ...] = (),
    faults: tuple[str, ...] = (),
) -> Prediction:
    return Prediction(
        sample_id=sample.sample_id,
        sample_index=0,
        query=sample.query,
        video=sample.video.as_posix(),
        windows=sample.windows,
        duration=sample.duration,
        text=text,
        anchors=anchors,
        answer=answer,
        faults=faults,
        is_finished=True,
    )
