"""The rules of other works: on a file whose every score is known, on real files, and in the documents."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tartvg.evaluation.cli import main
from tartvg.evaluation.conventions import CONVENTIONS, rounded
from tartvg.evaluation.readings import READINGS
from tartvg.types import Prediction, Span

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("TARTVG_TEST_DATA", "/nowhere"))
needs_data = pytest.mark.skipif("TARTVG_TEST_DATA" not in os.environ, reason="TARTVG_TEST_DATA is not set")


def files(tmp_path: Path) -> list[str]:
    """Four queries: two windows; half of the window exactly; a late window; no prediction."""
    truth = [
        {"windows": [[0, 10], [20, 30]], "said": "Perhaps 0 to 10. <answer>20 to 30</answer>"},
        {"windows": [[0, 10]], "said": "from 0.4 to 5.4 seconds"},
        {"windows": [[30, 50]], "said": "<answer>30.0 to 50.0</answer>"},
        {"windows": [[0, 10]]},
    ]
    rows = [{"video": f"{i}.mp4", "query": "q", "windows": t["windows"], "duration": 40} for i, t in enumerate(truth)]
    said = [{"id": i, "output": t["said"]} for i, t in enumerate(truth) if "said" in t]
    for name, lines in (("test.jsonl", rows), ("said.jsonl", said)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--dataset", "jsonl", "--annotations", f"{tmp_path}/test.jsonl", "--predictions", f"{tmp_path}/said.jsonl"]


# Sum of IoUs and of R1@0.5 over the queries that count, worked out by hand.
BY_HAND = {
    "ours": (1 + 0 + 0.5, 2, 4),  # the late window is cut to [30, 40]; "from 0.4 to 5.4 seconds" is unread
    "moment_detr": (1 + 0 + 1, 2, 4),
    "timechat": (0 + 0 + 1, 1, 3),  # the first window
    "timezero": (0 + 0.5 + 1, 2, 3),
    "time_r1": (0 + 0.5 + 1, 1, 3),  # 0.5 is not above 0.5
    "timelens": (1 + 0.5 + 1, 3, 3),  # the first `A to B`; [0.4, 5.4] becomes [0, 5]
    "omnivtg": (1 + 0.5 + 1, 3, 3),
    "unitime": (0.5 + 0 + 1, 1, 3),  # both windows together
}


def test_every_convention_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = files(tmp_path)
    assert main([*command, "--convention", "all", "--json", str(tmp_path / "all.json")]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "all.json").read_text())
    assert list(report["scorecards"]) == list(CONVENTIONS) == list(BY_HAND)
    for name, (ious, hits, queries) in BY_HAND.items():
        card = report["scorecards"][name]
        assert card["num_queries"] == queries and card["num_missing"] == queries - 3, name
        assert card["miou"]["value"] == pytest.approx(ious / queries), name
        assert card["recall"]["0.5"]["value"] == pytest.approx(hits / queries), name
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert f"{100 * ious / queries:.2f}" in line
        # One alone gives the same numbers, with intervals.
        assert main([*command, "--convention", name, "--json", str(tmp_path / "one.json")]) == 0
        assert f"convention    {name}\n" in capsys.readouterr().out
        one = json.loads((tmp_path / "one.json").read_text())
        assert one["files"][0]["scorecard"]["miou"]["value"] == pytest.approx(ious / queries)
        assert one["convention"]["source"] == CONVENTIONS[name].source
    assert "timelens, to 1 s" in shown and "IoU > t" in shown


def test_options_change_one_rule_of_a_convention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*files(tmp_path), "--convention", "time_r1"]
    assert main([*command, "--rule", "best", "--reading", "lenient"]) == 0
    shown = capsys.readouterr().out
    assert "convention    time_r1, changed by options" in shown
    assert "reading       lenient" in shown and "several windows: best; R1@t: IoU > t; windows as annotated" in shown
    assert "3 queries about 3 videos" in shown and "mIoU        83.33" in shown
    for options in (["--strict"], ["--reading", "timezero"], ["--only-predicted"], ["--predictions-b", "x"]):
        assert main([*files(tmp_path), "--convention", "all", *options]) == 1
        assert capsys.readouterr().err.startswith("error: --convention all ")


def test_answers_are_rounded_as_timelens_does() -> None:
    def answer(start: float, end: float) -> Span | None:
        said = Prediction("a", 0, "q", "v", (), 9.0, "", (), Span(start, end), (), True)
        return rounded(said, 1.0).answer

    assert answer(24.3, 30.6) == Span(24, 31)
    assert answer(0.5, 1.5) == Span(0, 2)  # a half goes to the even one
    said = Prediction("a", 0, "q", "v", (), 9.0, "", (), None, (), True)
    assert rounded(said, 1.0) is said


def test_the_page_of_data_says_what_each_convention_does() -> None:
    """The table of docs/data.md has a row for every convention, with the file that it is known from."""
    rows = [line for line in (ROOT / "docs/data.md").read_text().splitlines() if line.startswith("| `")]
    cells = {[cell.strip(" `") for cell in row.split("|")][1]: row for row in rows}
    for name, convention in CONVENTIONS.items():
        row = cells[name]
        assert all(part in row for part in convention.source.replace(",", "").split()), name
        assert (" > |" if convention.is_strict else " >= |") in row and f"| {convention.rule} |" in row, name
        assert (convention.reading or "stored") in row
    assert set(READINGS) <= set(cells)


# Names as in SOURCES.md: mIoU first, then R1 at 0.3, 0.5, 0.7; None where it is not tabulated.
TABULATED = {
    "sample_val_preds": {
        "moment_detr": (49.2115, 67.4839, 53.9355, 34.8387),  # max over the true windows
        "timechat": (41.7469, None, None, None),  # the first window
        "unitime": (46.5952, None, None, None),  # their union
    },
    "momentdetr_ckpt_val_preds": {
        "moment_detr": (48.5178, 67.1613, 53.2258, 34.0),
        "timechat": (40.64, None, None, None),
        "unitime": (46.5491, None, None, None),
    },
    "timechat_tvg_example_pred_file": {"timechat": (6.2998, 9.0, 3.4, 1.4)},
}


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", TABULATED)
def test_tabulated_scores_of_real_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    is_chat = name.startswith("timechat")
    folder = REAL / ("charades_sta" if is_chat else "qvhighlights")
    truth = ["charades_sta_test.txt", "Charades_v1_test.csv"] if is_chat else ["highlight_val_release.jsonl"]
    command = ["--dataset", folder.name, "--annotations", *(str(folder / file) for file in truth)]
    command += ["--predictions", str(folder / f"{name}.json{'' if is_chat else 'l'}"), "--convention", "all"]
    started = time.process_time()
    assert main([*command, "--json", str(tmp_path / "all.json")]) == 0
    assert time.process_time() - started < 8
    capsys.readouterr()
    cards = json.loads((tmp_path / "all.json").read_text())["scorecards"]
    for convention, expected in TABULATED[name].items():
        card = cards[convention]
        found = [card["miou"]["value"], *(card["recall"][t]["value"] for t in ("0.3", "0.5", "0.7"))]
        for value, tabulated in zip(found, expected, strict=True):
            assert tabulated is None or 100 * value == pytest.approx(tabulated, abs=5e-5), convention
