from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartvg.config import AnchorsConfig, PromptStyle
from tartvg.prompts import build_prompt, normalise_query
from tartvg.response import parse_response
from tartvg.types import GroundingSample, Span


def sample(query: str) -> GroundingSample:
    return GroundingSample("q0", Path("v.mp4"), query, (Span(1, 2),), 10.0, "train")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a person opens a door.", "a person opens a door"),
        ("  a person\topens \n a door . ", "a person opens a door"),
        ("a person opens a door", "a person opens a door"),
        ("they wait...", "they wait..."),
        ("who is it?", "who is it?"),
        ("at 3 p.m.", "at 3 p.m"),
        ("", ""),
        (".", ""),
    ],
)
def test_normalise_query(text: str, expected: str):
    assert normalise_query(text) == expected


@given(st.text(st.sampled_from("ab. \n\u00a0\ud800{}")))
def test_normalising_twice_changes_nothing(text: str):
    once = normalise_query(text)
    assert normalise_query(once) == once
    assert once == once.strip() and "  " not in once and "\n" not in once


def test_timezero_is_verbatim():
    prompt = build_prompt(sample("person opens the door."), AnchorsConfig(prompt=PromptStyle.timezero))
    assert prompt.text == (
        'To accurately pinpoint the event "person opens the door" in the video, determine the precise time period of '
        "the event.\n"
        "\n"
        "Output your thought process within the <think> </think> tags, including analysis with either specific "
        "timestamps (xx.xx) or time ranges (xx.xx to xx.xx) in <timestep> </timestep> tags.\n"
        "\n"
        "Then, provide the start and end times (in seconds, precise to two decimal places) in the format "
        '"start time to end time" within the <answer> </answer> tags. For example: "12.54 to 17.83".'
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (1, "exactly one time range "),
        (2, "exactly two time ranges "),
        (3, "exactly three time ranges "),
        (5, "exactly 5 "),
    ],
)
def test_tar_asks_for_the_target_number(target: int, words: str):
    text = build_prompt(sample("the dog runs."), AnchorsConfig(count=target, max_count=target + 1)).text
    assert words in text
    assert '"the dog runs"' in text
    assert ("more precise than the one before" in text) == (target > 1)
    assert len(text.split()) <= 65


def test_tar_shows_a_format_that_the_parser_reads():
    text = build_prompt(sample("the dog runs"), AnchorsConfig()).text
    example = parse_response(text.splitlines()[-1])
    assert example.faults == ()
    assert example.answer == Span(12.54, 17.83)


def test_direct_asks_for_the_answer_alone_in_a_format_that_the_parser_reads():
    text = build_prompt(sample("the dog runs"), AnchorsConfig(prompt=PromptStyle.direct)).text
    assert "think" not in text and "timestamp" not in text
    example = parse_response(text.splitlines()[-1], is_direct=True)
    assert example.faults == () and example.answer == Span(12.54, 17.83)


@pytest.mark.parametrize("style", PromptStyle)
def test_the_query_is_quoted_as_it_is(style: PromptStyle):
    prompt = build_prompt(sample('{query} {0} %s "x"'), AnchorsConfig(prompt=style))
    assert '"{query} {0} %s "x""' in prompt.text
    assert prompt.sample.query == '{query} {0} %s "x"'
