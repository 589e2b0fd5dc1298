"""Prediction files of several works -> `Predictions`: who answered what, in one shape. No torch.

| format | one record | which query |
|---|---|---|
| `tartvg` | our `predictions.jsonl` | `sample_id` |
| `moment_detr` | `{qid, query, vid, pred_relevant_windows: [[start, end, score], ...]}` | `qid`, or video and query |
| `timechat` | `{"17": {timestamp: [[start, end]] or [], query, vid}, ...}`, one object | its key, a name |
| `timelens` | `"VIDEO>>>QUERY>>>[start, end]": {timestamps: [[start, end]], answers: TEXT}` | its key |
| `completions` | a text under one of `TEXT_KEYS`: what a model said | a name, a row, or video and query |

`moment_detr` is lighthouse's form, too. `timelens` is one object or one a line; lmms-eval's submissions have the text
in place of the inner object.

Completions are those of Time-R1 (`{qid, pred, target, duration, output_text}`), ms-swift (`{response, messages,
videos}`), LLaMA-Factory (`{prompt, predict, label}`, row by row), lmms-eval's samples (`{doc_id, target,
filtered_resps}`), OmniVTG (`{original_data, model_output}`) and VideoChat-R1.5 (`{video_path, query, answer}`).

The format is recognised by the keys, and JSON Lines, an array and an object of records by what is in the file, whatever
its ending. Which query a record answers, and what is compared: `tartvg.evaluation.naming`.

Texts are read by one of `tartvg.evaluation.readings`. `<timestep>` tags (TimeZero's name) count as `<timestamp>`.
An empty list of windows and a text without a readable answer are answers that score 0 (`num_unparsed`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

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
from tartvg.evaluation.detection import Ranked, ranked_answers
from tartvg.evaluation.naming import NAME_KEYS, Clues, Index, contradiction
from tartvg.evaluation.readings import READINGS
from tartvg.records import prediction_from_json
from tartvg.response import parse_response
from tartvg.types import GroundingSample, Prediction, Span

TEXT_KEYS = (
    "output_text", "completion", "output", "text", "response", "predict", "model_output", "filtered_resps", "resps",
    "answer",
)  # fmt: skip
"""Where raw completions are looked for, in this order; a list stands for its first text."""
VIDEO_KEYS = ("vid", "video", "video_path", "video_file")
QUERY_KEYS = ("query", "sentence", "caption")
NESTED_KEYS = ("doc", "original_data")
"""Where the annotation is repeated inside a record."""
SEPARATOR = ">>>"
"""Between video, query and truth in the keys of TimeLens and lmms-eval."""
KEYS = {
    "tartvg": "sample_id, anchors and answer",
    "moment_detr": "pred_relevant_windows",
    "timechat": "timestamp and vid",
    "timelens": f"VIDEO{SEPARATOR}QUERY{SEPARATOR}[start, end]",
    "completions": f"one of {', '.join(TEXT_KEYS)}",
}
"""What a format is recognised by."""
_TARGET = re.compile(r"\s{0,9}[\[(]?\s{0,9}([0-9.]{1,30})\s{0,9}[,-]\s{0,9}([0-9.]{1,30})\s{0,9}[\])]?\s{0,9}")
_FIELDS = {f.name for f in fields(Prediction)}


@dataclass(frozen=True)
class Predictions:
    """A prediction file, read."""

    format: str
    items: tuple[Prediction, ...]
    """In the order of the file; `sample_index` 0 is the answer that is scored."""
    ranked: dict[str, Ranked] = field(default_factory=dict)
    """Sample id -> (window, score) in the order of the file, for formats with several windows per query."""

    def ranking(self) -> dict[str, Ranked]:
        """`ranked`, or what the answers of each query are as a ranking."""
        return self.ranked or ranked_answers(self.items)


@dataclass(frozen=True)
class _Record:
    where: str
    """File and line or entry, for messages."""
    key: str
    """Its key in an object of records; empty elsewhere."""
    row: int
    value: dict[str, Any]


_Reader = Callable[[_Record, Index], tuple[Prediction, Ranked | None]]


def read_predictions(path: Path, samples: Sequence[GroundingSample], reading: str | None = None) -> Predictions:
    """Read a prediction file of any format of the table above.

    `samples` are all annotated queries, in the order of their file. `reading` (a key of `READINGS`) reads the text of
    every record that has one; None takes an answer that is stored beside its text as it is, and reads the others
    strictly. Raises ValueError naming the file and line when a record cannot be read, belongs to none of the samples,
    contradicts its sample or is there twice.
    """
    records = list(_records(read_text(path), path))
    if not records:
        raise ValueError(f"{path}: no predictions")
    name = _format_of(records[0].value, records[0].key)
    if name is None:
        keys = [shorten(key) for key in sorted(records[0].value)[:8]]
        known = "; ".join(f"{format_}: {told_by}" for format_, told_by in KEYS.items())
        raise ValueError(f"{path}: keys {', '.join(keys)} are of no known format ({known})")
    index = Index(samples)
    items: list[Prediction] = []
    ranked: dict[str, Ranked] = {}
    seen: dict[tuple[str, int], str] = {}
    for record in records:
        prediction, windows = _READERS[name](record, index)
        if reading is not None and prediction.text:
            prediction = replace(prediction, answer=READINGS[reading](prediction.text))
        identity = (prediction.sample_id, prediction.sample_index)
        if identity in seen:
            raise ValueError(f"{record.where}: {shorten(prediction.sample_id)} is already answered in {seen[identity]}")
        seen[identity] = record.where
        items.append(prediction)
        if windows is not None:
            ranked[prediction.sample_id] = windows
    index.finish(path)
    return Predictions(name, tuple(items), ranked)


def _records(text: str, path: Path) -> Iterator[_Record]:
    """The lines of JSON Lines, or the entries of one array or object."""
    row = 0
    for where, key, value in _values(text, path):
        if value and all(SEPARATOR in name for name in value):
            for name, said in value.items():
                inner = said if isinstance(said, dict) else {"answers": said}
                yield _Record(f"{where}, entry {shorten(name)}", name, row, inner)
                row += 1
        else:
            yield _Record(where, key, row, value)
            row += 1


def _values(text: str, path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, key, value); only the entries of an object of objects have keys."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and _is_json(lines[0][1]):
        for number, line in lines:
            where = f"{path}, line {number}"
            yield where, "", mapping(parse_json(line, where), where)
        return
    if not lines:
        return
    value = parse_json(text, str(path))
    is_keyed = isinstance(value, dict) and any(SEPARATOR in key for key in value)
    if isinstance(value, dict) and (is_keyed or not all(isinstance(entry, dict) for entry in value.values())):
        yield f"{path}, line {lines[0][0]}", "", value
        return
    if isinstance(value, list):
        entries = [(str(number), "", entry) for number, entry in enumerate(value)]
    else:
        entries = [(key, key, entry) for key, entry in mapping(value, str(path)).items()]
    for shown, key, record in entries:
        where = f"{path}, entry {shorten(shown)}"
        yield where, key, mapping(record, where)


def _is_json(line: str) -> bool:
    """Return whether a line is a value of its own; what is wrong inside it is said later, with its number."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _format_of(record: Mapping[str, Any], key: str) -> str | None:
    if SEPARATOR in key:
        return "timelens"
    if "sample_id" in record and "answer" in record and "anchors" in record:
        return "tartvg"
    if "pred_relevant_windows" in record:
        return "moment_detr"
    if "timestamp" in record and "vid" in record:
        return "timechat"
    return "completions" if any(name in record for name in TEXT_KEYS) else None


