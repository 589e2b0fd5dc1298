"""The published rule, clause by clause."""

from pathlib import Path

from tartvg.config import AnchorsConfig, FilterConfig, RewardConfig
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.stages.filter import rejections, select
from tartvg.types import Completion, GroundingSample, Prompt, Rollout, RolloutGroup, Span

SAMPLE = GroundingSample("a", Path("a.mp4"), "q", (Span(2.0, 12.0),), 20.0, "train")
RUBRIC = Rubric(RewardConfig(), AnchorsConfig())


def text_of(*spans):
    tags = " ".join(f"<timestamp>{s:.2f} to {e:.2f}</timestamp>" for s, e in spans)
    return f"<think>{tags}</think><answer>{spans[-1][0]:.2f} to {spans[-1][1]:.2f}</answer>"


def rollout(text):
    response = parse_response(text)
    return Rollout(Completion(text, (), (), True), response, RUBRIC.score(response, SAMPLE))


def test_a_good_trace_passes():
    assert rejections(rollout(text_of((2, 10), (2, 12))), FilterConfig()) == []


def test_each_clause_rejects():
    rule = FilterConfig()
    assert rejections(rollout(text_of((2, 12))), rule) == [
        "reward <= 6.4", "fewer than 2 anchors", "soft IoU of anchor 2 <= 0.7"
    ]  # fmt: skip
    # the first anchor has IoU 0.5 exactly: the bound is strict
    assert rejections(rollout(text_of((2, 7), (2, 12))), rule) == ["soft IoU of anchor 1 <= 0.5"]
    unrefined = rollout(text_of((2, 12), (2, 10)))
    assert unrefined.reward.terms["tar3"] == -1
    assert rejections(unrefined, rule) == ["reward <= 6.4"]


def test_the_reward_clause_turns_away_what_is_not_refined():
    """The weakest refined trace that passes the IoU clauses is worth 6.6; unrefined, the same loses 2 and fails."""
    edge = rollout(text_of((2, 7.1), (2, 9.1)))
    assert 6.6 < edge.reward.total < 6.7
    assert rejections(edge, FilterConfig()) == []
    assert rejections(rollout(text_of((2, 9.2), (2, 9.1))), FilterConfig()) == ["reward <= 6.4"]


def test_a_direct_trace_is_the_answer_that_was_reasoned_for():
    rule = FilterConfig(min_reward=-100, min_anchors=0, min_ious=[])
    texts = (text_of((2, 9), (2, 11)), text_of((2, 11)), "<think>hm</think><answer>2.00 to", "nothing")
    group = RolloutGroup(Prompt(SAMPLE, "p"), tuple(map(rollout, texts)), 0)
    traces, total, rejected = select([group], rule, is_direct=True)
    assert (total, [t.text for t in traces]) == (4, ["<answer>2.00 to 11.00</answer>"])
    assert (rejected["no readable answer"], rejected["the same text again"]) == (2, 1)
    assert parse_response(traces[0].text, is_direct=True).faults == ()


def test_selection_counts_everything():
    good, better, bad = text_of((2, 9), (2, 11)), text_of((2, 9), (2, 12)), "nothing"
    group = RolloutGroup(Prompt(SAMPLE, "p"), tuple(rollout(t) for t in (good, better, bad, good)), 0)
    traces, total, rejected = select([group], FilterConfig())
    assert (total, [t.text for t in traces]) == (4, [better, good])
    assert rejected["the same text again"] == 1 and rejected["reward <= 6.4"] == 1
    traces, _, rejected = select([group], FilterConfig(max_per_query=1))
    assert [t.text for t in traces] == [better]
    assert rejected["more than 1 per query"] == 1
