"""ActivityNet-Captions (Krishna et al., ICCV 2017, arXiv 1705.00754) -> annotations.

`{train,val_1,val_2}.json`: `{v_ID: {duration, timestamps: [[a, b], ...], sentences: [...]}}`. val_1 is for validation,
val_2 is the customary test split (2D-TAN calls them val.json and test.json); they annotate the same videos.

The id of a sample is the video and the number of the sentence within its entry: `activitynet_test_v_bXdq2zI1Ms0_2`.
Videos are `<v_ID>.mp4`; a `.mkv` or `.webm` is taken where there is no mp4, since the official collection mixes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tartvg.data.annotations import Annotations, ReadOptions, Row, build
from tartvg.data.parsing import field as required
from tartvg.data.parsing import length, per_video

ENDINGS = (".mp4", ".mkv", ".webm")


def read(paths: Sequence[Path], options: ReadOptions) -> Annotations:
    """One `.json` file. Raises ValueError naming file and video."""
    if len(paths) != 1:
        raise ValueError(f"ActivityNet-Captions needs one .json file, got {[str(p) for p in paths]}")
    return build(_rows(paths[0], options), options)


def _rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    is_there = options.videos is not None and options.videos.is_dir()
    present = {p.name for p in options.videos.iterdir()} if options.videos is not None and is_there else set()
    for where, video, entry, pairs in per_video(path):
        duration = length(required(entry, "duration", where), where)
        ending = next((e for e in ENDINGS if f"{video}{e}" in present), ENDINGS[0])
        for number, (window, sentence) in enumerate(pairs):
            sample_id = f"activitynet_{options.split}_{video}_{number}"
            yield Row(where, sample_id, f"{video}{ending}", sentence, (window,), duration)
