"""Tables of a mix and of a selection by difficulty, from files written by hand."""

import json
from pathlib import Path

from tartvg.evaluation.score import ScoringRules, score, scorecard_to_json
from tartvg.report.difficulty import difficulty_tables
from tartvg.report.sources import source_tables
from tartvg.types import GroundingSample, Prediction, Span


def card(*ends: float) -> dict[str, object]:
    """Scores of answers 0 to `end`, where 0 to 10 is right."""
    samples = [GroundingSample(str(i), Path("v"), "q", (Span(0, 10),), 20, "test") for i in range(len(ends))]
    said = [
        Prediction(str(i), 0, "q", "v", (Span(0, 10),), 20, "", (), Span(0, end), (), True)
        for i, end in enumerate(ends)
    ]
    return scorecard_to_json(score(samples, said), ScoringRules())


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(value))


def test_scores_and_rewards_of_each_source(tmp_path: Path) -> None:
    parts = {"a": card(10), "b": card(5, 4)}
    write(tmp_path / "evaluate/base/scores.json", {**card(10, 5, 4), "by_source": parts})
    write(tmp_path / "evaluate/grpo1/scores.json", card(10))  # of a run without a mix
    lines: list[dict[str, float | None]] = [
        {"progress/step": step, "group/b/count": 2, "reward/b/total_mean": step, "reward/b/format_mean": 0.5}
        for step in range(20)
    ]
    lines[3] |= {"group/a/count": 10, "reward/a/total_mean": -1, "reward/a/format_mean": 0.0}
    scores, rewards = source_tables(tmp_path, {"grpo1": lines, "sft": [{"loss/total": 1.0}]})
    assert [[cell.text for cell in row] for row in scores.rows] == [
        ["base, a", "1", "100.0", "0.0", "100.0", "100.0", "100.0", "100.0"],
        ["base, b", "2", "100.0", "0.0", "45.0", "100.0", "50.0", "0.0"],
    ]
    assert [[cell.text for cell in row] for row in rewards.rows] == [
        ["grpo1, a", "10", "20.0 %", "-1.00 → -1.00", "0.0 → 0.0"],
        ["grpo1, b", "40", "80.0 %", "4.50 → 14.50", "50.0 → 50.0"],
    ]
    assert source_tables(tmp_path / "grpo1", {"sft": lines[:0]}) == []


def test_the_histogram_of_a_selection(tmp_path: Path) -> None:
    found = {"rule": "r", "num_queries": 9, "num_kept": 2, "num_unmeasured": 1, "edges": [0.0, 0.5, 1.0]}
    write(tmp_path / "grpo1/difficulty.json", {**found, "measured": [6, 2], "kept": [0, 2]})
    (table,) = difficulty_tables(tmp_path)
    assert [[(cell.text, cell.share) for cell in row[1:]] for row in table.rows] == [
        [("6", 1.0), ("0", 0.0)],
        [("2", 2 / 6), ("2", 2 / 6)],
    ]
    assert [row[0].text for row in table.rows] == ["0.00 to 0.50", "0.50 to 1.00"]
    assert "2 of 9" in table.note and "1." in table.note
