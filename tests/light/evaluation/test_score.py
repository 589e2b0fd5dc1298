from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tartvg.evaluation.score import (
    RENAMED,
    RULES,
    ScoringRules,
    answer_iou,
    paired_p_value,
    score,
    scorecard_from_json,
    scorecard_to_json,
)
from tartvg.records import to_json
from tartvg.response import parse_response
from tartvg.types import GroundingSample, Prediction, Span


def sample(name: str, *windows: tuple[float, float], video: str | None = None) -> GroundingSample:
    spans = tuple(Span(*w) for w in windows or [(0.0, 10.0)])
    return GroundingSample(name, Path(video or f"{name}.mp4"), "a query", spans, 60.0, "test")


def prediction(
    name: str,
    answer: tuple[float, float] | None,
    index: int = 0,
    anchors: tuple[tuple[float, float], ...] = (),
    faults: tuple[str, ...] = (),
) -> Prediction:
    return Prediction(
        sample_id=name,
        sample_index=index,
        query="a query",
        video=f"{name}.mp4",
        windows=(),
        duration=60.0,
        text="",
        anchors=tuple(Span(*a) for a in anchors),
        answer=None if answer is None else Span(*answer),
        faults=faults,
        is_finished=True,
    )


def test_miou_and_recall_by_hand() -> None:
    samples = [sample(name) for name in "abcd"]
    predictions = [
        prediction("a", (0, 10)),  # IoU 1
        prediction("b", (0, 5)),  # IoU 0.5, exactly on a threshold
        prediction("c", (5, 15)),  # IoU 5 / 15
        prediction("d", (20, 30)),  # IoU 0: mIoU uses the hard IoU, never a negative one
    ]
    card = score(samples, predictions)
    assert card.num_queries == 4
    assert card.miou.value == pytest.approx((1 + 0.5 + 1 / 3) / 4)
    assert {t: e.value for t, e in card.recall.items()} == {0.3: 0.75, 0.5: 0.5, 0.7: 0.25}
    assert (card.num_unparsed, card.num_missing) == (0, 0)


def test_the_first_and_the_last_anchor_of_greedy_answers() -> None:
    samples = [sample(name) for name in "abcdef"]
    predictions = [
        prediction("a", (0, 10), anchors=((0, 5), (0, 10))),  # refined
        prediction("b", (0, 5), anchors=((0, 8), (0, 5))),  # made worse
        prediction("c", (0, 10), anchors=((0, 10), (0, 10))),  # exact at once, and said twice
        prediction("d", (0, 4), anchors=((0, 4),)),  # a single one
        prediction("e", (0, 10)),  # none
        prediction("f", (0, 10), anchors=((0, 10), (0, 9))),  # exact at once
        prediction("f", (0, 1), index=1, anchors=((0, 1), (0, 1))),  # sampled: not asked
    ]
    card = score(samples, predictions)
    assert card.first_iou == pytest.approx((0.5 + 0.8 + 1 + 0.4 + 1) / 5)
    assert card.last_iou == pytest.approx((1 + 0.5 + 1 + 0.4 + 0.9) / 5)
    assert (card.equal_rate, card.first_exact_rate) == (1 / 4, 1 / 2)
    assert (card.inexact_refined_rate, card.inexact_worsened_rate) == (1 / 2, 1 / 2)


def test_strict_thresholds_leave_out_equality() -> None:
    samples, predictions = [sample("a"), sample("b")], [prediction("a", (0, 5)), prediction("b", (0, 10))]
    assert score(samples, predictions).recall[0.5].value == 1.0
    assert score(samples, predictions, strict=True).recall[0.5].value == 0.5
    assert list(score(samples, predictions, thresholds=(0.1, 0.9)).recall) == [0.1, 0.9]


def test_unparsed_and_missing_stay_in_the_denominator() -> None:
    card = score([sample(name) for name in "abc"], [prediction("a", (0, 10)), prediction("b", None)])
    assert (card.num_queries, card.num_unparsed, card.num_missing) == (3, 1, 1)
    assert card.miou.value == pytest.approx(1 / 3)
    assert card.recall[0.7].value == pytest.approx(1 / 3)


def test_a_query_with_samples_but_no_greedy_answer_is_missing() -> None:
    card = score([sample("a")], [prediction("a", (0, 10), index=1)])
    assert (card.num_missing, card.miou.value, card.oracle_iou) == (1, 0.0, 1.0)


def test_rules_for_several_windows() -> None:
    windows = (Span(0, 4), Span(10, 20))
    answer = Span(10, 18)
    assert answer_iou(answer, windows, "best") == pytest.approx(8 / 10)
    assert answer_iou(answer, windows, "first") == 0.0
    assert answer_iou(answer, windows, "union") == pytest.approx(8 / 14)
    values = {r: score([sample("a", *windows)], [prediction("a", answer)], rule=r).miou.value for r in RULES}
    assert values == pytest.approx({"best": 0.8, "first": 0.0, "union": 8 / 14})
    with pytest.raises(ValueError, match="rule"):
        score([sample("a")], [], rule="median")  # type: ignore[arg-type]


