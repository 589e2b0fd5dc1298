"""What is written can be read back, whatever the text holds, and half a line is never taken for a whole one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartvg import records
from tartvg.types import (
    Completion,
    Fault,
    GroundingSample,
    Prediction,
    Prompt,
    Response,
    RewardBreakdown,
    Rollout,
    RolloutGroup,
    Span,
    Trace,
)

TERMS = {"format": 0.0, "iou": -1.0, "tar1": 0.5, "tar2": 1.0, "tar3": 0.0}
SAMPLE = GroundingSample("a_0", Path("v/a.mp4"), "q", (Span(1.0, 2.5),), 9.0, "train", ("turns",))


def group(text):
    completion = Completion(text, (1, 2), (-0.5, -0.25), True)
    response = Response((Span(0.0, 1.0),), None, (Fault.NO_ANSWER,), text)
    reward = RewardBreakdown(-1.0, TERMS, (0.5,))
    return RolloutGroup(Prompt(SAMPLE, "p"), (Rollout(completion, response, reward),) * 2, 3)


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_survives(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("r") / "x.jsonl"
    records.append_jsonl(path, [group(text)])
    assert [records.group_from_json(row) for row in records.read_jsonl(path)] == [group(text)]


def test_rewards_of_older_files_have_their_terms_beside_the_total():
    new = records.to_json(group("x"))
    old = records.to_json(group("x"))
    for rollout in old["rollouts"]:
        rollout["reward"] = {"total": -1.0, **TERMS, "anchor_ious": [0.5]}
    assert new["rollouts"][0]["reward"] == {"total": -1.0, "terms": TERMS, "anchor_ious": [0.5]}
    assert records.group_from_json(old) == records.group_from_json(new) == group("x")


def test_traces_and_predictions_survive(tmp_path):
    trace = Trace("a_0", "t", 7.5, (0.5, 0.75))
    answer = Prediction(
        "a_0", 1, "q", "a.mp4", (Span(1, 2),), 9.0, "t", (Span(0, 1),), Span(0, 1), ("order",), True, 0.5
    )
    records.write_jsonl(tmp_path / "t", [trace])
    records.write_jsonl(tmp_path / "p", [answer])
    assert [records.trace_from_json(r) for r in records.read_jsonl(tmp_path / "t")] == [trace]
    assert [records.prediction_from_json(r) for r in records.read_jsonl(tmp_path / "p")] == [answer]


def test_half_a_line_is_left_out_or_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert list(records.read_jsonl(path, is_partial_allowed=True)) == [{"a": 1}]
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2"):
        list(records.read_jsonl(path))


def test_not_a_number_is_refused(tmp_path):
    with pytest.raises(ValueError):
        records.write_jsonl(tmp_path / "x", [{"a": float("nan")}])
    assert not (tmp_path / "x").exists()
