"""TVGBench and its training set TimeRFT (Time-R1, arXiv 2503.13377) -> annotations.

Two JSON lists, told apart by their keys:

- `tvgbench.json`, 800 test rows: `{path, question, answer: "START-END", start, end, duration, ...}`; the answer is a
  string of two decimals. 11 Ego4D rows have a window of zero length: nothing overlaps it, so they score 0.
- `train_2k5.json`, 2,500 training rows: `{video, sentence, timestamp: [a, b], duration, ...}`. Some of its windows end
  minutes after the video ("2:37" read as 237 minutes); they are cut.

Videos are the basename of the path. 252 test rows ask about a clip [start, end] of a longer video, with the answer and
the duration counted from the start of the clip. 53 of the files are also asked about as a whole or at other offsets, so
a clip is a file of its own, named `<stem>_<start>_<end>` with two decimals, to be cut beforehand:

    ffmpeg -ss 53.06 -to 152.43 -i aHDGMOQgHUE.mp4 videos/aHDGMOQgHUE_53.06_152.43.mp4

The id of a sample is its row, counted from 0. Its first tag is the data set that the row was taken from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tartvg.data.annotations import Annotations, ReadOptions, Row, build
from tartvg.data.parsing import field as required
from tartvg.data.parsing import length, mapping, read_json, seconds, sequence, shorten, span, text_of
from tartvg.types import Span

_ANSWER = re.compile(r"\s*([0-9.]{1,30})\s*-\s*([0-9.]{1,30})\s*")


def read(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.json` file of either form. Raises ValueError naming file and entry."""
    if len(paths) != 1:
        raise ValueError(f"TVGBench needs one .json file, got {[str(p) for p in paths]}")
    path = paths[0]
    rows = []
    for number, value in enumerate(sequence(read_json(path), str(path))):
        where = f"{path}, entry {number}"
        entry = mapping(value, where)
        rows.append(_test_row(entry, number, where) if "answer" in entry else _training_row(entry, number, where))
    return build(rows, options)


def _test_row(entry: dict[str, Any], number: int, where: str) -> Row:
    answer = text_of(entry["answer"], "answer", where)
    match = _ANSWER.fullmatch(answer)
    if match is None:
        raise ValueError(f"{where}: answer must be `START-END`, got {shorten(answer)}")
    name = _basename(required(entry, "path", where), where)
    if entry.get("start") is not None:
        start = seconds(entry["start"], "start", where)
        end = seconds(required(entry, "end", where), "end", where)
        name = f"{PurePosixPath(name).stem}_{start:.2f}_{end:.2f}{PurePosixPath(name).suffix}"
    # The 168 rows from Ego4D have no dataset_name; `bins` names it for all.
    bins = entry.get("bins")
    source = entry.get("dataset_name") or (bins.get("dataset") if isinstance(bins, dict) else None)
    kinds = (source, entry.get("qsemtype"))
    return Row(
        where=where,
        sample_id=f"tvgbench_{number}",
        video=name,
        query=text_of(required(entry, "question", where), "question", where),
        windows=(Span(seconds(match[1], "start", where), seconds(match[2], "end", where)),),
        duration=length(required(entry, "duration", where), where),
        tags=tuple(text_of(kind, "a tag", where) for kind in kinds if kind is not None),
    )


def _training_row(entry: dict[str, Any], number: int, where: str) -> Row:
    return Row(
        where=where,
        sample_id=f"timerft_{number}",
        video=_basename(required(entry, "video", where), where),
        query=text_of(required(entry, "sentence", where), "sentence", where),
        windows=(span(required(entry, "timestamp", where), where),),
        duration=length(required(entry, "duration", where), where),
    )


def _basename(path: Any, where: str) -> str:
    return PurePosixPath(text_of(path, "the path", where)).name