def test_format_figures_describe_the_sampled_completions() -> None:
    good = ((0.0, 20.0), (0.0, 12.0))
    predictions = [
        prediction("a", (0, 10), faults=("stray_text",)),  # greedy: not counted
        prediction("a", (0, 12), 1, good),  # valid, refined, consistent
        prediction("a", (0, 12), 2, ((0, 12),)),  # right format, one anchor
        prediction("a", (0, 9), 3, (*good, (30, 40), (0, 9)), ("stray_text",)),  # +, -, + ; consistent
        prediction("a", (0, 5), 4, ()),  # an answer without an anchor is not consistent
        prediction("a", None, 5, good, ("no_answer",)),  # refined; says nothing about consistency
    ]
    card = score([sample("a")], predictions)
    assert card.format_rate.value == pytest.approx(3 / 5)
    assert card.valid_rate.value == pytest.approx(1 / 5)
    assert card.count_mean == pytest.approx((2 + 1 + 4 + 0 + 2) / 5)
    assert card.anchored_rate == pytest.approx(4 / 5)
    assert card.refinement_rate == pytest.approx(4 / 5)
    assert card.answer_match_rate == pytest.approx(3 / 4)
    assert card.oracle_iou == pytest.approx(9 / 10)
    assert card.miou.value == 1.0


def test_an_answer_is_the_last_anchor_where_the_parser_says_so() -> None:
    """Half a unit of the last digit apart, they are the same to the format; so they are here."""

    def said(answer: str) -> Prediction:
        text = f"<think><timestamp>13.10 to 16.90</timestamp></think><answer>{answer}</answer>"
        response = parse_response(text)
        faults = tuple(fault.value for fault in response.faults)
        assert response.answer is not None
        return prediction("a", response.answer, 0, response.anchors, faults)

    found = [score([sample("a")], [said(answer)]) for answer in ("13.10 to 16.90", "13.105 to 16.9", "13.11 to 16.90")]
    assert [card.answer_match_rate for card in found] == [1.0, 1.0, 0.0]
    assert [card.format_rate.value for card in found] == [1.0, 1.0, 0.0]


def test_more_anchors_than_the_cap_are_not_valid() -> None:
    predictions = [prediction("a", (0, 5), anchors=((0, 20), (0, 15), (0, 12), (0, 5)))]
    assert score([sample("a")], predictions).valid_rate.value == 1.0
    capped = score([sample("a")], predictions, max_anchors=3)
    assert (capped.valid_rate.value, capped.format_rate.value) == (0.0, 1.0)


def test_without_samples_the_greedy_answers_describe_the_format() -> None:
    card = score([sample("a")], [prediction("a", (0, 5), anchors=((0, 20), (0, 5)))])
    assert (card.valid_rate.value, card.count_mean, card.oracle_iou) == (1.0, 2.0, 0.5)


def test_a_tie_is_no_refinement_and_the_best_window_counts() -> None:
    two = sample("a", (0, 10), (40, 50))
    tie = score([two], [prediction("a", (0, 5), anchors=((0, 5), (5, 10)))])
    assert tie.refinement_rate == 0.0
    second = score([two], [prediction("a", (41, 50), anchors=((38, 50), (41, 50)))])
    assert second.refinement_rate == 1.0


def test_no_predictions_at_all() -> None:
    card = score([sample("a")], [])
    assert (card.num_missing, card.miou.value, card.valid_rate.value, card.answer_match_rate) == (1, 0.0, 0.0, 0.0)


def test_contradictory_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'a', sample_index 2 is there twice"):
        score([sample("a")], [prediction("a", (0, 1), 2), prediction("a", (0, 2), 2)])
    with pytest.raises(ValueError, match="'z'"):
        score([sample("a")], [prediction("z", (0, 1))])
    with pytest.raises(ValueError, match="sample 'a' is there twice"):
        score([sample("a"), sample("a")], [])
    with pytest.raises(ValueError, match="no samples"):
        score([], [])
    blind = GroundingSample("b", Path("b.mp4"), "q", (), 10.0, "test")
    with pytest.raises(ValueError, match="blind"):
        score([blind], [])


def test_intervals_are_seeded_and_ignore_the_order_of_the_annotations() -> None:
    samples = [sample(f"s{i}") for i in range(30)]
    predictions = [prediction(f"s{i}", (0, 1 + i % 10)) for i in range(30)]
    card = score(samples, predictions, seed=3)
    assert card == score(samples, predictions, seed=3)
    assert card.miou == pytest.approx(score(samples[::-1], predictions[::-1], seed=3).miou)
    assert card.miou.low < card.miou.value < card.miou.high
    assert card.miou != score(samples, predictions, seed=4).miou


