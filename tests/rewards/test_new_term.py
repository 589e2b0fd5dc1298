"""A new reward term takes a function, a row and a weight: here added at run time and followed to the report page."""

import json
import re
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import pytest

from tartvg import rewards
from tartvg.config import AnchorsConfig, RewardConfig, SettingError, TrackingConfig, TrackingMode
from tartvg.config.fields import setting
from tartvg.grpo import rollout_metrics
from tartvg.records import append_jsonl, group_from_json, read_jsonl
from tartvg.report.page import build_report
from tartvg.response import parse_response
from tartvg.rewards import Rubric, ScoredResponse, Term
from tartvg.tracking import Tracker
from tartvg.tracking.dashboard import workspace
from tartvg.tracking.tables import example_columns, example_rows
from tartvg.types import Completion, GroundingSample, Prompt, Rollout, RolloutGroup, Span


@dataclass
class WithNarrowing(RewardConfig, path="reward"):
    """What one line in `RewardConfig` would be."""

    narrowing_weight: float = setting(0.25, at_least=0, below=inf)


def narrowing_rewards(scored: ScoredResponse) -> list[float]:
    """Return 1 for each anchor that lies within the one before, else 0."""
    anchors = scored.response.anchors
    return [
        float(i > 0 and anchors[i - 1].start <= a.start and a.end <= anchors[i - 1].end) for i, a in enumerate(anchors)
    ]


SAMPLE = GroundingSample("q0", Path("v.mp4"), "a person opens a door", (Span(0, 10),), 20.0, "train")
NARROWED = "<think><timestamp>0 to 15</timestamp><timestamp>0 to 10</timestamp></think><answer>0 to 10</answer>"
WIDENED = "<think><timestamp>0 to 5</timestamp><timestamp>0 to 10</timestamp></think><answer>0 to 10</answer>"
FOUR = NARROWED.replace("<think>", "<think><timestamp>0 to 19</timestamp><timestamp>0 to 17</timestamp>")


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Term:
    term = Term("narrowing", "narrowed anchors", "narrowing_weight", narrowing_rewards)
    monkeypatch.setattr(rewards.rubric, "TERMS", (*rewards.rubric.TERMS, term))
    return term


def group(*texts: str) -> RolloutGroup:
    rubric = Rubric(WithNarrowing(), AnchorsConfig())
    responses = [parse_response(text) for text in texts]
    rollouts = [
        Rollout(Completion(text, (1,), (-1.0,), True), response, rubric.score(response, SAMPLE))
        for text, response in zip(texts, responses, strict=True)
    ]
    return RolloutGroup(Prompt(SAMPLE, "?"), tuple(rollouts), 0)


def test_it_is_in_the_total_the_metrics_the_table_and_on_the_page(row: Term, tmp_path: Path) -> None:
    found = group(NARROWED, WIDENED)
    narrowed, widened = (r.reward for r in found.rollouts)
    assert narrowed.total == pytest.approx(3 + 1 + (10 / 15 + 2) + 1 + 0.25)
    assert widened.total == pytest.approx(3 + 1 + (5 / 10 + 2) + 1)
    assert (narrowed.terms["narrowing"], widened.terms["narrowing"]) == (1.0, 0.0)

    stage = tmp_path / "r" / "grpo1"
    with Tracker(stage, TrackingConfig(mode=TrackingMode.off), "r", "grpo1", {}, seed=0) as tracker:
        tracker.log(rollout_metrics([found], 2), step=0)
        tracker.examples([found], step=0)
    append_jsonl(stage / "rollouts.jsonl", [found])
    (line,) = (json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines())
    assert line["reward/narrowing_mean"] == 0.5
    assert [group_from_json(value) for value in read_jsonl(stage / "rollouts.jsonl")] == [found]

    column = example_columns().index("narrowing")
    assert [r[column] for r in example_rows([found], step=0, num=1)] == [1.0, 0.0]
    assert "reward/narrowing_mean" in workspace("planted").metrics

    page = build_report(tmp_path / "r", {}, tmp_path / "report.html").read_text("utf-8")
    assert re.findall(r"<dt>narrowed anchors</dt><dd>(.*?)</dd>", page) == ["1.00", "0.00"]


def test_its_weight_has_a_range_and_only_a_row_pays_surplus_anchors(row: Term, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"reward\.narrowing_weight"):
        WithNarrowing(narrowing_weight=-1.0)
    response = parse_response(FOUR)
    assert Rubric(WithNarrowing(), AnchorsConfig()).raw_terms(response, SAMPLE)["narrowing"] == [0, 1, 1]
    paid = replace(row, is_paid_above_cap=True, is_cost=True)
    assert paid.signed_weight(WithNarrowing()) == -0.25
    monkeypatch.setattr(rewards.rubric, "TERMS", (*rewards.rubric.TERMS[:-1], paid))
    assert Rubric(WithNarrowing(), AnchorsConfig()).score(response, SAMPLE).terms["narrowing"] == 3


def test_with_weight_0_every_total_stays_what_it_was(row: Term, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = [parse_response(text) for text in (NARROWED, WIDENED, FOUR, "nothing")]
    silent = Rubric(WithNarrowing(narrowing_weight=0.0), AnchorsConfig())
    with_row = [silent.score(response, SAMPLE).total for response in responses]
    monkeypatch.setattr(rewards.rubric, "TERMS", rewards.rubric.TERMS[:-1])
    assert with_row == [silent.score(response, SAMPLE).total for response in responses]
