import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartvg.spans import (
    clip,
    intersection,
    iou,
    iou_with_union,
    is_same,
    refinement,
    soft_iou,
    soft_iou_with_union,
    union,
)
from tartvg.types import Span

times = st.floats(0, 1000, allow_nan=False).map(lambda x: round(x, 3))
valid_spans = st.tuples(times, times).filter(lambda p: p[0] < p[1]).map(lambda p: Span(*p))
any_spans = st.tuples(times, times).map(lambda p: Span(*p))


def box_giou(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and generalised IoU of (n, 4) boxes x1, y1, x2, y2: IoU - (hull - union) / hull (Rezatofighi et al. 2019)."""
    width_height = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    overlap = width_height.prod(1)
    areas = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    union_area = areas - overlap
    hull = (np.maximum(a[:, 2:], b[:, 2:]) - np.minimum(a[:, :2], b[:, :2])).prod(1)
    return overlap / union_area, overlap / union_area - (hull - union_area) / hull


def test_worked_example():
    prediction, truth = Span(15.4, 18.0), Span(3.4, 12.2)
    assert soft_iou(prediction, truth) == pytest.approx(-3.2 / 14.6)
    assert round(soft_iou(prediction, truth), 4) == -0.2192
    assert iou(prediction, truth) == 0.0


def test_equals_generalised_iou_of_boxes_on_ten_thousand_pairs():
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 60, (10_000, 2))
    ends = starts + rng.uniform(0.01, 30, (10_000, 2))
    zeros, ones = np.zeros(10_000), np.ones(10_000)
    a = np.stack([starts[:, 0], zeros, ends[:, 0], ones], 1)
    b = np.stack([starts[:, 1], zeros, ends[:, 1], ones], 1)
    expected_iou, expected_giou = box_giou(a, b)
    pairs = [(Span(x[0], x[2]), Span(y[0], y[2])) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert np.allclose([soft_iou(*pair) for pair in pairs], expected_giou, rtol=0, atol=1e-12)
    assert np.allclose([iou(*pair) for pair in pairs], expected_iou, rtol=0, atol=1e-12)
    assert (expected_giou < 0).any() and (expected_giou > 0.9).any()


@given(valid_spans, valid_spans)
def test_soft_iou_of_valid_spans(a: Span, b: Span):
    value = soft_iou(a, b)
    assert -1 < value <= 1
    assert value == soft_iou(b, a)
    assert soft_iou(a, a) == 1
    if intersection(a, b) > 0:
        assert value == pytest.approx(iou(a, b))
    else:
        assert value <= 0 == iou(a, b)


@given(any_spans, any_spans, st.floats(0.1, 10))
def test_any_spans_stay_in_range_and_scale(a: Span, b: Span, factor: float):
    assert -1 <= soft_iou(a, b) <= 1
    assert 0 <= iou(a, b) <= 1
    scaled = [Span(s.start * factor, s.end * factor) for s in (a, b)]
    assert soft_iou(*scaled) == pytest.approx(soft_iou(a, b), abs=1e-6)
    if a.length < 0 or b.length < 0:
        assert soft_iou(a, b) <= 0 == iou(a, b)


def test_instants_have_no_overlap():
    assert soft_iou(Span(3, 3), Span(3, 3)) == 0
    assert iou(Span(3, 3), Span(3, 3)) == 0
    assert iou(Span(3, 3), Span(0, 6)) == 0


def test_moving_away_lowers_soft_iou_but_not_iou():
    truth = Span(10, 20)
    values = [soft_iou(Span(20 + gap, 30 + gap), truth) for gap in (0, 1, 5, 50, 5000)]
    assert values == sorted(values, reverse=True) and values[0] == 0 and values[-1] > -1
    assert iou(Span(21, 31), truth) == iou(Span(5020, 5030), truth) == 0


def test_first_and_last_anchor_beside_the_truth():
    truth = (Span(0, 10), Span(50, 60))
    found = refinement([Span(0, 5), Span(0, 10), Span(0, 8)], truth)
    assert found == (0.5, 0.8, 1.0, False, False, 1)
    assert refinement([Span(0, 8), Span(0, 5)], truth)[-1] == -1
    assert refinement([Span(20, 30), Span(12, 20)], truth) == (0.0, 0.0, 0.0, False, False, 1), "nearer, still disjoint"
    assert refinement([Span(0.004, 9.997)], truth) == pytest.approx((0.9993, 0.9993, 0.9993, True, True, 0))
    assert refinement([Span(50, 60), Span(50, 60.005)], truth)[3:5] == (True, True)
    assert not is_same(Span(0, 10), Span(0, 10.006))


def test_clip():
    assert clip(Span(-2, 5), 10) == Span(0, 5)
    assert clip(Span(8, 12), 10) == Span(8, 10)
    assert clip(Span(11, 12), 10) == Span(10, 10)


def test_union_and_its_iou():
    windows = (Span(5, 7), Span(0, 2), Span(1, 3), Span(9, 8), Span(4, 4))
    assert union(windows) == [Span(0, 3), Span(5, 7)]
    assert iou_with_union(Span(0, 7), windows) == pytest.approx(5 / 7)
    assert iou_with_union(Span(3, 5), windows) == 0
    assert iou_with_union(Span(1, 6), (Span(2, 4),)) == iou(Span(1, 6), Span(2, 4))
    assert iou_with_union(Span(1, 6), ()) == 0


@given(any_spans, st.lists(any_spans, max_size=6))
def test_union_iou_equals_counting_milliseconds(prediction: Span, windows: list[Span]):
    def cells(span: Span) -> np.ndarray:
        grid = np.zeros(1_000_001, dtype=bool)
        grid[round(span.start * 1000) : round(span.end * 1000)] = True
        return grid

    covered = np.any([cells(w) for w in windows], axis=0) if windows else np.zeros(1_000_001, dtype=bool)
    own = cells(prediction)
    total = int((covered | own).sum())
    expected = int((covered & own).sum()) / total if total else 0.0
    assert iou_with_union(prediction, tuple(windows)) == pytest.approx(expected, abs=1e-9)


def test_soft_iou_with_a_union_by_hand():
    windows = (Span(0, 10), Span(30, 50))
    assert soft_iou_with_union(Span(5, 35), windows) == pytest.approx(10 / 50)
    assert soft_iou_with_union(Span(10, 30), windows) == 0  # touches both
    assert soft_iou_with_union(Span(52, 60), windows) == pytest.approx(-2 / (8 + 30 + 2))
    assert soft_iou_with_union(Span(60, 52), windows) == pytest.approx(-2 / 40)
    assert soft_iou_with_union(Span(35, 5), windows) == 0  # reversed: never rewarded
    assert soft_iou_with_union(Span(20, 20), windows) == pytest.approx(-10 / 40)
    assert soft_iou_with_union(Span(1, 2), ()) == 0


@given(any_spans, st.lists(any_spans, min_size=1, max_size=5))
def test_soft_iou_with_a_union(prediction: Span, windows: list[Span]):
    value, overlap = soft_iou_with_union(prediction, tuple(windows)), iou_with_union(prediction, tuple(windows))
    assert -1 <= value <= 1
    assert value == pytest.approx(overlap, abs=1e-12) if overlap else value <= 0
    assert soft_iou_with_union(prediction, (windows[0],)) == soft_iou(prediction, windows[0])
    again = (*windows, *windows)  # counts once
    assert soft_iou_with_union(prediction, again) == value


def test_moving_away_from_a_union_lowers_its_soft_iou():
    windows = (Span(10, 20), Span(40, 60))
    values = [soft_iou_with_union(Span(60 + gap, 70 + gap), windows) for gap in (0, 1, 5, 50, 5000)]
    assert values == sorted(values, reverse=True) and values[0] == 0 and values[-1] > -1
