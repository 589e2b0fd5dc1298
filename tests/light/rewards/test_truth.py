"""`reward.truth` with one, two and three windows, by hand."""

from pathlib import Path

import pytest

from tartvg.config import AnchorsConfig, IouKind, RewardConfig, Truth
from tartvg.rewards import Rubric
from tartvg.rewards.truth import truth_of
from tartvg.types import GroundingSample, Response, RewardBreakdown, Span

WINDOWS = (Span(10, 20), Span(40, 60), Span(70, 80))


def judged(rule: Truth, num_windows: int, *anchors: Span, iou: IouKind = IouKind.soft) -> RewardBreakdown:
    """The reward of a response whose answer is its last anchor."""
    response = Response(anchors, anchors[-1], ())
    return Rubric(RewardConfig(truth=rule, iou=iou), AnchorsConfig()).score(response, sample(num_windows))


def sample(num_windows: int) -> GroundingSample:
    return GroundingSample("q", Path("v.mp4"), "a door opens", WINDOWS[:num_windows], 100.0, "train")


INSIDE, BETWEEN = Span(45, 55), Span(25, 35)


@pytest.mark.parametrize(
    ("rule", "num_windows", "inside", "between"),
    [
        # one window: 25 s of 45 lie between it and the answer, 5 of 25
        *((rule, 1, -25 / 45, -5 / 25) for rule in Truth),
        (Truth.first, 2, -25 / 45, -5 / 25),
        (Truth.first, 3, -25 / 45, -5 / 25),
        # the second one holds the answer; of two that are 5 s away the longer has the longer hull, 5 of 35
        (Truth.best, 2, 10 / 20, -5 / 35),
        (Truth.best, 3, 10 / 20, -5 / 35),
        # the answer is 10 s of 30 or of 40; the gap is 5 s beside 10 + 30 or 10 + 40 covered ones
        (Truth.all, 2, 10 / 30, -5 / 45),
        (Truth.all, 3, 10 / 40, -5 / 55),
    ],
)
def test_answers_by_hand(rule: Truth, num_windows: int, inside: float, between: float) -> None:
    assert judged(rule, num_windows, INSIDE).terms["iou"] == pytest.approx(inside)
    assert judged(rule, num_windows, BETWEEN).terms["iou"] == pytest.approx(between)
    hard = judged(rule, num_windows, INSIDE, iou=IouKind.hard), judged(rule, num_windows, BETWEEN, iou=IouKind.hard)
    assert [each.terms["iou"] for each in hard] == pytest.approx([max(0.0, inside), 0])


def test_anchors_are_compared_with_the_window_of_the_answer() -> None:
    anchors = Span(10, 20), Span(42, 60)
    first, best, union = (judged(rule, 2, *anchors) for rule in Truth)
    assert first.anchor_ious == pytest.approx((1, -22 / 50)) and first.terms["tar3"] == -1
    # each anchor against its own best window would be 1 and 0.9, which is no refinement
    assert best.anchor_ious == pytest.approx((-20 / 50, 18 / 20)) and best.terms["tar3"] == 1
    assert best.terms["tar1"] == pytest.approx(-0.4 + 2 * 0.9)
    assert union.anchor_ious == pytest.approx((10 / 30, 18 / 30)) and union.terms["tar3"] == 1


def test_ties_go_to_the_earlier_window() -> None:
    halfway = Response((), Span(20, 40), ())  # touches both
    assert truth_of(halfway, sample(3), Truth.best) == (WINDOWS[0],)


def test_without_an_answer_the_last_anchor_chooses() -> None:
    assert truth_of(Response((Span(10, 20), INSIDE), None, ()), sample(3), Truth.best) == (WINDOWS[1],)
    assert truth_of(Response((), None, ()), sample(3), Truth.best) == (WINDOWS[0],)


def test_the_usual_iou_chooses_the_nearest_of_windows_that_it_cannot_tell_apart() -> None:
    near_the_last = Response((), Span(85, 90), ())
    rubric = Rubric(RewardConfig(truth=Truth.best, iou=IouKind.hard), AnchorsConfig())
    assert rubric.score(near_the_last, sample(3)).terms["iou"] == 0
    assert truth_of(near_the_last, sample(3), Truth.best) == (WINDOWS[2],)


def test_the_default_is_best() -> None:
    assert RewardConfig().truth is Truth.best
