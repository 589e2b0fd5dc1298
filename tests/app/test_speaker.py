"""Answers as they are written, by real threads and a real policy."""

import threading
import time
from pathlib import Path

import pytest

from tartvg.app.speaker import Speaker, Voice, told
from tartvg.config import AnchorsConfig, SamplingConfig
from tartvg.policy.asking import ask
from tartvg.policy.loading import ADAPTER
from tartvg.types import Completion

ANCHORS, LIMITS = AnchorsConfig(), SamplingConfig(max_new_tokens=12)


def speaker(policy, timeout_s=60.0, voices=("base",)):
    return Speaker(policy, [Voice(label, ADAPTER) for label in voices], ANCHORS, LIMITS, timeout_s)


def test_texts_come_in_order_and_the_result_is_the_last():
    def work(tell):
        for text in ("a", "ab", "abc"):
            tell(text)
        return Completion("abcd", (1,), (0.0,), True)

    texts = list(told(work))
    assert texts[-1] == "abcd" and texts == sorted(texts)


def test_what_goes_wrong_is_raised_where_it_is_read():
    def work(tell):
        tell("a")
        raise KeyError("no luck")

    with pytest.raises(KeyError, match="no luck"):
        list(told(work))


def test_whoever_leaves_ends_the_work():
    count = 0

    def work(tell):
        nonlocal count
        while True:
            count += 1
            tell(str(count))
            time.sleep(0.001)

    reading = told(work)
    next(reading)
    reading.close()  # waits for the thread
    seen = count
    time.sleep(0.02)
    assert count == seen


def test_answers_are_those_of_ground_and_one_policy_speaks_after_the_other(policy, prompts):
    video = prompts[0].sample.video
    states = list(speaker(policy, voices=("base", "trained")).answers(video, "the red circle"))
    expected = ask(policy, video, "the red circle", ANCHORS, LIMITS).text
    assert [answer.text for answer in states[-1]] == [expected, expected]
    assert all(answer.is_over and not answer.trouble for answer in states[-1])
    assert not any(second.is_begun and not first.is_over for first, second in states)
    first = [state[0].text for state in states]
    assert first == sorted(first, key=len) and len(set(first)) > 3, "it does not come at once"


def test_trouble_is_told_in_words_and_the_next_question_is_answered(policy, prompts, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    *_, last = speaker(policy).answers(broken, "x")
    assert last[0].is_over and last[0].trouble.startswith("The video cannot be read: ")
    assert str(tmp_path) not in last[0].trouble
    video = prompts[0].sample.video
    *_, last = speaker(policy, timeout_s=1e-6).answers(video, "x")
    assert last[0].trouble == "It was cut off after 1e-06 s (serve.timeout_s)."
    *_, last = speaker(policy).answers(video, "x")
    assert last[0].trouble == "" and last[0].text


def test_a_question_waits_for_the_one_before(policy, prompts):
    one, order = speaker(policy), []

    def question(name: str, video: Path) -> None:
        for state in one.answers(video, name):
            order.append((name, state[0].text))

    first = one.answers(prompts[0].sample.video, "first")
    next(first)
    assert one.is_busy
    second = threading.Thread(target=question, args=("second", prompts[1].sample.video))
    second.start()
    order += [("first", state[0].text) for state in first]
    second.join(60)
    names = [name for name, _ in order]
    assert names == sorted(names) and set(names) == {"first", "second"}
    assert not one.is_busy