def _tartvg(record: _Record, index: Index) -> tuple[Prediction, Ranked | None]:
    where = record.where
    try:
        prediction = prediction_from_json({name: value for name, value in record.value.items() if name in _FIELDS})
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{where}: not a record of predictions.jsonl ({shorten(str(error))})") from error
    sample = index.exact(text_of(prediction.sample_id, "sample_id", where), where)
    whole_number(prediction.sample_index, "sample_index", where)
    if not isinstance(prediction.text, str):
        raise ValueError(f"{where}: text must be a string, got {type(prediction.text).__name__}")
    if not all(math.isfinite(t) for s in (prediction.answer, *prediction.anchors) if s is not None for t in s):
        raise ValueError(f"{where}: a time is not finite")
    complaint = contradiction(sample, Clues(video=_text(prediction.video), query=_text(prediction.query)))
    if complaint is not None:
        raise ValueError(f"{where}: {complaint}")
    return prediction, None


def _moment_detr(record: _Record, index: Index) -> tuple[Prediction, Ranked | None]:
    where = record.where
    sample = index.find(_clues(record), where)
    ranked = []
    for window in sequence(required(record.value, "pred_relevant_windows", where), where):
        values = sequence(window, where)
        if len(values) not in (2, 3):
            raise ValueError(f"{where}: a window is [start, end, score], got {shorten(window)}")
        score = seconds(values[2], "score", where) if len(values) == 3 else 0.0
        ranked.append((span(values[:2], where), score))
    # The official R1 takes the first of the list, whatever its score.
    return _prediction(sample, ranked[0][0] if ranked else None), tuple(ranked)


