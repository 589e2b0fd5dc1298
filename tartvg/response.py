"""Completion text -> Response: the only parser. It never raises and its time is linear in the text.

The format (arXiv 2508.07683, output format) is one think block and then one answer block:

    <think> ... <timestamp>12.54 to 17.83</timestamp> ... </think><answer>13.10 to 16.90</answer>

One pass over the tags (a fixed alternation, so nothing can backtrack) drives a small state machine; the text between
tags is only ever sliced once, and numbers are read from slices of bounded length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from tartvg.spans import TOLERANCE, is_same
from tartvg.types import Fault, Response, Span

MAX_SECONDS = 1e7
"""Larger numbers are unreadable: four months is no position in a video."""
MAX_DIGITS = 15
"""Longer numbers are unreadable; up to here a decimal survives the round trip through a float."""

_TAG = re.compile(r"</?(?:think|timestamp|answer)>")
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)(?:\s*s(?:econds)?)?"
_SPAN = re.compile(rf"{_NUMBER}\s+to\s+{_NUMBER}")
_MAX_SPAN_LENGTH = 100
"""Characters of `A to B` without outer whitespace: bounds the backtracking of `_SPAN` over its whitespace runs."""
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


FAULT_WORDS = {
    Fault.NO_THINK: "there is no reasoning in <think> tags",
    Fault.THINK_UNCLOSED: "the reasoning is never closed",
    Fault.THINK_REPEATED: "there is more than one block of reasoning",
    Fault.UNWANTED_THINK: "it reasons although only the answer was asked for",
    Fault.NO_ANSWER: "there is no answer behind the reasoning",
    Fault.ANSWER_UNCLOSED: "an answer is never closed",
    Fault.ANSWER_REPEATED: "there is more than one answer",
    Fault.ANSWER_UNREADABLE: "an answer is not of the form A to B",
    Fault.ANSWER_REVERSED: "an answer does not end after it begins",
    Fault.NO_ANCHOR: "the reasoning holds no readable timestamp",
    Fault.ANCHOR_UNCLOSED: "a timestamp is never closed or never opened",
    Fault.ANCHOR_UNREADABLE: "a timestamp is not of the form A to B",
    Fault.ANCHOR_REVERSED: "a timestamp does not end after it begins",
    Fault.ANCHOR_OUTSIDE_THINK: "a timestamp stands outside the reasoning",
    Fault.ANSWER_MISMATCH: "the answer is not the last timestamp",
    Fault.STRAY_TEXT: "there is text outside the two blocks",
    Fault.ORDER: "the answer comes before the end of the reasoning",
}
"""Each fault for somebody who reads one answer."""


Range = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True)
class Marks:
    """Where the times stand in a completion's text: from behind an opening tag to behind its closing tag."""

    anchors: tuple[Range, ...]
    """Of the anchors of `Response`, in order."""
    answer: Range | None
    """Of the answer of `Response`."""


class _Answer(NamedTuple):
    """An opened answer block. `end` is the position after it, or of the tag that cut it off."""

    start: int
    end: int
    span: Span | None
    is_closed: bool
    is_in_think: bool


