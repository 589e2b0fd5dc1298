"""A hundred thousand completions of a model gone mad, through parser and rubric."""

import math
import random
from pathlib import Path

from tartvg.config import AnchorsConfig, CountPenalty, IouKind, RewardConfig
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.types import Fault, GroundingSample, Span

NUM_COMPLETIONS = 100_000
SAMPLE = GroundingSample("q0", Path("v.mp4"), "a person opens a door", (Span(10.0, 20.0),), 60.0, "train")
RUBRICS = [
    Rubric(RewardConfig(), AnchorsConfig()),
    Rubric(RewardConfig(iou=IouKind.hard, tar2_form=CountPenalty.squared), AnchorsConfig(target=1, max=1)),
    Rubric(RewardConfig(tar2_form=CountPenalty.indicator, answer_is_last_anchor=False), AnchorsConfig(target=3, max=5)),
    Rubric(RewardConfig(needs_anchors=False, beta=0, gamma=0, tar1_weight=0), AnchorsConfig()),
]
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<timestamp>", "</timestamp>", "<|im_end|>", "<|endoftext|>",
    "12.54 to 17.83", "20 to 10", "0 to 0", "-1 to 5", "nan to inf", "1e9 to 1e10", "9999999 to 10000000",
    "99999999 to 1", "1 to 2 to 3", "3s to 4 seconds", " to ", ".", "1" * 40, "\n", " ", "\x00",
    "\ud800", "\u202e", "person", "<", ">",
]  # fmt: skip


def valid(rng: random.Random) -> str:
    spans = [sorted((rng.uniform(0, 60), rng.uniform(0, 60))) for _ in range(rng.randrange(1, 6))]
    stamps = " so ".join(f"<timestamp>{a:.2f} to {b:.2f}</timestamp>" for a, b in spans)
    return f"<think>I see {stamps} </think><answer>{spans[-1][0]:.2f} to {spans[-1][1]:.2f}</answer>"


def mutated(rng: random.Random) -> str:
    text = valid(rng)
    for _ in range(rng.randrange(1, 4)):
        a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        match rng.randrange(4):
            case 0:
                text = text[:a] + text[min(b, a + 12) :]
            case 1:
                text = text[:a] + rng.choice(PIECES) + text[a:]
            case 2:
                text = text[:b] + text[a:b] + text[b:]
            case _:
                text = text[:b]
    return text


def soup(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(14)))


def test_a_hundred_thousand_completions():
    rng = random.Random(0)
    makers = [valid, mutated, mutated, soup]
    seen: set[Fault] = set()
    num_well_formed = 0
    for i in range(NUM_COMPLETIONS):
        text = makers[i % len(makers)](rng)
        response = parse_response(text)
        rubric = RUBRICS[rng.randrange(len(RUBRICS))]
        reward = rubric.judge(response, SAMPLE)
        seen.update(response.faults)
        num_well_formed += reward.format == 1

        setting, anchors = rubric.reward, rubric.anchors
        paid = min(response.num_anchors, anchors.max)
        assert math.isfinite(reward.total), text
        assert reward.format in (0.0, 1.0)
        assert not (reward.format and response.num_anchors > anchors.max), text
        assert reward.iou == setting.unparsed_iou if response.answer is None else -1 <= reward.iou <= 1, text
        assert abs(reward.tar1) <= paid * (paid + 1) / 2, text
        assert abs(reward.tar3) <= max(paid - 1, 0), text
        assert reward.tar2 >= 0
        assert len(reward.anchor_ious) == response.num_anchors
        assert all(-1 <= v <= 1 for v in reward.anchor_ious), text
        # no completion earns more than a perfect one that uses every paid anchor
        best = setting.format_weight + setting.iou_weight + setting.tar1_weight * anchors.max * (anchors.max + 1) / 2
        assert reward.total <= best + setting.gamma * (anchors.max - 1), text
        if i % 50 == 0:
            assert parse_response(text) == response and rubric.judge(response, SAMPLE) == reward
    assert seen == set(Fault)
    assert NUM_COMPLETIONS / 10 < num_well_formed < NUM_COMPLETIONS / 2


def test_padding_a_good_completion_with_anchors_never_pays():
    rng = random.Random(1)
    rubric = RUBRICS[0]
    for _ in range(2000):
        text = valid(rng)
        response = parse_response(text)
        if response.num_anchors < 2 or response.faults:
            continue
        before = rubric.judge(response, SAMPLE).total
        surplus = "".join(f"<timestamp>{10 - 1 / i} to 20</timestamp>" for i in range(1, rng.randrange(3, 40)))
        after = rubric.judge(parse_response(text.replace("</think>", surplus + "</think>")), SAMPLE).total
        assert after < before