def test_the_interval_has_the_width_of_the_normal_approximation() -> None:
    num = 400
    samples = [sample(f"s{i}") for i in range(num)]
    predictions = [prediction(f"s{i}", (0, 10) if i % 2 else (20, 30)) for i in range(num)]
    card = score(samples, predictions)
    assert card.miou.value == 0.5
    expected = 1.96 * (0.25 / num) ** 0.5
    assert card.miou.high - 0.5 == pytest.approx(expected, rel=0.15)
    assert 0.5 - card.miou.low == pytest.approx(expected, rel=0.15)


def test_queries_of_one_video_are_resampled_together() -> None:
    num, per_video = 400, 10
    spread = [sample(f"s{i}") for i in range(num)]
    clustered = [sample(f"s{i}", video=f"v{i // per_video}.mp4") for i in range(num)]
    predictions = [prediction(f"s{i}", (0, 10) if (i // per_video) % 2 else (20, 30)) for i in range(num)]
    narrow, wide = score(spread, predictions).miou, score(clustered, predictions).miou
    assert narrow.value == wide.value
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(per_video**0.5, rel=0.2)


def test_one_video_or_no_resamples_has_no_width() -> None:
    one = score([sample("a", video="v.mp4"), sample("b", video="v.mp4")], [prediction("a", (0, 10))])
    assert one.miou == (0.5, 0.5, 0.5)
    none = score([sample("a"), sample("b")], [prediction("a", (0, 10))], resamples=0)
    assert none.miou == (0.5, 0.5, 0.5)


def test_paired_p_value() -> None:
    samples = [sample(f"s{i}", video=f"v{i // 2}.mp4") for i in range(40)]
    worse = [prediction(f"s{i}", (0, 4)) for i in range(40)]
    better = [prediction(f"s{i}", (0, 8)) for i in range(40)]
    mixed = [prediction(f"s{i}", (0, 8) if (i // 2) % 2 else (0, 2)) for i in range(40)]
    assert paired_p_value(samples, worse, worse) == 1.0
    assert paired_p_value(samples, worse, better) < 0.001
    assert paired_p_value(samples, worse, better) == paired_p_value(samples, better, worse)
    assert paired_p_value(samples, worse, mixed) > 0.05


def test_p_value_equals_the_exact_permutation_distribution() -> None:
    # Five videos that all improve: 2 of the 2^5 sign patterns are as extreme.
    samples = [sample(f"s{i}") for i in range(5)]
    p = paired_p_value(samples, [], [prediction(f"s{i}", (0, i + 1)) for i in range(5)], permutations=40_000)
    assert p == pytest.approx(2 / 32, abs=0.005)


def test_a_scorecard_survives_json() -> None:
    card = score([sample("a"), sample("b")], [prediction("a", (0, 10)), prediction("b", None, 1)])
    assert scorecard_from_json(json.loads(json.dumps(to_json(card)))) == card


def test_an_estimate_in_json_says_what_its_numbers_are() -> None:
    card = score([sample("a"), sample("b")], [prediction("a", (0, 10))])
    stored = json.loads(json.dumps(to_json(card)))
    assert set(stored["miou"]) == set(stored["recall"]["0.5"]) == {"value", "low", "high"}
    assert stored["miou"]["low"] <= stored["miou"]["value"] <= stored["miou"]["high"]
    older = {
        name: list(value.values()) if isinstance(value, dict) and "low" in value else value
        for name, value in stored.items()
    }
    older["recall"] = {bound: list(value.values()) for bound, value in stored["recall"].items()}
    assert scorecard_from_json(older) == scorecard_from_json(stored) == card


def test_a_scorecard_on_disk_names_its_rules() -> None:
    card = score([sample("a"), sample("b")], [prediction("a", (0, 10))], rule="union", strict=True)
    rules = ScoringRules("union", is_strict=True, is_clipped=False)
    stored = json.loads(json.dumps(scorecard_to_json(card, rules)))
    assert {name: stored[name] for name in asdict(rules)} == {
        "rule": "union", "is_strict": True, "is_clipped": False
    }  # fmt: skip
    assert scorecard_from_json(stored) == card
    older = {name: value for name, value in stored.items() if name not in (*asdict(rules), "oracle_iou")}
    assert scorecard_from_json(older).miou == card.miou


def test_older_names_of_a_scorecard_are_read() -> None:
    card = score([sample("a")], [prediction("a", (0, 10))])
    old = {{new: old for old, new in RENAMED.items()}.get(name, name): value for name, value in to_json(card).items()}
    assert {"anchors_mean", "consistency_rate"} <= old.keys()
    assert scorecard_from_json(json.loads(json.dumps(old))) == card


def test_scoring_needs_no_torch() -> None:
    code = "import sys, tartvg.evaluation.score; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
