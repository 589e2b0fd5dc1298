"""Readings of other works' wordings: by hand, on 3,720 perfect answers, and the warning where one reads nothing."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartvg.data import charades_sta
from tartvg.data.annotations import ReadOptions
from tartvg.evaluation.cli import main, unread_warning
from tartvg.evaluation.formats import read_predictions
from tartvg.evaluation.readings import READINGS, best_reading
from tartvg.evaluation.score import score
from tartvg.types import GroundingSample, Prediction, Span

REAL = Path(os.environ.get("TARTVG_TEST_DATA", "/nowhere"))
needs_data = pytest.mark.skipif("TARTVG_TEST_DATA" not in os.environ, reason="TARTVG_TEST_DATA is not set")

TRUTH = [REAL / "charades_sta/charades_sta_test.txt", REAL / "charades_sta/Charades_v1_test.csv"]

# A wording, whose it is, and the reading that the scorer's warning names for it.
WORDINGS = {
    "{0} and {1}": "timezero",  # TimeZero's pattern takes either word
    "The event happens from {0} to {1} seconds.": "timezero",  # VTimeLLM, TimeChat
    "<think>It may be <timestep>{0} to {1}</timestep>.</think>": "timezero",  # Time-R1
    "{0} to {1}": "timezero",
    "[({0}, {1})]": "lenient",  # VideoChat-R1.5
    "<answer>[({0}, {1})]</answer>": "lenient",
    "The event happens in {0} - {1} seconds.": "lenient",  # TimeLens, lmms-eval
    "<think>From 1.0 seconds to 9.0 seconds.</think>\n<answer>\nFrom {0} seconds to {1} seconds\n</answer>": "lenient",
    "[[{0}, {1}]]": "lenient",  # TimeLens2
    "Starting time: {0} seconds\nEnding time: {1} seconds": "lenient",  # lmms-eval
    "It starts at {0}s and ends at {1}s.": "lenient",
}


@pytest.fixture(scope="module")
def samples() -> tuple[GroundingSample, ...]:
    return charades_sta.read(TRUTH, ReadOptions("test")).samples


def write(path: Path, samples: Sequence[GroundingSample], wording: str) -> Path:
    """A perfect answer to each query, in this wording."""
    rows = ({"qid": f"charades_{i}", "output_text": wording.format(*s.target)} for i, s in enumerate(samples))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_data
@pytest.mark.parametrize(("wording", "named"), WORDINGS.items())
def test_3720_perfect_answers_in_each_wording(
    tmp_path: Path, samples: tuple[GroundingSample, ...], wording: str, named: str
) -> None:
    path = write(tmp_path / "p.jsonl", samples, wording)

    def scored(reading: str | None) -> tuple[str, str | None]:
        items = read_predictions(path, samples, reading).items
        return f"{100 * score(samples, items, resamples=0).miou.value:.2f}", unread_warning(items)

    miou, warning = scored("strict")
    # <timestep> counts as <timestamp>
    first = repr(wording.format(*samples[0].target).replace("timestep", "timestamp")[:60])[:40]
    assert miou == "0.00" and warning is not None
    assert warning.startswith(f"3720 of 3720 texts are unread, the first is {first}")
    assert warning.endswith(f"; --reading {named} reads 3720 of them")
    assert scored(named) == ("100.00", None)


@needs_data
@pytest.mark.parametrize("wording", ["{0} and {1}", "[({0}, {1})]"])
def test_the_command_warns_and_then_reads(
    tmp_path: Path, samples: tuple[GroundingSample, ...], capsys, wording
) -> None:
    path = write(tmp_path / "p.jsonl", samples, wording)
    command = ["--dataset", "charades_sta", "--resamples", "0", "--predictions", str(path), "--annotations"]
    command += [str(file) for file in TRUTH]
    started = time.process_time()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "warning: 3720 of 3720 texts are unread" in shown and re.search(r"mIoU +0\.00 ", shown)
    assert main([*command, "--reading", "lenient"]) == 0
    assert time.process_time() - started < 4.0
    shown = capsys.readouterr().out
    assert "warning" not in shown and re.search(r"mIoU +100\.00 ", shown) and "reading       lenient" in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # strict, timezero, lenient, timelens, last_two
        ("<think>1.0 to 2.0</think><answer>3.5 to 4.0</answer>", ((3.5, 4), (3.5, 4), (3.5, 4), (1, 2), (3.5, 4))),
        ("<answer>9 to 5</answer>", (None, (9, 5), (5, 9), (9, 5), (5, 9))),
        ("3.5s to 4.0s", (None, None, (3.5, 4), (3, 4), (3.5, 4))),
        ("from 00:01:10 to 02:03.5", (None, (10, 2), (70, 123.5), (70, 123.5), (2, 3.5))),
        ("between 1:05 and 1:10", (None, (5, 1), (65, 70), (65, 70), (1, 10))),
        ("5 - 7, then 8 - 9", (None, None, (8, 9), (5, 7), (8, 9))),
        ("person #1 sits: 3 until 5", (None, None, (3, 5), (1, 3), (3, 5))),
        ("from 28% to 71% of it", (None, None, None, (28, 71), (28, 71))),
        ("at 4.5 only", (None, None, None, None, None)),
        ("", (None,) * 5),
        ("1" * 16 + " to 5", (None,) * 5),
        ("99999999 to 5", (None,) * 5),
        ("<think>1 to 2</think> I cannot say.", (None, (1, 2), (1, 2), (1, 2), (1, 2))),
    ],
)  # fmt: skip
def test_each_reading_by_hand(text: str, expected: tuple[tuple[float, float] | None, ...]) -> None:
    found = tuple(read(text) for read in READINGS.values())
    assert found == tuple(None if span is None else Span(*span) for span in expected)


TOKENS = st.sampled_from([
    "<answer>", "</answer>", "<think>", "</think>", "<timestep>", "12", "3.5", ".", " ", "to", " to ", "and", "-", ":",
    "00:12", "s", "%", "#", "\n", "1e9", "9" * 20, "\u0663", "x",
])  # fmt: skip


@given(text=st.lists(TOKENS, max_size=30).map("".join) | st.text(max_size=60))
def test_every_reading_is_total_and_bounded(text: str) -> None:
    for read in READINGS.values():
        span = read(text)
        assert span is None or all(0 <= t <= 1e7 for t in span)


@pytest.mark.parametrize("text", ["9" * 200_000, "1 to " * 50_000, "1:" * 100_000, "<answer>" * 30_000, " " * 200_000,
                                  "1 -" + " " * 200_000, "1.1." * 50_000])  # fmt: skip
def test_long_texts_take_linear_time(text: str) -> None:
    started = time.process_time()
    for read in READINGS.values():
        read(text)
    assert time.process_time() - started < 2.0


def said(*texts: str) -> list[Prediction]:
    strict = READINGS["strict"]
    return [
        Prediction(f"a{i}", 0, "q", "v.mp4", (), 9.0, text, (), strict(text), (), True) for i, text in enumerate(texts)
    ]


def test_a_tenth_of_unread_texts_is_no_wording() -> None:
    good = "<answer>1.0 to 2.0</answer>"
    assert unread_warning(said(*[good] * 9, "no")) is None
    assert unread_warning([]) is None and unread_warning(said(*[""] * 3)) is None
    warning = unread_warning(said(*[good] * 8, "I do not know", "from 1 to 2 s"))
    assert warning == "2 of 10 texts are unread, the first is 'I do not know'; --reading timezero reads 1 of them"
    assert str(unread_warning(said("no", "nothing"))).endswith("no --reading reads them")
    assert best_reading(["1 - 2", "1 to 2"]) == ("lenient", 2)


def test_a_reading_reads_again_what_is_stored_beside_its_text(tmp_path: Path) -> None:
    """Without one, an answer that is stored stays: a run's own, or what TimeLens took from its text."""
    sample = GroundingSample("t_0", Path("v.mp4"), "q", (Span(0, 2),), 9.0, "test")
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"v.mp4>>>q>>>[0, 2]": {"timestamps": [[1, 2]], "answers": "it is 0.6 - 2.4 s"}}))

    def answer(reading: str | None) -> Span | None:
        return read_predictions(path, [sample], reading).items[0].answer

    assert (answer(None), answer("timelens"), answer("strict")) == (Span(1, 2), Span(0.6, 2.4), None)
