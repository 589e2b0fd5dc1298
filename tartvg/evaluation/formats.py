"""Prediction files of several works -> `Predictions`: who answered what, in one shape. No torch.

| format | one record | which query |
|---|---|---|
| `tartvg` | our `predictions.jsonl` | `sample_id` |
| `moment_detr` | `{qid, query, vid, pred_relevant_windows: [[start, end, score], ...]}` a line | `qid` |
| `timechat` | `{"17": {timestamp: [[start, end]] or [], query, vid}, ...}`, one object | its key, a name |
| `completions` | `{qid or sample_id, output_text}` a line: what a TimeZero-style model said | its id, a name |

The format is recognised by the keys, and JSON Lines, an array and an object of records by what is in the file, whatever
its ending. A name is a sample's id as others write it: see `_Index.named`. Wherever a record repeats the video, the
query or the target, it is compared with the annotations: two files that belong to different splits give numbers too,
and nobody notices.

Raw completions go through the parser of the house. `<timestep>` tags (TimeZero's name) count as `<timestamp>`.
An empty list of windows and a text without a readable answer are answers that score 0 (`num_unparsed`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
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
from tartvg.evaluation.detection import Ranked, ranked_answers
from tartvg.prompts import normalise_query
from tartvg.records import prediction_from_json
from tartvg.response import parse_response
from tartvg.types import GroundingSample, Prediction, Span

TEXT_KEYS = ("output_text", "completion", "output", "text")
"""Where raw completions are looked for, in this order."""
NAME_KEYS = ("sample_id", "qid", "id")
"""Where such a record says which query it answers."""
_ROW = re.compile(r"(?:(.*)_)?([0-9]{1,9})", re.DOTALL)
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
    ranked: dict[str, Ranked] = {}
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


_Reader = Callable[[dict[str, Any], str, str, "_Index"], tuple[Prediction, Ranked | None]]


def _records(text: str, path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, key, record): the lines of JSON Lines, or the entries of one array or object; only an object has keys."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and _is_json(lines[0][1]):
        for number, line in lines:
            where = f"{path}, line {number}"
            yield where, "", mapping(parse_json(line, where), where)
        return
    if not lines:
        return
    value = parse_json(text, str(path))
    if isinstance(value, dict) and not all(isinstance(entry, dict) for entry in value.values()):
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
    """Whether a line is a value of its own; what is wrong inside it is told later, with the number of the line."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _format_of(record: Mapping[str, Any]) -> str | None:
    if "sample_id" in record and "answer" in record and "anchors" in record:
        return "tartvg"
    if "pred_relevant_windows" in record:
        return "moment_detr"
    if "timestamp" in record and "vid" in record:
        return "timechat"
    return "completions" if any(key in record for key in TEXT_KEYS) else None


class _Index:
    """The annotated queries by their ids and by the names that others give them."""

    def __init__(self, samples: Sequence[GroundingSample]) -> None:
        self.by_id = {s.sample_id: s for s in samples}
        self.prefix = _common_prefix(list(self.by_id))

    def exact(self, sample_id: str, where: str) -> GroundingSample:
        """The query with this id."""
        if sample_id not in self.by_id:
            raise ValueError(f"{where}: {shorten(sample_id)} is not among the {len(self.by_id)} annotated queries")
        return self.by_id[sample_id]

    def named(self, name: str, where: str) -> GroundingSample:
        """The one query that `name` can mean: by its id, by its id without words in front, or by the number in its id.

        `activitynet_test_v_a_2` is `v_a_2` to others, and `charades_sta_test_17` is `17` or `charades_17`. The number
        is never a position: rows that were dropped leave a gap, and where ids are no rows it counts something else.
        """
        if not name:
            raise ValueError(f"{where}: nothing says which query it answers; {', '.join(NAME_KEYS)} would")
        found = [name] if name in self.by_id else sorted({i for i in self._ids(name) if i in self.by_id})
        if len(found) > 1:
            raise ValueError(f"{where}: {shorten(name)} may be any of {', '.join(found)}")
        return self.exact(found[0] if found else name, where)

    def _ids(self, name: str) -> Iterator[str]:
        yield from ("_".join((*self.prefix[:length], name)) for length in range(1, len(self.prefix) + 1))
        match = _ROW.fullmatch(name)
        if match is not None and (match[1] is None or set(match[1].split("_")) <= set(self.prefix)):
            yield "_".join((*self.prefix, str(int(match[2]))))


def _common_prefix(ids: Sequence[str]) -> tuple[str, ...]:
    """The words, separated by `_`, with which all ids begin; the last word of an id is none of them."""
    words = [sample_id.split("_")[:-1] for sample_id in ids]
    if not words:
        return ()
    first, last = min(words), max(words)
    common = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return tuple(first[: next(common, min(len(first), len(last)))])


def _tartvg(record: dict[str, Any], key: str, where: str, index: _Index) -> tuple[Prediction, Ranked | None]:
    try:
        prediction = prediction_from_json({name: value for name, value in record.items() if name in _FIELDS})
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{where}: not a record of predictions.jsonl ({shorten(str(error))})") from error
    sample = index.exact(text_of(prediction.sample_id, "sample_id", where), where)
    whole_number(prediction.sample_index, "sample_index", where)
    if not all(math.isfinite(t) for s in (prediction.answer, *prediction.anchors) if s is not None for t in s):
        raise ValueError(f"{where}: a time is not finite")
    _compare(sample, where, video=prediction.video, query=prediction.query)
    return prediction, None


def _moment_detr(record: dict[str, Any], key: str, where: str, index: _Index) -> tuple[Prediction, Ranked | None]:
    sample = index.exact(f"{ID_PREFIX}{whole_number(required(record, 'qid', where), 'qid', where)}", where)
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
    sample = index.named(key, where)
    _compare(sample, where, video=record.get("vid"), query=record.get("query"))
    windows = [span(window, where) for window in sequence(required(record, "timestamp", where), where)]
    return _prediction(sample, windows[0] if windows else None), None


def _completion(record: dict[str, Any], key: str, where: str, index: _Index) -> tuple[Prediction, Ranked | None]:
    name = next((record[k] for k in NAME_KEYS if k in record), key)
    name = str(name) if isinstance(name, int) else text_of(name, "the id", where)
    sample = index.named(name, where)
    _compare(sample, where, video=record.get("vid", record.get("video")), query=record.get("query"))
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
    if isinstance(video, str) and not _is_same_file(PurePosixPath(video), sample.video):
        raise ValueError(f"{where}: video {shorten(video)}, but {sample.sample_id} is about {sample.video}")
    if isinstance(query, str) and normalise_query(query) != normalise_query(sample.query):
        raise ValueError(f"{where}: query {shorten(query)}, but {sample.sample_id} asks {shorten(sample.query)}")


def _is_same_file(said: PurePosixPath, video: Path) -> bool:
    """Whatever the ending, as collections are re-encoded; folders are compared as far as both sides name them."""
    is_same_name = said.name in (video.name, video.stem) or said.stem == video.stem
    folders = zip(reversed(said.parent.parts), reversed(video.parent.parts), strict=False)
    return is_same_name and all(a == b for a, b in folders)


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
