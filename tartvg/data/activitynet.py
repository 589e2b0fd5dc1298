"""ActivityNet-Captions (Krishna et al., ICCV 2017, arXiv 1705.00754) -> annotations.

`{train,val_1,val_2}.json`: `{v_ID: {duration, timestamps: [[a, b], ...], sentences: [...]}}`. val_1 is for validation,
val_2 is the customary test split (2D-TAN calls them val.json and test.json); they annotate the same videos. lighthouse
has the same rows as JSON Lines, `{qid, query, vid, duration, relevant_windows}`.

The id of a sample is the video and the number of the sentence within its entry: `activitynet_test_v_bXdq2zI1Ms0_2`.
Videos are `<v_ID>.mp4`; a `.mkv` or `.webm` is taken where there is no mp4, since the official collection mixes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tartvg.data.annotations import Annotations, ReadOptions, Row, build
from tartvg.data.parsing import ending, length, per_query, per_video
from tartvg.data.parsing import field as required
from tartvg.types import Span

ENDINGS = (".mp4", ".mkv", ".webm")


def read(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.json` or `.jsonl` file. Raises ValueError naming file and video or line."""
    if len(paths) != 1:
        raise ValueError(f"ActivityNet-Captions needs one .json or .jsonl file, got {[str(p) for p in paths]}")
    return build(_rows(paths[0], options), options)


def _rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    is_there = options.videos is not None and options.videos.is_dir()
    present = {p.name for p in options.videos.iterdir()} if options.videos is not None and is_there else set()
    numbers: Counter[str] = Counter()
    for where, video, sentence, windows, duration in _sentences(path):
        found = next((e for e in ENDINGS if f"{video}{e}" in present), ENDINGS[0])
        sample_id = f"activitynet_{options.split}_{video}_{numbers[video]}"
        numbers[video] += 1
        yield Row(where, sample_id, f"{video}{found}", sentence, windows, duration)


def _sentences(path: Path) -> Iterator[tuple[str, str, str, tuple[Span, ...], float]]:
    """(where, video, sentence, windows, duration) of either form."""
    if ending(path) == ".jsonl":
        for where, _, video, query, windows, duration in per_query(path):
            yield where, video, query, windows, duration
        return
    for where, video, entry, pairs in per_video(path):
        duration = length(required(entry, "duration", where), where)
        for window, sentence in pairs:
            yield where, video, sentence, (window,), duration
