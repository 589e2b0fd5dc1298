"""What the page of the rollouts is made of: steps that fit, pieces of text with their advantages, disagreement."""

import json
from pathlib import Path

import pytest
from helpers.report import rollout_group

from tartvg.records import append_jsonl, write_jsonl
from tartvg.report import rollout_steps
from tartvg.report.cards import MAX_CHARACTERS
from tartvg.report.rollout_steps import choose_steps, disagreements, group_json, parts_of
from tartvg.types import GroundingSample, RolloutGroup, Span

SAMPLE = GroundingSample("a", Path("/somewhere/v.mp4"), "the <b>square</b>", (Span(1.0, 4.0),), 8.0, "train")
FIRST, SECOND = "<timestamp>0.00 to 4.00</timestamp>", "<timestamp>1.00 to 4.00</timestamp>"
TEXT = f"<think>See {FIRST}, no, {SECOND}.</think><answer>1.00 to 4.00</answer>"


def ones(group: RolloutGroup) -> list[list[float]]:
    return [[1.0, 2.0, 3.0] for _ in group.rollouts]


@pytest.mark.parametrize("num_steps", [1, 2, 37, 64])
def test_steps_are_left_out_evenly_until_the_page_holds_them(
    tmp_path: Path, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_jsonl(path, [rollout_group(SAMPLE, step) for step in range(num_steps) for _ in range(2)])
    with path.open("a") as file:
        file.write('{"half')
    (whole, *_) = choose_steps(path, ones).texts
    assert len(choose_steps(path, ones).texts) == num_steps
    monkeypatch.setattr(rollout_steps, "MAX_STEP_BYTES", len(whole) + 10)
    found = choose_steps(path, ones, max_bytes=10 * len(whole))
    steps = [json.loads(text)["step"] for text in found.texts]
    assert found.num_steps == num_steps and sum(map(len, found.texts)) <= 10 * len(whole)
    assert steps == {1: [0], 2: [0, 1], 37: [0, 8, 16, 24, 32, 36], 64: [0, 8, 16, 24, 32, 40, 48, 56, 63]}[num_steps]
    assert [len(json.loads(text)["groups"]) for text in found.texts] == [2] * len(steps)


def test_queries_of_a_step_that_is_too_large_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "r.jsonl", [rollout_group(SAMPLE, 3) for _ in range(5)])
    monkeypatch.setattr(rollout_steps, "MAX_STEP_BYTES", 1)
    step = json.loads(choose_steps(tmp_path / "r.jsonl", None).texts[0])
    assert (step["step"], step["of"], len(step["groups"])) == (3, 5, 1)
    append_jsonl(tmp_path / "none.jsonl", [])
    assert choose_steps(tmp_path / "none.jsonl", None).texts == ()


def test_a_text_is_cut_where_the_advantage_changes() -> None:
    assert parts_of(TEXT, None) == [(TEXT, None)]
    assert parts_of(TEXT, [0.5]) == [(TEXT, 0.5)]
    rest = ".</think><answer>1.00 to 4.00</answer>"
    assert parts_of(TEXT, [1, 2, 3]) == [(f"<think>See {FIRST}", 1), (f", no, {SECOND}", 2), (rest, 3)]
    assert parts_of(TEXT, [1, 3]) == [(f"<think>See {FIRST}", 1), (f", no, {SECOND}{rest}", 3)]
    assert parts_of("<think>nothing", [1, 2, 3]) == [("<think>nothing", 3)]
    assert parts_of("", [1, 2, 3]) == []


def test_disagreement_is_one_minus_the_mean_overlap_with_the_others() -> None:
    answers = [Span(0, 4), Span(0, 4), Span(2, 6), None]
    third = 1 / 3  # [0, 4] and [2, 6]: 2 of 6 seconds
    assert disagreements(answers) == pytest.approx([1 - (1 + third) / 3, 1 - (1 + third) / 3, 1 - 2 * third / 3, 1.0])
    assert disagreements([Span(0, 1)]) == [0.0] and disagreements([None, None]) == [1.0, 1.0]


def test_a_group_says_what_a_reader_needs_and_not_where_files_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    group = rollout_group(SAMPLE, 0)
    value = group_json(group, ones)
    assert (value["query"], value["video"], value["duration"]) == (SAMPLE.query, "v.mp4", 8.0)
    best = value["rollouts"][0]
    assert (best["number"], best["total"], best["answer_iou"], best["disagreement"]) == (1, 7.25, 1.0, 1.0)
    assert [part[1] for part in best["parts"]] == [1.0, 2.0, 3.0] and best["more"] == 0
    monkeypatch.setattr(rollout_steps, "MAX_CHARACTERS", 50)
    cut = group_json(group, ones)["rollouts"][0]
    whole = group.rollouts[0].completion.text
    assert "".join(text for text, _ in cut["parts"]) == whole[:50] and cut["more"] == len(whole) - 50
    assert len(whole) < MAX_CHARACTERS