@dataclass
class _Reader:
    """The state between two tags. A position is None while that block is not open."""

    text: str
    faults: set[Fault] = field(default_factory=set)
    anchors: list[Span] = field(default_factory=list)
    anchor_ranges: list[Range] = field(default_factory=list)
    answers: list[_Answer] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    think_from: int | None = None
    anchor_from: int | None = None
    answer_from: int | None = None
    num_think_opened: int = 0
    num_think_closed: int = 0
    num_answer_closed: int = 0
    last_think_tag: int = -1

    def read(self) -> None:
        """Walk over all tags, then close what is still open at the end of the text."""
        position = 0
        for match in _TAG.finditer(self.text):
            start, end = match.span()
            self._gap(position, start)
            self._tag(match.group(), start, end)
            position = end
        self._gap(position, len(self.text))
        self._drop_anchor()
        self._drop_answer(len(self.text))
        if self.think_from is not None:
            self.faults.add(Fault.THINK_UNCLOSED)
            self.thoughts.append(self.text[self.think_from :])

    def _gap(self, start: int, end: int) -> None:
        is_outside = self.think_from is None and self.anchor_from is None and self.answer_from is None
        if is_outside and start < end and not self.text[start:end].isspace():
            self.faults.add(Fault.STRAY_TEXT)

    def _tag(self, tag: str, start: int, end: int) -> None:
        if tag == "</timestamp>":
            self._close_anchor(start, end)
            return
        self._drop_anchor()
        if tag == "<timestamp>":
            self._open_anchor(end)
        elif tag == "<answer>":
            self._drop_answer(start)
            self.answer_from = end
        elif tag == "</answer>":
            self._close_answer(start, end)
        else:
            self._drop_answer(start)
            self._think_tag(tag, start, end)

    def _think_tag(self, tag: str, start: int, end: int) -> None:
        self.last_think_tag = start
        if tag == "<think>":
            self.num_think_opened += 1
            if self.think_from is None:
                self.think_from = end
            return
        self.num_think_closed += 1
        if self.think_from is None:
            self.faults.add(Fault.STRAY_TEXT)
        else:
            self.thoughts.append(self.text[self.think_from : start])
            self.think_from = None

    def _open_anchor(self, end: int) -> None:
        self.anchor_from = end
        if self.think_from is None:
            self.faults.add(Fault.ANCHOR_OUTSIDE_THINK)

    def _close_anchor(self, start: int, end: int) -> None:
        opened, self.anchor_from = self.anchor_from, None
        if self.think_from is None:
            self.faults.add(Fault.ANCHOR_OUTSIDE_THINK)
        elif opened is None:
            self.faults.add(Fault.ANCHOR_UNCLOSED)
        else:
            span = _read_span(self.text[opened:start])
            if span is None:
                self.faults.add(Fault.ANCHOR_UNREADABLE)
            elif span.length <= 0:
                self.faults.add(Fault.ANCHOR_REVERSED)
            else:
                self.anchors.append(span)
                self.anchor_ranges.append((opened, end))

    def _drop_anchor(self) -> None:
        """Any tag but its own closing one cuts a timestamp off."""
        if self.anchor_from is not None and self.think_from is not None:
            self.faults.add(Fault.ANCHOR_UNCLOSED)
        self.anchor_from = None

    def _close_answer(self, start: int, end: int) -> None:
        self.num_answer_closed += 1
        opened, self.answer_from = self.answer_from, None
        if opened is not None:
            span = _read_span(self.text[opened:start])
            self.answers.append(_Answer(opened, end, span, True, self.think_from is not None))
        elif self.think_from is None:
            self.faults.add(Fault.STRAY_TEXT)

    def _drop_answer(self, end: int) -> None:
        """A think tag, another `<answer>` or the end of the text cuts an answer off."""
        if self.answer_from is not None:
            self.answers.append(_Answer(self.answer_from, end, None, False, self.think_from is not None))
        self.answer_from = None


