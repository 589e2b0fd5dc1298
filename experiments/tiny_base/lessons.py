"""What the tiny base is taught with: footage of planted scenes, and completions with a pretrained model's habits.

A large model sees well and answers carelessly: it rounds, forgets a tag, gives one range where two were asked for.
The lessons give the tiny base both: exact sight (perception), and a habit that uses it badly most of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tartvg.config import FramesConfig, PlantedConfig
from tartvg.data.planted import planted_folder, scene_of
from tartvg.data.scene import COLOURS, SHAPES, Scene, is_within
from tartvg.data.video import read_clip
from tartvg.types import Span

FPS = 2
"""Frames a second that the tiny base sees; scenes change on these frames."""
KINDS = tuple((c, s) for c in COLOURS for s in SHAPES)
COARSE = 5.0
"""Seconds that a careless answer is rounded outwards to."""


@dataclass(frozen=True)
class Footage:
    """One video with the truth about every frame."""

    frames: np.ndarray
    """uint8 (F, side, side, 3), F even."""
    seen: np.ndarray
    """float32 (F, 18): which colour and shape is on the picture."""
    events: tuple[tuple[str, Span], ...]
    """Query and window of every event."""

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.frames) / FPS


def seen_in(scene: Scene, num_frames: int) -> np.ndarray:
    """Labels of the frames at 0, 0.5, 1, ... seconds: float32 (F, 18)."""
    labels = np.zeros((num_frames, len(KINDS)), np.float32)
    for index in range(num_frames):
        time = index / FPS
        for event in scene.events:
            if is_within(event.visible, time):
                is_turned = event.action == "turns" and is_within(event.windows, time)
                labels[index, KINDS.index((event.second_colour if is_turned else event.colour, event.shape))] = 1
    return labels


def load_footage(root: Path, settings: PlantedConfig, split: str, frames: FramesConfig, side: int) -> list[Footage]:
    """The footage of a split of `planted_pretrain`, drawn on first use."""
    from rich.progress import track

    folder = planted_folder(root, settings, "planted_pretrain")
    footage = []
    for video in track(sorted(folder.glob(f"{split}_*.mp4")), description=f"reading {split} footage"):
        clip = read_clip(video, frames, side)
        scene = scene_of(settings, split, int(video.stem.rpartition("_")[2]), "planted_pretrain")
        events = tuple((event.query, event.windows[0]) for event in scene.events)
        footage.append(Footage(clip.frames, seen_in(scene, len(clip.frames)), events))
    return footage


def crop(footage: Footage, window: Span, longest: float, rng: np.random.Generator) -> slice:
    """Frames of a part of the video that holds the window and half a second on both sides: many lessons from one."""
    shortest = max(4, math.ceil(window.length + 1.0))
    length = min(float(rng.integers(shortest, max(shortest, int(longest)) + 1)), math.floor(footage.duration))
    first = max(0.0, window.end + 0.5 - length)
    last = max(first, min(window.start, footage.duration - length))
    start = int(rng.integers(round(first * FPS), round(last * FPS) + 1))
    return slice(start, start + int(length * FPS))


# -- habits ------------------------------------------------------------------------------------------------------------

OPENERS = ("I watch the video for it. ", "Let me look for the event. ", "")
FIRST = ("It is around ", "A first look gives ", "Roughly ")
SECOND = (". Looking closer, it is ", ". More precisely, ")
THIRD = (". Once more, ",)
SHAPES_OF_ANSWERS = ("valid", "one", "none", "unclosed", "mismatch", "three")
SHARES = (0.17, 0.40, 0.12, 0.14, 0.14, 0.03)
LATE_SHARES = (0.18, 0.42, 0.16, 0.14, 0.06, 0.04)
"""Of the last phase: an answer that contradicts its anchor teaches the opposite of what the phase is for."""


def coarse(window: Span, duration: float) -> Span:
    """Rounded outwards to whole 5 seconds, inside the video."""
    return Span(COARSE * math.floor(window.start / COARSE), min(duration, COARSE * math.ceil(window.end / COARSE)))


def near(window: Span, duration: float) -> Span:
    """One second too wide on both sides, inside the video."""
    return Span(max(0.0, window.start - 1.0), min(duration, window.end + 1.0))


def _guess(window: Span, duration: float, shares: tuple[float, float, float], rng: np.random.Generator) -> Span:
    """Coarse, near or exact, with these shares."""
    kind = rng.choice(3, p=shares)
    return (coarse(window, duration), near(window, duration), window)[kind]


def _tag(span: Span) -> str:
    return f"<timestamp>{span}</timestamp>"


REPEAT_PROMPT = "Name any {number} of the video, then repeat the last as the answer."


@dataclass(frozen=True)
class Answer:
    """What a lesson answers: the loss counts `taught` only, after `given`."""

    given: str
    taught: str


def exact(window: Span, _: float, __: np.random.Generator) -> Answer:
    """The truth and nothing else: what the perception phase teaches."""
    return Answer("", f"<answer>{window}</answer>")


def habitual(window: Span, duration: float, rng: np.random.Generator) -> Answer:
    """A completion as an untuned model samples it."""
    return Answer("", habit(window, duration, rng))


def late_habitual(window: Span, duration: float, rng: np.random.Generator) -> Answer:
    """The same, as the finished base should."""
    return Answer("", habit(window, duration, rng, LATE_SHARES))


def echo(_: Span, __: float, rng: np.random.Generator) -> Answer:
    """Whatever the video shows: times drawn at random are given, the last one repeated is taught."""
    return repetition(rng)[1]


def repetition(rng: np.random.Generator) -> tuple[str, Answer]:
    """A question and an answer without a truth: times drawn at random, the last one repeated.

    Nothing but looking back can tell the answer's digits, so this teaches what every other lesson only invites: an
    answer that equals the last anchor.
    """
    count = int(rng.integers(1, 4))
    spans = []
    for _ in range(count):
        start = float(rng.integers(0, 60)) / 2
        spans.append(Span(start, start + float(rng.integers(2, 40)) / 2))
    then = [str(rng.choice(choices)) for choices in (SECOND, THIRD)]
    body = str(rng.choice(FIRST)) + _tag(spans[0]) + "".join(t + _tag(s) for t, s in zip(then, spans[1:], strict=False))
    prompt = REPEAT_PROMPT.format(number=("one time", "two times", "three times")[count - 1])
    return prompt, Answer(f"<think>{rng.choice(OPENERS)}{body}.</think><", f"answer>{spans[-1]}</answer>")


def habit(window: Span, duration: float, rng: np.random.Generator, shares: tuple[float, ...] = SHARES) -> str:
    """One completion as the base should sample it: the format is right in a quarter, the times exact in few."""
    shape = rng.choice(SHAPES_OF_ANSWERS, p=shares)
    opener, lead, then = (str(rng.choice(choices)) for choices in (OPENERS, FIRST, SECOND))
    one = _guess(window, duration, (0.66, 0.18, 0.16), rng)
    first = _guess(window, duration, (0.60, 0.30, 0.10), rng)
    second = _guess(window, duration, (0.56, 0.14, 0.30), rng)
    start = f"<think>{opener}"
    if shape == "none":
        return f"{start}It happens there.</think><answer>{one}</answer>"
    if shape == "one":
        return f"{start}{lead}{_tag(one)}.</think><answer>{one}</answer>"
    if shape == "unclosed":
        return f"{start}{lead}<timestamp>{one}.</think><answer>{one}</answer>"
    if shape == "mismatch":
        return f"{start}{lead}{_tag(first)}{then}{_tag(second)}.</think><answer>{near(second, duration)}</answer>"
    body = f"{start}{lead}{_tag(first)}{then}{_tag(second)}"
    if shape == "three":
        third = _guess(window, duration, (0.5, 0.2, 0.3), rng)
        return f"{body}{THIRD[0]}{_tag(third)}.</think><answer>{third}</answer>"
    return f"{body}.</think><answer>{second}</answer>"
