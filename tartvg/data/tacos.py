"""TACoS (Regneri et al., TACL 2013) -> annotations. Videos are `sNN-dMM.avi`.

The files of 2D-TAN, `{train,val,test}.json`: `{video.avi: {timestamps: [[a, b], ...], sentences, fps, num_frames}}`.
Their timestamps are *frames*: seconds = frame / fps and duration = num_frames / fps, with fps = 29.4 throughout.
lighthouse's JSON Lines, `{qid, query, vid, duration, relevant_windows}`, have the same rows in seconds.

567 of the 4,001 test rows repeat another one to the letter, and 216 (video, query) pairs have several windows. Every
row counts, as in the literature. The id of a sample is the video and the number of the sentence within its entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tartvg.data.annotations import Annotations, ReadOptions, Row, build
from tartvg.data.parsing import ending, length, per_query, per_video, seconds
from tartvg.data.parsing import field as required
from tartvg.types import Span


def read(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.json` or `.jsonl` file. Raises ValueError naming file and video or line."""
    if len(paths) != 1:
        raise ValueError(f"TACoS needs one .json or .jsonl file, got {[str(p) for p in paths]}")
    rows = _from_json_lines if ending(paths[0]) == ".jsonl" else _rows
    return build(rows(paths[0], options.split), options)


def _from_json_lines(path: Path, split: str) -> Iterator[Row]:
    numbers: Counter[str] = Counter()
    for where, _, video, query, windows, duration in per_query(path):
        yield Row(where, f"tacos_{split}_{video}_{numbers[video]}", f"{video}.avi", query, windows, duration)
        numbers[video] += 1


def _rows(path: Path, split: str) -> Iterator[Row]:
    for where, video, entry, pairs in per_video(path):
        fps = seconds(required(entry, "fps", where), "fps", where)
        if fps <= 0:
            raise ValueError(f"{where}: fps must be > 0, got {fps:g}")
        duration = length(seconds(required(entry, "num_frames", where), "num_frames", where) / fps, where)
        for number, (frames, sentence) in enumerate(pairs):
            sample_id = f"tacos_{split}_{video.removesuffix('.avi')}_{number}"
            at = f"{where}, sentence {number}"  # checked again: a tiny fps makes any frame number infinite
            window = Span(seconds(frames.start / fps, "start", at), seconds(frames.end / fps, "end", at))
            yield Row(where, sample_id, video, sentence, (window,), duration)
