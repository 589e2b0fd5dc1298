"""The tables of the format experiments, on completions counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.format_robustness.format_study import (
    by_complexity,
    compliance_table,
    faults_table,
    main,
    progress_table,
)
from tartvg.records import to_json
from tartvg.report.tables import Table
from tartvg.types import Prediction, Span

TRUTH = Span(2.0, 4.0)


def said(name: str, index: int, words: int, anchors: list[Span], answer: Span | None, *faults: str) -> Prediction:
    query = " ".join(["word"] * words)
    return Prediction(name, index, query, f"{name}.mp4", (TRUTH,), 10.0, "...", tuple(anchors), answer, faults,
                      "cut" not in faults)  # fmt: skip


PREDICTIONS = [
    said("a", 0, 3, [], TRUTH),
    said("a", 1, 3, [Span(1, 5), TRUTH], TRUTH),  # soft IoU 0.5, then 1
    said("a", 2, 3, [], None, "no_answer"),
    said("b", 0, 5, [], None),
    said("b", 1, 5, [TRUTH, Span(2, 6), Span(2, 6)], Span(2, 6), "answer_mismatch"),  # 1, 0.5, a tie
    said("c", 0, 9, [], Span(8, 9)),
    said("c", 1, 9, [Span(2, 3)], Span(2, 3)),
]


def column(table: Table, number: int) -> list[str]:
    return [row[number].text for row in table.rows]


def test_classes_hold_about_as_many_queries() -> None:
    classes = by_complexity(PREDICTIONS)
    assert {name: {p.sample_id for p in part} for name, part in classes.items()} == {
        "3 to 4 words": {"a"}, "5 to 8 words": {"b"}, "9 words": {"c"}, "all": {"a", "b", "c"}
    }  # fmt: skip
    assert list(by_complexity(PREDICTIONS[:3])) == ["3 words", "all"]
    many = [said(str(i), 0, 4 + i % 2, [], None) for i in range(30)]
    assert {name: len(part) for name, part in by_complexity(many).items()} == {"4 words": 15, "5 words": 15, "all": 30}


def test_compliance() -> None:
    table = compliance_table(PREDICTIONS)
    assert column(table, 1) == ["1", "1", "1", "3"] and column(table, 2) == ["2", "1", "1", "4"]
    assert column(table, 3) == ["50.0", "0.0", "100.0", "50.0"]  # without a fault
    assert column(table, 4) == ["50.0", "0.0", "0.0", "25.0"]  # and with two anchors
    assert column(table, 5) == ["1.00", "3.00", "1.00", "1.50"]
    assert column(table, 6) == ["100.0", "0.0", "0.0", "33.3"]
    three = [*PREDICTIONS, said("c", 2, 9, [TRUTH, TRUTH, TRUTH], TRUTH)]
    assert column(compliance_table(three), 4) == ["50.0", "0.0", "50.0", "40.0"]
    assert column(compliance_table(three, 2), 4) == ["50.0", "0.0", "0.0", "20.0"]


def test_progress() -> None:
    table = progress_table(PREDICTIONS)
    assert column(table, 1) == ["1", "1", "0", "2"]
    assert column(table, 2) == ["0.500", "1.000", "–", "0.750"]  # noqa: RUF001
    assert column(table, 3)[0] == "1.000" and column(table, 3)[1] == "0.500"
    assert column(table, 5)[-1] == "0.750"
    assert column(table, 6) == ["100.0", "0.0", "–", "33.3"]  # noqa: RUF001


def test_faults() -> None:
    table = faults_table(PREDICTIONS)
    assert table.columns == ("fault", "3 to 4 words", "5 to 8 words", "9 words", "all")
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["no_answer"] == ["50.0", "0.0", "0.0", "25.0"]
    assert rows["answer_mismatch"] == ["0.0", "100.0", "0.0", "25.0"]
    assert rows["(ran into the length limit)"] == ["0.0"] * 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main([str(tmp_path)]) == 2
    assert "run stage=evaluate first" in capsys.readouterr().err
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(to_json(p)) + "\n" for p in PREDICTIONS))
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n| all | ") == 2 and "**Failure modes**" in shown and "without a cap" in shown


def test_the_command_counts_with_the_cap_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three anchors where two are the most are not valid, as stage=evaluate has it."""
    predictions = [said("a", 0, 3, [TRUTH, TRUTH, TRUTH], TRUTH)]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(to_json(p)) + "\n" for p in predictions))
    for cap, share in ((2, "0.0 [0.0, 0.0]"), (3, "100.0 [100.0, 100.0]")):
        (tmp_path / "config.yaml").write_text(f"anchors: {{count: 2, max_count: {cap}}}\n")
        assert main([str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert f"| all | 1 | 1 | 100.0 [100.0, 100.0] | {share} |" in shown and f"Valid: at most {cap} anchors" in shown
