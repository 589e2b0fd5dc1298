"""The reward's own optimum over the number of anchors, against numbers worked out by hand."""

import pytest

from experiments.reward_landscape.landscape import (
    MOST,
    TRUTH,
    answer_text,
    landscape_rows,
    optimum,
    optimum_rows,
    totals,
)
from tartvg.config import AnchorsConfig, CountPenalty, RewardConfig
from tartvg.response import parse_response
from tartvg.spans import soft_iou


def test_the_literal_formula_by_hand() -> None:
    """3 + 1 + N(N+1)/2 - 5|N-2| + (N-1) for near-perfect anchors; an answer without any loses the format, too."""
    values = totals(RewardConfig(), AnchorsConfig(count=2, max_count=MOST), 1.0)
    assert values == pytest.approx([-9, 0, 8, 7, 7, 8, 10, 13, 17, 22, 28], abs=0.01)
    squared = totals(RewardConfig(tar2_form=CountPenalty.squared), AnchorsConfig(count=2, max_count=MOST), 1.0)
    assert squared[4] == pytest.approx(3 + 1 + 10 - 5 * 4 + 3, abs=0.01)
    half = totals(RewardConfig(), AnchorsConfig(count=2, max_count=3), 0.5)
    assert half[2] == pytest.approx(3 + 0.5 + 1.5 + 1, abs=0.01)
    assert half[4] == pytest.approx(0 + 0.5 + 0.5 * 6 - 5 * 2 + 2, abs=0.01)  # above the cap: no format, three are paid


def test_answers_are_well_formed_and_refine_every_time() -> None:
    for quality in (0.2, 1.0):
        response = parse_response(answer_text(4, quality))
        ious = [soft_iou(a, TRUTH) for a in response.anchors]
        assert response.faults == () and len(ious) == 4
        assert ious == sorted(ious) and len(set(ious)) == 4 and ious[-1] == pytest.approx(quality)


def test_only_the_squared_form_or_a_cap_keeps_the_target_best() -> None:
    best = {(row[0], row[1], row[2]): row[3:] for row in optimum_rows()}
    for (target, form, cap), numbers in best.items():
        if cap != "none" or form == "squared":
            assert set(numbers) == {target}
        elif form == "indicator":
            assert set(numbers) == {str(MOST)}
    assert best["2", "abs", "none"] == ["2", "2", "2", "10", "10"]
    assert [row[-1] for row in landscape_rows(is_capped=True)] == ["1"] * 3 + ["2"] * 3 + ["3"] * 3


def test_of_equal_totals_the_fewest_anchors_win() -> None:
    assert optimum([1.0, 2.0, 2.001]) == 1
