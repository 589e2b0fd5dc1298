"""Charades-STA (Gao et al., ICCV 2017, arXiv 1705.02101) -> annotations. Videos are `<id>.mp4`.

Three forms of the same rows, in the same order:

- `charades_sta_{train,test}.txt`, a line `ID START END##sentence.`. It lacks the lengths of the videos: these come from
  the column `length` of `Charades_v1_{train,test}.csv`. A sentence may contain a single `#`; the first `##` separates.
- the JSON of TimeZero and its relatives, `{ID: {duration, timestamps, sentences}}`;
- the JSON Lines of lighthouse and its relatives, `{qid, query, vid, duration, relevant_windows}`, whose windows are cut
  at the end of the video and whose training file lacks the four reversed rows.

The id of a sample is its row, counted from 0 (`charades_sta_test_17`): the number that TimeChat and Time-R1 use too.
The `val.json` that circulates in the JSON form is the test set, and is refused as anything else.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from tartvg.data.annotations import Annotations, ReadOptions, Row, build
from tartvg.data.parsing import (
    ending,
    length,
    per_query,
    per_video,
    read_lines,
    read_text,
    seconds,
    shorten,
    text_of,
)
from tartvg.data.parsing import field as required
from tartvg.prompts import normalise_query
from tartvg.types import Span

TEST_CHECKSUMS = {
    "fab341679c20b0917173dcffffde367a71113fe63f3a645558cef2ebfbfefb55": "charades_sta_test.txt",
    "6179bf95f5c508c493180e636fcfb6c7ef61b39ba35495f43eff1837092ae107": "charades_test.json = val.json of TimeZero",
}
"""SHA-256 of the files that circulate."""
TEST_CONTENT = "64f414734663bf435310878c52d52bac612d3593da6e4bdfa9b8036cdc37ce93"
"""The same for its rows, whatever the form, the order and the line ends: see `content_checksum`."""


def read(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.json` or `.jsonl`, or one `.txt` with its `.csv`. Raises ValueError naming file and line.

    The test set read as `train` or `val` is refused: a checkpoint that is selected on it has seen the test.
    """
    annotations = [p for p in paths if ending(p) != ".csv"]
    tables = [p for p in paths if ending(p) == ".csv"]
    if len(annotations) != 1:
        raise ValueError(f"Charades-STA needs one .txt, .json or .jsonl file, got {[str(p) for p in paths]}")
    path = annotations[0]
    if ending(path) == ".json":
        rows = tuple(_from_json(path, options.split))
    elif ending(path) == ".jsonl":
        rows = tuple(_from_json_lines(path, options.split))
    else:
        if len(tables) != 1:
            raise ValueError(f"{path}: the text form needs its Charades_v1_*.csv, which has the lengths of the videos")
        rows = tuple(_from_text(path, tables[0], options.split))
    if options.split != "test":
        _refuse_test(path, rows, options.split)
    return build(rows, options)


def content_checksum(rows: Sequence[Row]) -> str:
    """SHA-256 over the sorted (video, start, sentence) of all rows, in hexadecimal. Some forms cut the ends."""
    lines = sorted(f"{r.video} {w.start:.2f} {normalise_query(r.query)}" for r in rows for w in r.windows)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _refuse_test(path: Path, rows: Sequence[Row], split: str) -> None:
    known = TEST_CHECKSUMS.get(hashlib.sha256(path.read_bytes()).hexdigest())
    if known or content_checksum(rows) == TEST_CONTENT:
        raise ValueError(
            f"{path}: this is the test set of Charades-STA ({known or 'the same rows'}), not a {split} split. "
            "Selecting a checkpoint on it would leak the test into the training. Remove the file: without it, "
            "dataset=charades_sta carves a validation split out of the training videos."
        )


def _from_text(path: Path, table: Path, split: str) -> Iterator[Row]:
    durations = _durations(table)
    for number, (where, line) in enumerate(read_lines(path)):
        head, separator, sentence = line.partition("##")
        parts = head.split()
        if not separator or len(parts) != 3:
            raise ValueError(f"{where}: expected `ID START END##sentence`, got {shorten(line)}")
        video = parts[0]
        if video not in durations:
            raise ValueError(f"{where}: video {shorten(video)} is not in {table}")
        window = Span(seconds(parts[1], "start", where), seconds(parts[2], "end", where))
        query = text_of(sentence, "the sentence", where)
        yield Row(where, f"charades_sta_{split}_{number}", f"{video}.mp4", query, (window,), durations[video])


def _from_json(path: Path, split: str) -> Iterator[Row]:
    number = 0
    for where, video, entry, pairs in per_video(path):
        duration = length(required(entry, "duration", where), where)
        for window, sentence in pairs:
            yield Row(where, f"charades_sta_{split}_{number}", f"{video}.mp4", sentence, (window,), duration)
            number += 1


def _from_json_lines(path: Path, split: str) -> Iterator[Row]:
    for number, (where, _, video, query, windows, duration) in enumerate(per_query(path)):
        yield Row(where, f"charades_sta_{split}_{number}", f"{video}.mp4", query, windows, duration)


def _durations(path: Path) -> dict[str, float]:
    durations: dict[str, float] = {}
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            durations[text_of(row.get("id"), "id", where)] = length(row.get("length"), where)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return durations
