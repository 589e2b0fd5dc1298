"""Many completions of a model gone mad, through parser and rubric."""

import random

import pytest
from fuzzing import RUBRICS, SAMPLE, check_reward, mutated, soup, valid

from tartvg.response import parse_response
from tartvg.types import Fault


@pytest.mark.parametrize("num_completions", [20_000, pytest.param(100_000, marks=pytest.mark.campaign)])
def test_many_completions(num_completions):
    rng = random.Random(0)
    makers = [valid, mutated, mutated, soup]
    seen: set[Fault] = set()
    num_well_formed = 0
    for i in range(num_completions):
        text = makers[i % len(makers)](rng)
        response = parse_response(text)
        rubric = RUBRICS[rng.randrange(len(RUBRICS))]
        reward = rubric.score(response, SAMPLE)
        seen.update(response.faults)
        num_well_formed += reward.terms["format"] == 1
        check_reward(text, response, rubric, reward)
        if i % 50 == 0:
            assert parse_response(text) == response and rubric.score(response, SAMPLE) == reward
    assert seen == set(Fault) - {Fault.UNWANTED_THINK}  # of direct answers only
    assert num_completions / 10 < num_well_formed < num_completions / 2


def test_padding_a_good_completion_with_anchors_never_pays():
    rng = random.Random(1)
    rubric = RUBRICS[0]
    for _ in range(2000):
        text = valid(rng)
        response = parse_response(text)
        if response.num_anchors < 2 or response.faults:
            continue
        before = rubric.score(response, SAMPLE).total
        surplus = "".join(f"<timestamp>{10 - 1 / i} to 20</timestamp>" for i in range(1, rng.randrange(3, 40)))
        after = rubric.score(parse_response(text.replace("</think>", surplus + "</think>")), SAMPLE).total
        assert after < before
