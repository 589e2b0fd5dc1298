"""The time line and the texts, worked out by hand."""

import re
from dataclasses import replace

import pytest

from tartvg.app import drawing
from tartvg.app.speaker import Answer
from tartvg.config import AnchorsConfig, PromptStyle

TEXT = "<think>At <timestamp>2 to 8</timestamp>, so <timestamp>3.5 to 6</timestamp>.</think><answer>3.5 to 6</answer>"
BAR = re.compile(r'class="bar (\w+)" data-start="([\d.]+)" data-end="([\d.]+)" style="left:([\d.]+)%;width:([\d.]+)%"')


def answer(text: str, is_over: bool = False) -> Answer:
    return Answer("base", AnchorsConfig(), text, is_begun=True, is_over=is_over)


def bars(text: str, duration: float = 10.0) -> list[tuple[str, ...]]:
    return BAR.findall(drawing.timeline([answer(text)], duration))


def test_a_bar_appears_with_the_closing_tag_and_the_answer_last():
    appeared, before = [], 0
    for end in range(len(TEXT) + 1):
        found = bars(TEXT[:end])
        assert len(found) in (before, before + 1)
        if len(found) > before:
            appeared.append((found[-1][0], TEXT[:end].rpartition("<")[2]))
        before = len(found)
    assert appeared == [("anchor", "/timestamp>"), ("anchor", "/timestamp>"), ("answer", "/answer>")]
    assert bars(TEXT) == [
        ("anchor", "2.000", "8.000", "20.00", "60.00"),
        ("anchor", "3.500", "6.000", "35.00", "25.00"),
        ("answer", "3.500", "6.000", "35.00", "25.00"),
    ]


def test_nothing_moves_when_bars_appear():
    assert {drawing.timeline([answer(TEXT[:end])], 10.0).count('<div class="lane') for end in range(len(TEXT))} == {3}
    direct = Answer("base", replace(AnchorsConfig(), prompt=PromptStyle.direct), is_begun=True)
    assert drawing.timeline([direct], 10.0).count('<div class="lane') == 1


def test_windows_outside_the_video_are_cut_or_named():
    assert bars("<think><timestamp>6 to 99</timestamp>") == [("anchor", "6.000", "10.000", "60.00", "40.00")]
    drawn = drawing.timeline([answer("<think><timestamp>12 to 14</timestamp>")], 10.0)
    assert "anchor 1: 12.00 to 14.00 s, behind the end of the video" in drawn and "data-start" not in drawn
    assert drawing.timeline([answer(TEXT)], 0.0) == ""


def test_an_answer_that_cannot_be_read_is_said():
    assert "no answer could be read" not in drawing.timeline([answer("<think>")], 10.0)
    assert "no answer could be read" in drawing.timeline([answer("<think>", is_over=True)], 10.0)


@pytest.mark.parametrize("part", ["said", "timeline"])
def test_text_is_text(part):
    attack = "<script>alert(1)</script>"
    spoken = Answer(attack, AnchorsConfig(), attack + TEXT, True, True, attack)
    drawn = drawing.said([spoken]) if part == "said" else drawing.timeline([spoken], 10.0)
    assert "<script" not in drawn and "&lt;script&gt;" in drawn
    assert "<script" not in drawing.status(attack, is_refusal=True)


def test_faults_come_at_the_end_and_in_words():
    wrong = "<think>At <timestamp>8 to 2</timestamp>"
    assert "Format" not in drawing.said([answer(wrong)])
    drawn = drawing.said([answer(wrong, is_over=True)])
    for words in ("the reasoning is never closed", "a timestamp does not end after it begins", "there is no answer"):
        assert words in drawn
    assert "as asked for" in drawing.said([answer(TEXT, is_over=True)])
