"""What a planted video shows, and how one frame of it is drawn. NumPy only; everything follows from a seed.

A scene is a textured, slowly moving background with noise, and shapes that do things at known times. Events start and
end on half seconds, so that sampling at two frames a second can see them exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tartvg.types import Span

SIZE = 112
"""Width and height of a planted video, in pixels."""
FPS = 8
"""Frames per second of a planted video."""
SWAY = 24
"""The background moves on a circle of this radius, in pixels."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 220, 50),
    "purple": (165, 60, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
UNSEEN = {("red", "triangle"), ("green", "square"), ("blue", "circle"), ("white", "triangle")}
"""Combinations that occur in planted_long only."""
ACTIONS = ("appears", "crosses", "grows", "turns", "hides")
PHRASES = {
    "appears": ("the {c} {s} is in the picture", "a {c} {s} appears"),
    "crosses": ("the {c} {s} moves across", "a {c} {s} crosses the scene"),
    "grows": ("the {c} {s} gets bigger", "a {c} {s} grows"),
    "turns": ("the {c} {s} turns {d}", "a {c} {s} becomes {d}"),
    "hides": ("the {c} {s} is hidden", "the {c} {s} is out of sight"),
}


@dataclass(frozen=True)
class Event:
    """One shape doing one thing. `windows` is when it does it; `visible` is when the shape can be seen."""

    action: str
    colour: str
    shape: str
    second_colour: str
    windows: tuple[Span, ...]
    visible: tuple[Span, ...]
    x: float
    y: float
    radius: float
    direction: float
    phrase: int

    @property
    def query(self) -> str:
        """The sentence that describes the windows."""
        text = PHRASES[self.action][self.phrase]
        return text.format(c=self.colour, s=self.shape, d=self.second_colour)


@dataclass(frozen=True)
class Scene:
    """Everything that one planted video shows."""

    seed: int
    duration: float
    events: tuple[Event, ...]


@dataclass(frozen=True)
class SceneRules:
    """Ranges that scenes are drawn from; seconds and counts are inclusive."""

    min_duration: int = 8
    max_duration: int = 20
    min_events: int = 3
    max_events: int = 4
    min_window: float = 1.5
    max_window: float = 7.0
    is_unseen_allowed: bool = False
    repeat_share: float = 0.0
    """Probability that an `appears` event has a second window."""


RULES = {
    "planted": SceneRules(),
    "planted_long": SceneRules(24, 40, 5, 7, max_window=10.0, is_unseen_allowed=True, repeat_share=0.5),
    "planted_pretrain": SceneRules(12, 40, 4, 7, max_window=9.0),
}
"""The data sets that can be drawn; the last one is what the tiny base learns to see from."""


def _half(value: float) -> float:
    return round(value * 2) / 2


def _window(rng: np.random.Generator, low: float, high: float, shortest: float, longest: float) -> Span:
    """A span on half seconds inside [low, high], preferably as long as the rules ask."""
    length = _half(rng.uniform(shortest, min(longest, high - low)))
    start = low + _half(rng.uniform(0.0, high - low - length))
    return Span(start, start + length)


def _event(rng: np.random.Generator, rules: SceneRules, duration: float, kind: tuple[str, str], slot: int) -> Event:
    colour, shape = kind
    action = ACTIONS[rng.integers(len(ACTIONS))]
    window = _window(rng, 0.5, duration - 0.5, rules.min_window, rules.max_window)
    windows: tuple[Span, ...] = (window,)
    visible: tuple[Span, ...] = (window,)
    if action == "turns":
        visible = (Span(max(0.0, window.start - _half(rng.uniform(1.0, 4.0))), window.end),)
    elif action == "hides":
        before = Span(max(0.0, window.start - _half(rng.uniform(1.5, 5.0))), window.start)
        after = Span(window.end, min(duration, window.end + _half(rng.uniform(1.5, 5.0))))
        visible = (before, after)
    elif action == "appears" and rng.random() < rules.repeat_share and duration - window.end > rules.min_window + 4:
        again = _window(rng, window.end + 3.0, duration - 0.5, rules.min_window, rules.max_window)
        windows = visible = (window, again)
    others = [c for c in COLOURS if c != colour]
    return Event(
        action=action,
        colour=colour,
        shape=shape,
        second_colour=others[rng.integers(len(others))],
        windows=windows,
        visible=visible,
        x=(28.0, 84.0)[slot % 2] + rng.uniform(-5, 5),
        y=(28.0, 84.0)[slot // 2 % 2] + rng.uniform(-5, 5),
        radius=rng.uniform(17, 22),
        direction=float(rng.choice([-1.0, 1.0])),
        phrase=int(rng.integers(2)),
    )


def _repeated(rng: np.random.Generator, rules: SceneRules, duration: float, event: Event) -> Event:
    """The event's shape, coming and going two or three times: in each half or third of the scene once."""
    count = int(rng.integers(2, 4 if duration >= 12 else 3))
    part = (duration - 1.0) / count
    starts = [np.ceil(2 * (0.5 + number * part)) / 2 for number in range(count)]
    windows = tuple(
        _window(rng, start, start + np.floor(2 * (part - 1.0)) / 2, rules.min_window, rules.max_window)
        for start in map(float, starts)
    )
    return replace(event, action="appears", windows=windows, visible=windows)


def make_scene(seed: int, rules: SceneRules, repeat_share: float = 0.0) -> Scene:
    """The scene of a seed: shapes that differ from one another in colour or form, each with one event.

    `repeat_share` of the events happen several times; 0 leaves that to the rules.
    """
    rng = np.random.default_rng(seed)
    duration = float(rng.integers(rules.min_duration, rules.max_duration + 1))
    combinations = [(c, s) for c in COLOURS for s in SHAPES if rules.is_unseen_allowed or (c, s) not in UNSEEN]
    chosen = rng.permutation(len(combinations))[: rng.integers(rules.min_events, rules.max_events + 1)]
    slots = rng.permutation(max(4, len(chosen)))
    events = tuple(
        _event(rng, rules, duration, combinations[i], int(slot)) for i, slot in zip(chosen, slots, strict=False)
    )
    taken = {(e.colour, e.shape) for e in events}
    safe = tuple(
        replace(e, action="appears", visible=e.windows)
        if e.action == "turns" and (e.second_colour, e.shape) in taken
        else e
        for e in events
    )
    if repeat_share:
        more = np.random.default_rng([seed, 3])  # of its own: the rest of the scene stays as it is
        safe = tuple(_repeated(more, rules, duration, e) if more.random() < repeat_share else e for e in safe)
    return Scene(seed, duration, safe)


_YY, _XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def _mask(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    dx, dy = _XX - x, _YY - y
    if shape == "circle":
        return dx * dx + dy * dy <= radius * radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) <= radius * 0.88
    return (dy <= radius * 0.8) & (np.abs(dx) * 1.9 <= dy + radius * 1.1)


def is_within(spans: tuple[Span, ...], time: float) -> bool:
    """Return whether one of the half-open spans covers `time`."""
    return any(s.start <= time < s.end for s in spans)


def _draw_event(frame: np.ndarray, event: Event, time: float) -> None:
    if not is_within(event.visible, time):
        return
    x, y, radius, colour = event.x, event.y, event.radius, event.colour
    span = next(s for s in event.visible if s.start <= time < s.end)
    progress = (time - span.start) / span.length
    if event.action == "crosses":
        x = SIZE / 2 + event.direction * (progress - 0.5) * (SIZE - 2 * radius)
    elif event.action == "grows":
        radius *= 0.45 + 0.75 * progress
    elif event.action == "turns" and is_within(event.windows, time):
        colour = event.second_colour
    frame[_mask(event.shape, x, y, radius)] = COLOURS[colour]


def draw(scene: Scene) -> Iterator[np.ndarray]:
    """The frames of a scene in order: uint8 (SIZE, SIZE, 3)."""
    rng = np.random.default_rng([scene.seed, 1])
    base = rng.uniform(60, 110, size=3).astype(np.float32)
    yy, xx = np.mgrid[0 : SIZE + 2 * SWAY, 0 : SIZE + 2 * SWAY].astype(np.float32)
    texture = np.zeros_like(xx)
    for _ in range(3):
        frequency, direction, phase = rng.uniform(0.05, 0.16), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
        along = xx * np.cos(direction) + yy * np.sin(direction)
        texture += rng.uniform(6, 14) * np.sin(frequency * along + phase).astype(np.float32)
    backdrop = base + texture[..., None]
    grain = rng.normal(0, 4, size=(2 * SIZE, 2 * SIZE, 1)).astype(np.float32)
    turns, phase = rng.uniform(0.2, 0.5), rng.uniform(0, 2 * np.pi)
    for index in range(int(scene.duration * FPS)):
        time = index / FPS
        left = int(SWAY + SWAY * np.cos(turns * time + phase))
        top = int(SWAY + SWAY * np.sin(turns * time + phase))
        frame = backdrop[top : top + SIZE, left : left + SIZE].copy()
        for event in scene.events:
            _draw_event(frame, event, time)
        ox, oy = rng.integers(0, SIZE, size=2)
        frame += grain[oy : oy + SIZE, ox : ox + SIZE]
        yield np.clip(frame, 0, 255).astype(np.uint8)