def parse_response(text: str, tolerance: float = TOLERANCE, *, is_direct: bool = False) -> Response:
    """Read one completion (never the prompt: prompts contain example answers). Total and linear in len(text).

    `tolerance` (seconds): the answer is the last anchor when both ends differ by no more; the default is half a unit
    of the format's second decimal.

    - A span is `A to B`: unsigned decimals of at most 15 digits and at most 1e7, each with an optional `s` or
      `seconds`, with any whitespace around, and nothing else.
    - Anchors are the spans with start < end inside think blocks, also inside one that never closes.
    - The answer is the last block outside the reasoning that holds a span with start < end; unreadable and reversed
      ones leave None. Answer blocks inside a closed think block are quotes, never the answer. Inside an unclosed think
      block one counts only if nothing follows it: then the closing tag was forgotten, otherwise a quote was cut off.
    - A second opening or closing tag is a repetition. A closing tag without its opening one is stray text outside the
      think block, and `</timestamp>` inside it counts as unclosed.
    - Whitespace between blocks and end-of-text tokens after them are fine.
    - With `is_direct` the format is the answer block alone: a think block is a fault, none and no anchor are not.

    Faults come in the order of `Fault`, each at most once. Source: arXiv 2508.07683, output format.
    """
    reader = _read(text)
    block = _judge_answers(reader)
    answer = None if block is None else block.span
    faults = reader.faults
    if is_direct and (reader.num_think_opened or reader.num_think_closed):
        faults.add(Fault.UNWANTED_THINK)
    if reader.num_think_opened == 0 and not is_direct:
        faults.add(Fault.NO_THINK)
    if max(reader.num_think_opened, reader.num_think_closed) > 1:
        faults.add(Fault.THINK_REPEATED)
    if not reader.anchors:
        if not is_direct:
            faults.add(Fault.NO_ANCHOR)
    elif answer is not None and not is_same(answer, reader.anchors[-1], tolerance):
        faults.add(Fault.ANSWER_MISMATCH)
    return Response(
        anchors=tuple(reader.anchors),
        answer=answer,
        faults=tuple(fault for fault in Fault if fault in faults),
        reasoning="\n".join(reader.thoughts).strip(),
    )


def read_marks(text: str) -> Marks:
    """Find the anchors and the answer of `parse_response` in the text. Total and linear, too."""
    reader = _read(text)
    block = _judge_answers(reader)
    return Marks(tuple(reader.anchor_ranges), None if block is None else (block.start, block.end))


def _read(text: str) -> _Reader:
    reader = _Reader(text[: _content_end(text)])
    reader.read()
    return reader


def _judge_answers(reader: _Reader) -> _Answer | None:
    """The block that is the answer, which has a span; adds the faults of the answer blocks."""
    faults = reader.faults
    is_unclosed = Fault.THINK_UNCLOSED in faults
    blocks = [a for a in reader.answers if not a.is_in_think or (is_unclosed and a.end == len(reader.text))]
    if max(len(reader.answers), reader.num_answer_closed) > 1:
        faults.add(Fault.ANSWER_REPEATED)
    if not blocks:
        faults.add(Fault.NO_ANSWER)
        if reader.answers and not is_unclosed:
            faults.add(Fault.ORDER)
        return None
    for block in blocks:
        if not block.is_closed:
            faults.add(Fault.ANSWER_UNCLOSED)
        elif block.span is None:
            faults.add(Fault.ANSWER_UNREADABLE)
        elif block.span.length <= 0:
            faults.add(Fault.ANSWER_REVERSED)
    readable = [block for block in blocks if block.span is not None and block.span.length > 0]
    chosen = (readable or blocks)[-1]
    if chosen.start < reader.last_think_tag:
        faults.add(Fault.ORDER)
    return chosen if readable else None


def _content_end(text: str) -> int:
    """Length of `text` without trailing whitespace and end-of-text tokens, found without copying the text."""
    end = len(text)
    while end:
        if text[end - 1].isspace():
            end -= 1
            continue
        token = next((t for t in _END_TOKENS if text.endswith(t, 0, end)), None)
        if token is None:
            break
        end -= len(token)
    return end


def _read_span(content: str) -> Span | None:
    """`A to B` in seconds, possibly reversed; None when it is anything else."""
    content = content.strip()
    match = _SPAN.fullmatch(content) if len(content) <= _MAX_SPAN_LENGTH else None
    if match is None:
        return None
    if any(len(number) - number.count(".") > MAX_DIGITS for number in match.groups()):
        return None
    start, end = (float(number) for number in match.groups())
    return Span(start, end) if max(start, end) <= MAX_SECONDS else None
