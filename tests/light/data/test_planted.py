"""Planted videos: deterministic, cached whole, and true to their annotations."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.tiny_base import lessons
from tartvg.config import FramesConfig, PlantedConfig
from tartvg.data.planted import load_planted, planted_folder, scene_of
from tartvg.data.scene import COLOURS, RULES, SIZE, UNSEEN, draw, make_scene
from tartvg.data.video import read_clip
from tartvg.types import Span

SMALL = PlantedConfig(num_train=3, num_val=1, num_test=2, queries_per_video=2)


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_same_seed_same_bytes(tmp_path):
    first = planted_folder(tmp_path / "a", SMALL, "planted")
    second = planted_folder(tmp_path / "b", SMALL, "planted")
    assert digest(first) == digest(second)
    assert first.name == second.name
    assert planted_folder(tmp_path / "a", SMALL, "planted_long").name != first.name


def test_splits_share_no_video_and_no_id(tmp_path):
    splits = {s: load_planted(tmp_path, SMALL, s, "planted") for s in ("train", "val", "test")}
    assert [len(v) for v in splits.values()] == [6, 2, 4]
    everything = [x for v in splits.values() for x in v]
    assert len({x.sample_id for x in everything}) == 12
    assert len({x.video for x in everything}) == 6
    assert all(0 <= w.start < w.end <= x.duration for x in everything for w in x.windows)
    assert all(x.video.is_file() for x in everything)


def test_processes_that_draw_at_the_same_time_agree(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tartvg.config import PlantedConfig;"
        "from tartvg.data.planted import planted_folder;"
        "print(planted_folder(Path(sys.argv[1]), PlantedConfig(2, 1, 1, 1), 'planted'))"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    outputs = {p.communicate(timeout=120)[0].splitlines()[-1] for p in running}
    assert all(p.returncode == 0 for p in running)
    assert [str(p) for p in tmp_path.iterdir()] == list(outputs)
    assert (Path(outputs.pop()) / "annotations.jsonl").is_file()


def test_what_a_killed_drawing_leaves_is_removed_by_the_next_one(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tartvg.config import PlantedConfig; "
        "from tartvg.data.planted import planted_folder; "
        "planted_folder(Path(sys.argv[1]), PlantedConfig(num_train=10_000), 'planted')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob(".planted-*/*.mp4")):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    (left,) = tmp_path.glob(".planted-*")
    elsewhere = left.with_name(f".planted-0.node17.{process.pid}")  # its process may be alive there
    alive = left.with_name(f".planted-0.{socket.gethostname()}.{os.getppid()}")
    elsewhere.mkdir()
    alive.mkdir()
    made = planted_folder(tmp_path, PlantedConfig(1, 1, 1), "planted")
    assert {*tmp_path.iterdir()} == {made, elsewhere, alive}


def test_the_picture_shows_what_the_annotation_says(tmp_path):
    """Inside an `appears` window there is more of its colour on the decoded frames than outside."""
    checked = 0
    for index in range(20):
        settings = PlantedConfig(index + 1, 1, 1, 1)
        scene = scene_of(settings, "train", index, "planted")
        for event in scene.events:
            others = [e for e in scene.events if e is not event and event.colour in (e.colour, e.second_colour)]
            if event.action != "appears" or others:
                continue
            frames = np.stack(list(draw(scene))).astype(int)
            close = (np.abs(frames - COLOURS[event.colour]).max(axis=-1) < 40).sum(axis=(1, 2))
            times = np.arange(len(frames)) / 8
            inside = (times >= event.windows[0].start) & (times < event.windows[0].end)
            assert close[inside].min() > 100 > close[~inside].max()
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("name", ["planted", "planted_long"])
def test_repeated_events_have_several_windows_and_change_nothing_else(name):
    counts = set()
    for seed in range(100):
        before, scene = make_scene(seed, RULES[name]), make_scene(seed, RULES[name], 1.0)
        assert [(e.colour, e.shape, e.x, e.y) for e in scene.events] == [
            (e.colour, e.shape, e.x, e.y) for e in before.events
        ]
        for event in scene.events:
            counts.add(len(event.windows))
            times = [time for window in event.windows for time in (window.start, window.end)]
            assert times == sorted(set(times)) and times[0] >= 0.5 and times[-1] <= scene.duration - 0.5
            assert all((2 * time).is_integer() for time in times) and event.visible == event.windows
    assert counts == {2, 3}
    shares = [len(e.windows) > 1 for seed in range(200) for e in make_scene(seed, RULES["planted"], 0.25).events]
    assert 0.2 < np.mean(shares) < 0.3


def test_repeated_events_are_seen_in_each_of_their_windows():
    checked = 0
    for seed in range(4):
        scene = make_scene(seed, RULES["planted"], 1.0)
        alone = [e for e in scene.events if [o.colour for o in scene.events].count(e.colour) == 1]
        frames = np.stack(list(draw(scene))).astype(int) if alone else np.empty(0)
        for event in alone:
            close = (np.abs(frames - COLOURS[event.colour]).max(axis=-1) < 40).sum(axis=(1, 2))
            times = np.arange(len(frames)) / 8
            inside = np.any([(times >= w.start) & (times < w.end) for w in event.windows], axis=0)
            assert close[~inside].max() < 100 < close[inside].min(), (seed, event.query)
            checked += 1
    assert checked >= 4


def test_the_share_of_repeated_events_enters_the_name_only_where_it_is_set(tmp_path):
    """A data set that was drawn before there was such a setting is found."""
    one = PlantedConfig(1, 1, 1, 1)
    assert planted_folder(tmp_path, one, "planted").name == "planted-c86634f89da0"
    repeated = replace(one, repeat_share=1.0)
    assert {len(s.windows) for s in load_planted(tmp_path, repeated, "test", "planted")} <= {2, 3}
    assert len(list(tmp_path.iterdir())) == 2


def test_rules_hold():
    for seed in range(200):
        planted, long = make_scene(seed, RULES["planted"]), make_scene(seed, RULES["planted_long"])
        assert 8 <= planted.duration <= 20 and 24 <= long.duration <= 40
        assert not {(e.colour, e.shape) for e in planted.events} & UNSEEN
        assert len({e.query for e in planted.events}) == len(planted.events)
    scenes = [make_scene(seed, RULES["planted_long"]) for seed in range(200)]
    assert any({(e.colour, e.shape) for e in s.events} & UNSEEN for s in scenes)
    assert any(len(e.windows) > 1 for s in scenes for e in s.events)


def test_frames_are_pictures():
    frame = next(iter(draw(make_scene(0, RULES["planted"]))))
    assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8


def test_habits_have_the_shares_that_they_claim():
    from tartvg.response import parse_response

    rng = np.random.default_rng(0)
    window = Span(3.5, 7.0)
    responses = [parse_response(lessons.habit(window, 14.0, rng)) for _ in range(4000)]
    valid = np.mean([not r.faults and r.num_anchors == 2 for r in responses])
    assert abs(valid - lessons.SHARES[0]) < 0.03
    exact = np.mean([r.answer == window for r in responses])
    assert 0.1 < exact < 0.3
    assert lessons.coarse(window, 14.0) == Span(0.0, 10.0)
    assert lessons.near(window, 7.5) == Span(2.5, 7.5)


def test_crops_hold_their_window(tmp_path):
    frames = FramesConfig(max_frames=96, min_pixels=3136, max_pixels=3136)
    footage = lessons.load_footage(tmp_path, PlantedConfig(2, 1, 1, 4), "train", frames, side=28)
    rng = np.random.default_rng(0)
    for item in footage:
        assert item.frames.shape[0] == len(item.seen)
        for _, window in item.events:
            for longest in (8, 20, 40):
                part = lessons.crop(item, window, longest, rng)
                assert 0 <= part.start / 2 <= window.start and window.end <= part.stop / 2 <= item.duration
    clip = read_clip(next(tmp_path.glob("*/train_*.mp4")), FramesConfig(min_pixels=3136, max_pixels=3136))
    assert clip.duration >= 12
