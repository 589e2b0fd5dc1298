import math
from pathlib import Path

import pytest

from tartvg.config import AnchorsConfig, RewardConfig
from tartvg.grpo import rollout_metrics
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.types import Completion, GroundingSample, Prompt, Rollout, RolloutGroup, Span

SAMPLE = GroundingSample("q0", Path("v.mp4"), "a person opens a door", (Span(0, 10),), 20.0, "train")
RUBRIC = Rubric(RewardConfig(), AnchorsConfig())

REFINED = "<think><timestamp>0 to 8</timestamp><timestamp>0 to 9</timestamp></think><answer>0 to 9</answer>"
WORSENED = "<think><timestamp>0 to 9</timestamp><timestamp>0 to 8</timestamp></think><answer>0 to 9</answer>"
SINGLE = "<think><timestamp>0 to 9</timestamp></think><answer>0 to 9</answer>"
NONSENSE = "I do not know"


def group(*texts: str, num_tokens: int = 4) -> RolloutGroup:
    rollouts = []
    for text in texts:
        response = parse_response(text)
        completion = Completion(text, (1,) * num_tokens, (-1.0,) * num_tokens, is_finished=text != NONSENSE)
        rollouts.append(Rollout(completion, response, RUBRIC.score(response, SAMPLE)))
    return RolloutGroup(Prompt(SAMPLE, "?"), tuple(rollouts), 0)


def test_hand_counted_batch():
    groups = [group(REFINED, WORSENED, SINGLE, NONSENSE), group(SINGLE, SINGLE, SINGLE, SINGLE, num_tokens=10)]
    metrics = rollout_metrics(groups, target=2)
    # totals: 3 + .9 + (.8 + 1.8) + 1, .9 + (.9 + 1.6) - 1, 3 + .9 + .9 - 5 (five times), -1 - 10
    totals = [7.5, 2.4, -0.2, -11.0, -0.2, -0.2, -0.2, -0.2]
    mean = sum(totals) / 8
    first_mean = sum(totals[:4]) / 4
    expected = {
        "reward/total_mean": mean,
        "reward/total_std": math.sqrt(sum((t - mean) ** 2 for t in totals) / 8),
        "reward/format_mean": 6 / 8,
        "reward/iou_mean": (7 * 0.9 - 1) / 8,
        "reward/tar1_mean": (2.6 + 2.5 + 5 * 0.9) / 8,
        "reward/tar2_mean": (5 * 1 + 2) / 8,
        "reward/tar3_mean": 0.0,
        "anchors/count_mean": 9 / 8,
        "anchors/valid_rate": 1 / 8,
        "anchors/target_rate": 1 / 8,
        "anchors/anchored_rate": 7 / 8,
        "anchors/pairs_mean": 2 / 8,
        "anchors/refinement_rate": 1 / 2,
        "anchors/answer_match_rate": 6 / 7,
        # of the two completions with two anchors: .8 then .9, and .9 then .8
        "anchors/first_iou_mean": 0.85,
        "anchors/last_iou_mean": 0.85,
        "anchors/gain_mean": 0.0,
        "anchors/held_back_mean": 0.05,
        "anchors/equal_rate": 0.0,
        "anchors/first_exact_rate": 0.0,
        "anchors/inexact_refined_rate": 0.5,
        "anchors/inexact_worsened_rate": 0.5,
        "group/zero_variance_rate": 1 / 2,
        "group/reward_std_mean": math.sqrt(sum((t - first_mean) ** 2 for t in totals[:4]) / 4) / 2,
        "rollout/entropy": 1.0,
        "rollout/length_mean": 7.0,
        "rollout/length_max": 10.0,
        "rollout/truncated_rate": 1 / 8,
        "rollout/unparsed_rate": 1 / 8,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert all(name.startswith("reward/") for name in metrics.keys() - expected.keys())  # terms added later
    assert rollout_metrics(groups, target=1)["anchors/target_rate"] == 5 / 8


def test_an_exact_first_anchor_cannot_be_refined_and_is_counted_apart():
    def said(*spans: str) -> str:
        return f"<think>{''.join(f'<timestamp>{s}</timestamp>' for s in spans)}</think><answer>{spans[-1]}</answer>"

    texts = (said("0 to 10", "0 to 10"), said("0 to 10", "0 to 5"), said("0 to 5", "0 to 5"), said("0 to 4", "0 to 10"))
    found = rollout_metrics([group(*texts, SINGLE)], target=2)
    assert found["anchors/first_exact_rate"] == 0.5 and found["anchors/equal_rate"] == 0.5
    assert (found["anchors/inexact_refined_rate"], found["anchors/inexact_worsened_rate"]) == (0.5, 0.0)
    assert found["anchors/held_back_mean"] == pytest.approx(0.6 / 4)
    # where one anchor is wanted, one anchor counts
    assert rollout_metrics([group(SINGLE)], target=1)["anchors/last_iou_mean"] == 0.9
    assert rollout_metrics([group(SINGLE)], target=2)["anchors/last_iou_mean"] == 0.0


def test_every_metric_is_there_even_when_nothing_can_be_read():
    metrics = rollout_metrics([group(NONSENSE, NONSENSE)], target=2)
    assert metrics.keys() == rollout_metrics([group(REFINED)], target=2).keys()
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["anchors/refinement_rate"] == metrics["anchors/answer_match_rate"] == 0
    assert metrics["rollout/unparsed_rate"] == 1