def _timechat(record: _Record, index: Index) -> tuple[Prediction, Ranked | None]:
    where = record.where
    sample = index.find(_clues(record), where)
    windows = [span(window, where) for window in sequence(required(record.value, "timestamp", where), where)]
    return _prediction(sample, windows[0] if windows else None), None


def _timelens(record: _Record, index: Index) -> tuple[Prediction, Ranked | None]:
    where = record.where
    parts = record.key.split(SEPARATOR)
    if len(parts) < 3:
        raise ValueError(f"{where}: the key {shorten(record.key)} is not {KEYS['timelens']}")
    duration = record.value.get("duration")
    clues = Clues(
        video=parts[0],
        query=SEPARATOR.join(parts[1:-1]),
        target=_target(parts[-1], where),
        duration=None if duration is None else seconds(duration, "duration", where),
    )
    sample = index.find(clues, where)
    said = record.value.get("answers", "")
    text = text_of(said, "answers", where)
    if "timestamps" not in record.value:
        return _read(sample, text), None
    windows = [span(window, where) for window in sequence(record.value["timestamps"], where)]
    return _prediction(sample, windows[0] if windows else None, text), None


def _completion(record: _Record, index: Index) -> tuple[Prediction, Ranked | None]:
    said = next((record.value[key] for key in TEXT_KEYS if key in record.value), None)
    while isinstance(said, list) and said:
        said = said[0]
    if not isinstance(said, str):
        raise ValueError(f"{record.where}: none of {', '.join(TEXT_KEYS)} is a string")
    return _read(index.find(_clues(record), record.where), said), None


_READERS: dict[str, _Reader] = {
    "tartvg": _tartvg,
    "moment_detr": _moment_detr,
    "timechat": _timechat,
    "timelens": _timelens,
    "completions": _completion,
}


def _clues(record: _Record) -> Clues:
    """Everything that a record of any form says about its query."""
    nested = [record.value[key] for key in NESTED_KEYS if isinstance(record.value.get(key), dict)]
    value = {**(nested[0] if nested else {}), **record.value}
    where = record.where
    name = next((value[key] for key in NAME_KEYS if key in value), record.key)
    name = str(whole_number(name, "the id", where)) if not isinstance(name, str) else text_of(name, "the id", where)
    row = record.row if "predict" in value else value.get("doc_id")
    videos = value.get("videos")
    video = next((value[key] for key in VIDEO_KEYS if key in value), videos[0] if _is_list(videos) else None)
    target, duration = value.get("target", value.get("timestamp") if nested else None), value.get("duration")
    return Clues(
        name=name or None,
        row=None if row is None else whole_number(row, "doc_id", where),
        video=_text(video.get("video", video.get("path")) if isinstance(video, dict) else video),
        query=_text(next((value[key] for key in QUERY_KEYS if key in value), None)),
        prompt=None if name else _prompt(value),
        target=_target(target, where),
        # Elsewhere it may be how long the model took.
        duration=seconds(duration, "duration", where) if target and isinstance(duration, int | float) else None,
    )


def _prompt(value: Mapping[str, Any]) -> str | None:
    """What the model was asked, where the record repeats it."""
    messages = value.get("messages")
    asked = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"] \
        if _is_list(messages) else []  # fmt: skip
    return _text(asked[-1] if asked else value.get("prompt", value.get("input")))


def _target(value: Any, where: str) -> Span | None:
    """A truth `[start, end]`, as a list or as text; None where there is none."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and len(value) == 2 and not _is_list(value[0]):
        return span(value, where)
    match = _TARGET.fullmatch(value) if isinstance(value, str) and len(value) < 200 else None
    return span(list(match.groups()), where) if match else None


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    """Return whether it is a list with something in it."""
    return isinstance(value, list) and bool(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _read(sample: GroundingSample, said: str) -> Prediction:
    """A completion, read by the parser of the house."""
    text = said.replace("<timestep>", "<timestamp>").replace("</timestep>", "</timestamp>")
    response = parse_response(text)
    return _prediction(sample, response.answer, text, response.anchors, tuple(fault.value for fault in response.faults))


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
