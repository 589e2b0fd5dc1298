"""Your own videos: JSON Lines, one query per line -> annotations.

    {"video": "kitchen/a.mp4", "query": "she opens the oven", "windows": [[12.5, 17.0]], "duration": 48.2}

| field | meaning |
|---|---|
| `video` | file below the folder of videos (sub-folders are fine) |
| `query` | the sentence |
| `windows` | list of `[start, end]` in seconds; one window may be given as `window: [start, end]`; none: a blind test |
| `duration` | length of the video in seconds |
| `sample_id` | optional; unique in the file. Default: `<file name>_<line>`, counted from 0 over the rows |
| `split` | optional, `train`, `val` or `test`; rows of another split than the one asked for are left to it |
| `tags` | optional list of labels |

Other fields are ignored. The planted data sets write this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tartvg.data.annotations import SPLITS, Annotations, ReadOptions, Row, build
from tartvg.data.parsing import field as required
from tartvg.data.parsing import length, read_json_objects, sequence, shorten, span, text_of


def read(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.jsonl` file. Raises ValueError naming file and line."""
    if len(paths) != 1:
        raise ValueError(f"a JSON Lines data set needs one file, got {[str(p) for p in paths]}")
    path = paths[0]
    stem = Path(path.name.removesuffix(".gz")).stem
    rows = [
        (_split(value, options.split, where), _row(value, f"{stem}_{number}", where))
        for number, (where, value) in enumerate(read_json_objects(path))
    ]
    own = [row for split, row in rows if split == options.split]
    return build(own, options, other_split=len(rows) - len(own))


def _split(value: dict[str, Any], default: str, where: str) -> str:
    """The split of a row. A name that nobody asks for would leave its rows out in silence."""
    split = text_of(value.get("split", default), "split", where)
    if split not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {shorten(split)}")
    return split


def _row(value: dict[str, Any], default_id: str, where: str) -> Row:
    windows = value.get("windows", [value["window"]] if "window" in value else [])
    return Row(
        where=where,
        sample_id=text_of(value.get("sample_id", default_id), "sample_id", where),
        video=text_of(required(value, "video", where), "video", where),
        query=text_of(required(value, "query", where), "query", where),
        windows=tuple(span(window, where) for window in sequence(windows, where)),
        duration=length(required(value, "duration", where), where),
        tags=tuple(text_of(tag, "a tag", where) for tag in sequence(value.get("tags", []), where)),
    )
