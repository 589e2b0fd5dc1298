"""`planted` and `planted_long`: real H.264 files with events at known times, drawn on first use.

They exist so that the whole method runs anywhere: same decoding, prompting, training and evaluation as a benchmark.
A data set is a folder named by the hash of its settings; it is drawn beside its final place and renamed, so that an
interrupted or concurrent drawing never leaves half a data set behind.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tartvg.config import PlantedConfig
from tartvg.data.scene import FPS, RULES, SIZE, Scene, draw, make_scene
from tartvg.records import read_jsonl, sample_from_json, side_folder, write_jsonl
from tartvg.types import GroundingSample

VERSION = 1
"""Raised when the drawing changes, so that older caches are not read."""


def encode(path: Path, scene: Scene) -> None:
    """Write a scene as an H.264 mp4. One thread: the same bytes for the same seed and library."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "25", "preset": "superfast", "threads": "1"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for index, image in enumerate(draw(scene)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            frame.time_base = Fraction(1, FPS)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _samples(scene: Scene, video: Path, split: str, queries: int) -> list[GroundingSample]:
    rng = np.random.default_rng([scene.seed, 2])
    order = rng.permutation(len(scene.events))[:queries]
    return [
        GroundingSample(
            sample_id=f"{video.stem}_{number}",
            video=video,
            query=scene.events[index].query,
            windows=scene.events[index].windows,
            duration=scene.duration,
            split=split,
            tags=(scene.events[index].action,),
        )
        for number, index in enumerate(order)
    ]


def scene_of(settings: PlantedConfig, split: str, index: int, name: str) -> Scene:
    """The scene behind `<split>_<index>.mp4` of the data set `name`. No two splits share a seed."""
    offset = {"train": 0, "val": 1, "test": 2}[split]
    return make_scene((settings.seed * 3 + offset) * 1_000_000 + index, RULES[name], settings.repeat_share)


def _draw_all(folder: Path, settings: PlantedConfig, name: str) -> None:
    from rich.progress import track

    counts = {"train": settings.num_train, "val": settings.num_val, "test": settings.num_test}
    jobs = [(split, i) for split, count in counts.items() for i in range(count)]
    samples: list[GroundingSample] = []
    for split, i in track(jobs, description=f"drawing {len(jobs)} planted videos"):
        scene = scene_of(settings, split, i, name)
        video = folder / f"{split}_{i:05d}.mp4"
        encode(video, scene)
        samples += _samples(scene, Path(video.name), split, settings.queries_per_video)
    write_jsonl(folder / "annotations.jsonl", samples)


def planted_folder(root: Path, settings: PlantedConfig, name: str) -> Path:
    """The folder of this data set, drawn if it is not there yet. Safe when several processes ask at once.

    `name` is one of `tartvg.data.scene.RULES`.
    """
    rules = RULES[name]
    asked = {name: value for name, value in vars(settings).items() if name != "repeat_share" or value}
    key = json.dumps([VERSION, asked, vars(rules), SIZE, FPS], sort_keys=True)
    final = root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (final / "annotations.jsonl").is_file():
        return final
    side = side_folder(final)
    _draw_all(side, settings, name)
    try:
        side.rename(final)
    except OSError:  # another process was first
        shutil.rmtree(side)
        if not (final / "annotations.jsonl").is_file():
            raise
    return final


def load_planted(root: Path, settings: PlantedConfig, split: str, name: str) -> list[GroundingSample]:
    """The samples of one split, in a fixed order, with absolute video paths."""
    folder = planted_folder(root, settings, name).resolve()
    samples = (sample_from_json(row) for row in read_jsonl(folder / "annotations.jsonl"))
    return [GroundingSample(**{**vars(s), "video": folder / s.video}) for s in samples if s.split == split]
