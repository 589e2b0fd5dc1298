"""QVHighlights (Lei et al., NeurIPS 2021, arXiv 2107.09609) -> annotations. Videos are `<vid>.mp4`.

`highlight_{train,val,test}_release.jsonl`, one query per line: `{qid, query, vid, duration, relevant_windows: [[a, b],
...], ...}`. A query may have several windows. The test file has none: its labels are not public, its samples can be
predicted but not scored, and results on QVHighlights without a submission are results on val.

The id of a sample holds the `qid`, which is unique over all three files and which submissions need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tartvg.data.annotations import Annotations, ReadOptions, Row, build
from tartvg.data.parsing import field as required
from tartvg.data.parsing import per_query, whole_number

ID_PREFIX = "qvhighlights_"


def read(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.jsonl` file. Raises ValueError naming file and line."""
    if len(paths) != 1:
        raise ValueError(f"QVHighlights needs one .jsonl file, got {[str(p) for p in paths]}")
    return build(_rows(paths[0], options.split), options)


def _rows(path: Path, split: str) -> Iterator[Row]:
    for where, value, video, query, windows, duration in per_query(path):
        if not windows and split != "test":
            raise ValueError(f"{where}: 'relevant_windows' is missing; only the test file has none")
        yield Row(
            where=where,
            sample_id=f"{ID_PREFIX}{whole_number(required(value, 'qid', where), 'qid', where)}",
            video=f"{video}.mp4",
            query=query,
            windows=windows,
            duration=duration,
        )
