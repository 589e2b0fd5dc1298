"""Rollouts until a mark, on curves counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.budget.reach import curve_of, table_of
from tartvg.records import write_jsonl
from tartvg.report.cells import read_runs
from tartvg.report.tables import to_markdown


def trained(run: Path, stage: str, mious: dict[int, float]) -> None:
    """A stage of ten steps of two prompts with four rollouts, measured after these steps."""
    (run / stage).mkdir(parents=True)
    (run / stage / "config.yaml").write_text("grpo:\n  max_steps: 10\n  prompts_per_step: 2\n  group_size: 4\n")
    rows = [{"progress/step": step, "eval/val/miou": mious.get(step)} for step in range(11)]
    write_jsonl(run / stage / "metrics.jsonl", rows)


def test_rollouts_of_earlier_stages_count(tmp_path: Path) -> None:
    for seed, second in ((0, {2: 0.81, 4: 0.84, 6: 0.9}), (1, {2: 0.5, 4: 0.79, 6: 0.7})):
        run = tmp_path / f"anchors=two,grpo.credit=own_part,seed={seed}"
        trained(run, "grpo1", {5: 0.4, 10: 0.83})
        trained(run, "grpo2", second)
    (tmp_path / "unmeasured,seed=0").mkdir()
    entries = read_runs(sorted(tmp_path.iterdir()), "budget", tmp_path).entries
    curves = [curve for entry in entries if (curve := curve_of(entry))]
    assert [c.rollouts for c in curves] == [(96, 112, 128)] * 2
    assert [c.reached(0.8) for c in curves] == [96, None]
    assert [c.reached(0.85) for c in curves] == [128, None]
    assert [c.level for c in curves] == pytest.approx([0.85, (0.5 + 0.79 + 0.7) / 3])
    row = to_markdown(table_of(curves)).splitlines()[4]
    assert row == "| anchors=two,grpo.credit=own_part | 128 | 85.0, 66.3 | 96, never | 128, never |"
