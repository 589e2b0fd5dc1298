"""The parts of the page as HTML, from plain objects: player, time line, frames, what was said. Needs no Gradio."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from tartvg.app.speaker import Answer
from tartvg.app.videos import Shown
from tartvg.config import PromptStyle
from tartvg.report.cards import marked
from tartvg.report.strips import ticks
from tartvg.response import FAULT_WORDS
from tartvg.types import Span

FILES = "/gradio_api/file="
"""Where Gradio serves the files of its folder."""

HEAD = (
    '<h1>When does it happen?</h1><p class="lead">Describe a moment of a video in one sentence. The policy reasons, '
    "narrows the moment down, and answers in seconds.</p>"
)


def player(shown: Shown | None) -> str:
    """Draw the video, or a place for it."""
    if shown is None:
        return '<div class="stage empty"><p>Upload a video, or take one of the examples.</p></div>'
    source = FILES + quote(str(shown.path))
    return (
        f'<div class="stage"><video id="player" src="{escape(source)}" controls playsinline preload="auto" '
        'aria-label="The video"></video><p class="unplayable" hidden>This browser cannot play the file; the policies '
        "can read it.</p></div>"
    )


def frames(shown: Shown | None) -> str:
    """Draw the frames under the time line."""
    if shown is None:
        return ""
    return f'<img class="strip" alt="Frames at even times" src="{_picture(shown.frames)}">'


def examples(offered: Sequence[Shown]) -> str:
    """Draw a button for each example: a frame and its sentence."""
    buttons = "".join(
        f'<button type="button" data-example="{place}"><span class="thumb" style="background-image:'
        f'url({_picture(shown.thumb)})"></span><span>{escape(shown.query)}</span></button>'
        for place, shown in enumerate(offered)
    )
    return f'<div class="examples" role="group" aria-label="Examples">{buttons}</div>' if offered else ""


def _picture(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def timeline(answers: Sequence[Answer], duration: float) -> str:
    """Draw the anchors that are closed by now and the answers as bars on one axis; a bar is a button that plays it."""
    if duration <= 0:
        return ""
    groups = "".join(
        f'<div class="voice" role="group" aria-label="{escape(answer.label)}"><h3>{escape(answer.label)}</h3>'
        f"{_lanes(answer, duration)}</div>"
        for answer in answers
    )
    marks = "".join(_tick(time, duration) for time in ticks(duration))
    return (
        f'<div class="timeline" data-duration="{duration:.3f}"><i class="playhead"></i>{groups}'
        f'<div class="axis" aria-hidden="true">{marks}</div><p class="unit" aria-hidden="true">seconds</p></div>'
    )


def _tick(time: float, duration: float) -> str:
    place = 100 * time / duration
    edge = "first" if place < 2 else "last" if place > 98 else ""
    return f'<span class="{edge}" style="left:{place:.2f}%">{time:g}</span>'


def _lanes(answer: Answer, duration: float) -> str:
    """Draw a lane for each span, and empty ones for those that are still expected, so that nothing moves."""
    response, asked = answer.response, answer.asked
    found = [_lane(f"anchor {i}", "anchor", span, duration) for i, span in enumerate(response.anchors, start=1)]
    if response.answer is not None:
        found.append(_lane("answer", "answer", response.answer, duration))
    elif answer.is_over:
        found.append('<div class="lane none"><span class="tag">no answer could be read</span></div>')
    expected = 1 if asked.prompt is not PromptStyle.tar else asked.count + 1
    return "".join(found) + '<div class="lane"></div>' * (0 if answer.is_over else expected - len(found))


def _lane(name: str, kind: str, span: Span, duration: float) -> str:
    start, end = max(span.start, 0.0), min(span.end, duration)
    text = f"{name}: {span} s"
    if start >= duration:
        return f'<div class="lane none"><span class="tag">{escape(text)}, behind the end of the video</span></div>'
    left, right = 100 * start / duration, 100 * end / duration
    side = "inside" if right - left > 60 else "after" if 100 - right >= left else "before"
    place = {"inside": f"left:{left:.2f}%", "after": f"left:{right:.2f}%", "before": f"right:{100 - left:.2f}%"}[side]
    return (
        f'<div class="lane"><button type="button" class="bar {kind}" data-start="{start:.3f}" data-end="{end:.3f}" '
        f'style="left:{left:.2f}%;width:{right - left:.2f}%" aria-label="{escape(text)}; play it" title="Play it">'
        f'</button><span class="tag {side} {kind}" style="{place}" aria-hidden="true">{escape(text)}</span></div>'
    )


def said(answers: Sequence[Answer]) -> str:
    """Show what each policy has said so far, and at its end what is wrong with the format, in words."""
    columns = "".join(
        f'<section class="said" aria-label="{escape(answer.label)}"><h3>{escape(answer.label)}</h3>'
        f'<p class="text {_state(answer)}">{marked(answer.text)}</p>'
        f"{_end(answer)}</section>"
        for answer in answers
    )
    return f'<div class="columns">{columns}</div>'


def _state(answer: Answer) -> str:
    return "over" if answer.is_over else "writing" if answer.is_begun else "silent"


def _end(answer: Answer) -> str:
    if not answer.is_over:
        return ""
    faults = [FAULT_WORDS[fault] for fault in answer.response.faults]
    listed = "".join(f"<li>{escape(words)}</li>" for words in faults)
    form = f'<p class="form">Format:</p><ul>{listed}</ul>' if faults else '<p class="form">Format: as asked for.</p>'
    trouble = f'<p class="trouble">{escape(answer.trouble)}</p>' if answer.trouble else ""
    return trouble + (form if answer.text else "")


def status(text: str, is_refusal: bool = False) -> str:
    """Say what goes on, in a line that a screen reader reads out."""
    role = "alert" if is_refusal else "status"
    return f'<p class="status{" refusal" if is_refusal else ""}" role="{role}">{escape(text)}</p>'
