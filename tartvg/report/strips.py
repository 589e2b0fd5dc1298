"""Film strips: frames at even times above one time axis that shows truth, anchors and answer."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from tartvg.data.decode import Painter, pictures
from tartvg.data.packets import scan
from tartvg.types import Span

# Okabe and Ito's palette; each lane is named as well, so colour is never the only sign.
TRUTH_COLOUR = "#009E73"
ANCHOR_COLOUR = "#0072B2"
ANSWER_COLOUR = "#D55E00"
NUM_FRAMES = 8


@dataclass(frozen=True)
class Lane:
    """One row of bars under the frames."""

    label: str
    kind: str
    """`truth`, `anchor` or `answer`."""
    spans: tuple[Span, ...]


COLOURS = {"truth": TRUTH_COLOUR, "anchor": ANCHOR_COLOUR, "answer": ANSWER_COLOUR}


def frame_times(duration: float, num: int = NUM_FRAMES) -> list[float]:
    """The middles of `num` equal parts of [0, duration], in seconds: each frame stands for its part of the axis."""
    return [duration * (i + 0.5) / num for i in range(num)]


def thumbnails(video: Path, times: Sequence[float], height: int = 96) -> list[Image.Image]:
    """RGB frames at `times` (seconds from the video's first frame, ascending), `height` pixels high, shape kept.

    They are upright. Past the end the last one is repeated. Raises ValueError, naming the file, if none can be read.
    """
    try:
        table = scan(video)
        begun = [table.seconds(stamp) for stamp in table.shown]
        wanted = [table.shown[min(bisect_left(begun, time - 1e-6), len(begun) - 1)] for time in times]
        painter = Painter(lambda tall, wide: (height, max(1, round(wide * height / tall))))
        found = pictures(video, table, wanted, table.duration, painter, float("inf"))
    except (FFmpegError, OSError, ArithmeticError) as error:
        raise ValueError(f"{video} could not be read as a video ({error})") from error
    return [Image.fromarray(image) for _, image in found]


def contact_row(video: Path, duration: float, num: int = NUM_FRAMES, height: int = 96) -> bytes:
    """The frames side by side as one JPEG. Raises ValueError as `thumbnails` does."""
    return row_of(thumbnails(video, frame_times(duration, num), height))


def row_of(images: Sequence[Image.Image]) -> bytes:
    """Put pictures of one height side by side, as one JPEG."""
    width, height = max(image.width for image in images), images[0].height
    row = Image.new("RGB", (width * len(images), height), "white")
    for i, image in enumerate(images):
        # A light line on the left edge keeps neighbouring frames apart.
        row.paste(image.crop((2 if i else 0, 0, width, height)), (i * width + (2 if i else 0), 0))
    buffer = io.BytesIO()
    row.save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def ticks(duration: float) -> list[float]:
    """Choose round times in [0, duration] for a time axis, in seconds."""
    return [float(t) for t in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, duration) if 0 <= t <= duration]


def lanes_of(anchors: Sequence[Span], answer: Span | None, prefix: str = "") -> list[Lane]:
    """One lane per anchor, in order, then the answer; an unreadable answer is an empty lane."""
    lanes = [Lane(f"{prefix}anchor {i}", "anchor", (span,)) for i, span in enumerate(anchors, start=1)]
    return [*lanes, Lane(f"{prefix}answer", "answer", () if answer is None else (answer,))]


def film_strip(
    video: Path,
    duration: float,
    truth: Sequence[Span],
    anchors: Sequence[Span],
    answer: Span | None,
    title: str,
    num_frames: int = NUM_FRAMES,
    *,
    optimize: bool = True,
) -> bytes:
    """A PNG: frames, and under them on the same time axis the truth (if known), each anchor in order, the answer.

    Times are seconds. `optimize` takes four times the time and saves a twentieth of the file. Raises ValueError as
    `thumbnails` does, and for a duration that is not positive.
    """
    if duration <= 0:
        raise ValueError(f"duration must be > 0, got {duration}")
    images = thumbnails(video, frame_times(duration, num_frames), height=180)
    lanes = [Lane("truth", "truth", tuple(truth))] if truth else []
    lanes += lanes_of(anchors, answer)
    aspect = images[0].width / images[0].height
    width, margin = 12.0, 1.5
    row = (width - margin) / num_frames / aspect
    figure = Figure(figsize=(width, row + 0.34 * len(lanes) + 1.1), layout="constrained")
    frames, bars = figure.subplots(2, 1, sharex=True, height_ratios=[row, 0.34 * len(lanes)])
    step = duration / num_frames
    for i, image in enumerate(images):
        frames.imshow(np.asarray(image), extent=(i * step, (i + 1) * step, 0, 1), aspect="auto")
        frames.axvline(i * step, color="white", linewidth=3 if i else 0)
    frames.set(xlim=(0, duration), ylim=(0, 1), yticks=[])
    frames.tick_params(bottom=False)
    frames.spines[:].set_visible(False)
    # A query may hold a dollar sign, which is text here and not mathematics.
    frames.set_title(title, loc="left", fontsize=13, color="#1a1a1a", wrap=True, parse_math=False)
    for i, lane in enumerate(lanes):
        drawn = [(max(s.start, 0.0), min(s.end, duration)) for s in lane.spans]
        bars.broken_barh(
            [(start, max(end - start, 0.004 * duration)) for start, end in drawn if start < duration and end >= start],
            (len(lanes) - 1 - i - 0.32, 0.64),
            color=COLOURS[lane.kind],
        )
    names = [f"{lane.label}\n{lane_text(lane)}" for lane in reversed(lanes)]
    bars.set_yticks(range(len(lanes)), names, fontsize=8.5, color="#1a1a1a")
    bars.set_ylim(-0.6, len(lanes) - 0.4)
    bars.set_xlabel("seconds", color="#444")
    bars.tick_params(axis="y", length=0)
    bars.grid(axis="x", color="#e2e2e2")
    bars.set_axisbelow(True)
    bars.spines[["top", "right", "left"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None}, pil_kwargs={"optimize": optimize})
    return buffer.getvalue()


def lane_text(lane: Lane) -> str:
    """The lane's spans in seconds, or why there are none."""
    if not lane.spans:
        return "unreadable" if lane.kind == "answer" else "none"
    return ", ".join(f"{s} s" for s in lane.spans)
