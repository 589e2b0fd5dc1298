"""What counts as a run's result: half-evaluated cells, results moved aside, twins, failed jobs, runs beside sweeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.report import SETTINGS, Samples, make_run

from tartvg.config import Config, DatasetConfig, DatasetName, ReportConfig, SettingError, policy_label
from tartvg.launch.sweep_files import axes, cells, read_sweep
from tartvg.launch.sweeps import Job
from tartvg.records import dumps, write_atomic, write_jsonl
from tartvg.report.__main__ import main
from tartvg.report.cells import (
    Comparison,
    is_run,
    is_sweep,
    read_entry,
    read_group,
    read_runs,
    read_sweep_folder,
    runs_of_group,
    status_line,
)
from tartvg.report.compare import budget_table, comparison_table, differences, reference_of, status_table
from tartvg.report.compare_page import closing_table
from tartvg.report.curves import draw_panels
from tartvg.report.runs import Metrics, planned_targets, read_run
from tartvg.report.tables import Table
from tartvg.stages.report import run_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cells_of_two(sweep: tuple[Path, Samples], tmp_path: Path) -> Path:
    """The two seeds of anchors=one and of anchors=two, in a folder of their own."""
    for cell in sorted(sweep[0].glob("anchors=[ot][nw][eo],seed=*")):
        shutil.copytree(cell, tmp_path / "anchors" / cell.name)
    return tmp_path / "anchors"


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    return {row[0].text: {n: c.text for n, c in zip(table.columns, row, strict=True)} for row in table.rows}


def planned(folder: Path, overrides: Sequence[Sequence[str]]) -> Comparison:
    """A sweep of which no job has stages yet."""
    for number, cell in enumerate(overrides):
        Job(list(cell)).save(folder / str(number))
    return read_sweep_folder(folder)


# --- which policy is a run's result


def test_a_cell_whose_last_policy_is_not_scored_does_not_count(cells_of_two: Path, sweep: tuple[Path, Samples]) -> None:
    cut = cells_of_two / "anchors=one,seed=1"
    shutil.rmtree(cut / "evaluate" / "grpo2")
    comparison = read_sweep_folder(cells_of_two)
    whole, half = comparison.of("one")
    assert (whole.final, whole.lack, half.final, half.lack) == ("grpo2", "", None, "grpo2 is not scored")
    table = comparison_table(comparison)
    row = rows_of(table)["one"]
    value = 100 * read_run(cells_of_two / "anchors=one,seed=0").scores["grpo2"].miou.value
    assert (row["seeds"], row["mIoU"]) == ("1 of 2", f"{value:.1f}") and "policy" not in row
    assert "Not counted: one, seed 1: grpo2 is not scored." in table.note
    assert "one, seed 1: grpo2 is not scored." in status_line(comparison)
    assert rows_of(status_table(comparison))["one, seed 1"]["policy"] == "grpo2 is not scored"
    (found,) = differences(comparison, "two", sweep[1])
    assert len(found.by_seed) == 1


def test_scores_of_weights_that_are_being_replaced_do_not_count(cells_of_two: Path) -> None:
    again = cells_of_two / "anchors=one,seed=1"
    for stage, lack in (("sft", "sft is not finished"), ("evaluate/grpo2", "evaluate/grpo2 is not finished")):
        write_atomic(again / stage / "manifest.json", dumps({"seconds": 1.0, "finished": False}))
        assert read_sweep_folder(cells_of_two).of("one")[1].lack == lack
        (again / stage / "manifest.json").unlink()
    # What the base is worth does not depend on them.
    write_atomic(again / "config.yaml", "stage: {sequence: [evaluate]}\nevaluate: {policies: [base]}\n")
    write_atomic(again / "sft" / "manifest.json", dumps({"seconds": 1.0, "finished": False}))
    assert read_sweep_folder(cells_of_two).of("one")[1].final == "base"


def test_the_runs_own_commands_say_what_is_to_be_scored(tmp_path: Path) -> None:
    def plan(place: str, stage: str, targets: str) -> list[str]:
        write_atomic(tmp_path / place / "config.yaml", f"stage: {stage}\nevaluate: {{policies: {targets}}}\n")
        return planned_targets(read_run(tmp_path))

    assert planned_targets(read_run(tmp_path)) == []
    assert plan("grpo1", "{name: grpo1, sequence: []}", "[grpo2]") == [], "trains and evaluates nothing"
    assert plan("evaluate/base", "{name: evaluate}", "[base, grpo1]") == ["base", "grpo1"]
    assert plan("evaluate/x", "{name: evaluate}", "[runs/x/adapter, sft]") == ["base", "grpo1", "sft", "x"]
    assert plan("evaluate/x.old1", "{name: evaluate}", "[grpo2]") == ["base", "grpo1", "sft", "x"], "moved aside"
    assert [policy_label(t) for t in ("grpo2", "runs/y/sft/adapter")] == ["grpo2", "sft"]


def test_results_that_were_moved_aside_are_no_policies(cells_of_two: Path) -> None:
    run = cells_of_two / "anchors=one,seed=0"
    for number in (1, 12):
        old = run / "evaluate" / f"grpo2.old{number}"
        shutil.copytree(run / "evaluate" / "grpo2", old)
        write_atomic(old / "config.yaml", "seed: 99\n")
        write_atomic(old / "manifest.json", dumps({"seconds": 1000.0, "finished": False}))
    found = read_run(run)
    assert list(found.scores) == list(found.predictions) == ["base", "grpo1", "sft", "grpo2"]
    assert not [name for name in (*found.manifests, *found.configs) if ".old" in name]


def test_a_loss_without_reference_has_no_kl(tmp_path: Path) -> None:
    """It logs 0, and a KL of 0 would say that the policy had not moved; what monitors measure is drawn."""
    lines: Metrics = [{"progress/step": n, "loss/kl": 0.0, "loss/total": 1.0} for n in range(4)]
    lines[0]["rollout/kl"], lines[2]["rollout/kl"] = 0.0, 0.75
    for stage, coefficient in (("grpo1", 0.0), ("grpo2", 0.04)):
        write_jsonl(tmp_path / "run" / stage / "metrics.jsonl", lines)
        write_atomic(tmp_path / "run" / stage / "config.yaml", f"grpo: {{kl_coef: {coefficient}}}\n")
    found = read_run(tmp_path / "run").metrics
    assert all("loss/kl" not in line for line in found["grpo1"]) and found["grpo2"] == lines
    panels, _ = draw_panels(found)
    (kl,) = (panel for panel in panels if panel.title.startswith("KL"))
    assert "grpo1: 0 at step 0, 0.75 at step 2; grpo2: 0 at step 0, 0.75 at step 2" in kl.description
    closing = closing_table(Comparison("x", (read_entry(tmp_path / "run", tmp_path),)), "grpo1")
    assert closing is not None and [row[0].text for row in closing.rows] == ["loss/total"]


# --- which runs are there


def test_two_runs_of_one_variant_and_seed_are_refused(sweep: tuple[Path, Samples], tmp_path: Path) -> None:
    for name in ("default", "default/seed=0", "default/seed=1"):
        make_run(tmp_path / name, sweep[1])
        write_atomic(tmp_path / name / "grpo1" / "manifest.json", dumps({"finished": True}))
    with pytest.raises(SettingError, match=r"default and \S*default/seed=0 are both variant default, seed 0"):
        read_group(tmp_path, "default")
    with pytest.raises(SettingError, match="both variant default, seed 1"):
        read_runs([tmp_path / "default/seed=1"] * 2, "twice", tmp_path)
    write_atomic(tmp_path / "default" / "config.yaml", "seed: 7\n")
    assert [e.seed for e in read_group(tmp_path, "default").entries] == ["0", "1", "7"]


def test_a_planned_cell_that_another_job_has_made_is_not_one_more(tmp_path: Path) -> None:
    """The last call named the same overrides in another order, or left out the seed that is the default."""
    planned(tmp_path, [["anchors=one", "seed=0", "x=1"], ["anchors=two", "seed=0", "x=1"]])

    def after(params: dict[str, str]) -> list[tuple[str, str, str]]:
        plan = {"hydra": {"sweeper": {"params": params}, "overrides": {"task": ["x=1"]}}}
        write_atomic(tmp_path / "multirun.yaml", json.dumps(plan))
        return sorted((e.variant, e.seed, e.status) for e in read_sweep_folder(tmp_path).entries)

    begun = [("one", "0", "running"), ("two", "0", "running")]
    assert after({"seed": "0,1", "anchors": "one"}) == sorted([*begun, ("one", "1", "not run")])
    assert after({"anchors": "two,one"}) == begun


@pytest.mark.slow
def test_a_run_and_a_sweep_in_one_folder_are_both_reported(
    cells_of_two: Path, sweep: tuple[Path, Samples], capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(cells_of_two, sweep[1])
    write_atomic(cells_of_two / "config.yaml", f"seed: 5\n{SETTINGS}")
    assert is_run(cells_of_two) and is_sweep(cells_of_two)
    both = read_runs([cells_of_two], "both", cells_of_two.parent)
    assert both.variants == ["anchors", "anchors: one", "anchors: two"]
    place, address = str(cells_of_two.parent), "https://wandb.ai/me/tartvg?nw=view&x=1"
    tacos = DatasetConfig(DatasetName.tacos)
    run_report(Config(name="anchors", runs_dir=place, dataset=tacos, report=ReportConfig(view=address)))
    page, below = cells_of_two / "report.html", cells_of_two / "report" / "sweep" / "report.html"
    assert '<a href="report/sweep/report.html">the sweep in this folder</a>' in page.read_text("utf-8")
    assert "Scores by variant" in below.read_text("utf-8")
    link = f'<a href="{address.replace("&", "&amp;")}">the same in W&amp;B</a>'
    assert link in page.read_text("utf-8") and link in below.read_text("utf-8")
    said = capsys.readouterr().out
    assert "Scores by variant" in said and "Scores after each stage" in said
    assert main([str(cells_of_two)]) == 0
    said = capsys.readouterr().out
    assert "**Scores by variant**" in said and "**Scores over seeds**" in said


def test_a_view_is_an_address() -> None:
    with pytest.raises(SettingError, match=r"report\.view"):
        ReportConfig(view="javascript:alert(1)")


def test_a_failed_cell_reported_by_name_is_not_finished(sweep: tuple[Path, Samples]) -> None:
    failed, whole = (sweep[0] / f"anchors={name},seed=0" for name in ("three", "one"))
    assert is_run(failed) and not is_sweep(failed)
    comparison = read_runs([failed, whole], "x", sweep[0])
    assert [e.status for e in comparison.entries] == ["failed", "finished"]
    assert "failed (ValueError: the filter kept none)" in status_line(comparison)


def test_a_run_without_job_is_finished_when_it_has_all_it_planned(cells_of_two: Path) -> None:
    cell = cells_of_two / "anchors=one,seed=0"
    (cell / "job.json").unlink()
    assert read_entry(cell, cells_of_two).status == "finished"
    shutil.rmtree(cell / "evaluate" / "grpo2")
    assert read_entry(cell, cells_of_two).status == "running"


def test_controls_are_no_run_of_a_group(sweep: tuple[Path, Samples], tmp_path: Path) -> None:
    make_run(tmp_path / "x", sweep[1])
    for place in ("evaluate/grpo2", "controls/grpo2", "sft.old1"):
        write_atomic(tmp_path / "x" / place / "manifest.json", dumps({"seconds": 5.0, "finished": True}))
    write_atomic(tmp_path / "x" / "sft.old1" / "config.yaml", "tracking: {group: before}\n")
    assert runs_of_group(tmp_path, "x") == [tmp_path / "x"] and runs_of_group(tmp_path, "before") == []


# --- what a run costs


def test_the_budget_is_of_whole_runs_with_controls_monitors_and_rollouts(cells_of_two: Path) -> None:
    before = rows_of(budget_table(read_sweep_folder(cells_of_two)))["one"]
    assert before["whole run, s"] == "225 ± 0" and before["monitor, s"] == "0.0 ± 0.0"
    for seed in (0, 1):
        cell = cells_of_two / f"anchors=one,seed={seed}"
        write_atomic(cell / "controls" / "grpo2" / "manifest.json", dumps({"seconds": 100.0, "finished": True}))
        write_jsonl(cell / "rollouts" / "metrics.jsonl", [{"progress/step": 0, "time/monitor_s": 7.0}])
    row = rows_of(budget_table(read_sweep_folder(cells_of_two)))["one"]
    assert row["whole run, s"] == "325 ± 0" and row["monitor, s"] == "7.0 ± 0.0"
    Job(["anchors=one", "seed=1"], status="running").save(cells_of_two / "anchors=one,seed=1")
    row = rows_of(budget_table(read_sweep_folder(cells_of_two)))["one"]
    assert row["whole run, s"] == "325" and row["spent on all seeds"] == "10 min 50 s"


# --- the paper beside them


def test_settings_that_no_row_changes_bring_no_numbers_of_the_paper(tmp_path: Path) -> None:
    rewards = ["tar1", "tar1_tar2", "tar"]
    comparison = planned(tmp_path, [[f"reward={reward}", "anchors=two", "seed=0"] for reward in rewards])
    rows = rows_of(comparison_table(comparison))
    assert [rows[reward]["paper: mIoU"] for reward in rewards] == ["–", "–", "61.1"]  # noqa: RUF001
    assert reference_of(comparison) == "tar" and comparison.axes == ("reward",)


def test_two_changes_at_once_are_no_row_of_the_paper(tmp_path: Path) -> None:
    pairs = [(anchors, reward) for anchors in ("one", "two") for reward in ("tar1", "tar")]
    comparison = planned(tmp_path, [[f"anchors={a}", f"reward={r}", "seed=0"] for a, r in pairs])
    rows = rows_of(comparison_table(comparison))
    shown = {name: row["paper: mIoU"] for name, row in rows.items()}
    assert shown == {
        "anchors=one, reward=tar1": "–",  # noqa: RUF001
        "anchors=one, reward=tar": "59.3",
        "anchors=two, reward=tar1": "–",  # noqa: RUF001
        "anchors=two, reward=tar": "61.1",
    }
    assert reference_of(comparison) == "anchors=two, reward=tar"


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("anchors", "two"),
        ("beta_gamma", "beta=5, gamma=1"),
        ("difficulty", "all"),
        ("filter_thresholds", "min_reward=6.4, min_ious=[0.5,0.7]"),
        ("group_size", "8"),
        ("iou_kind", "tar"),
        ("kl", "0.04"),
        ("stage_order", "grpo_sft_grpo"),
        ("tar2_form", "abs"),
        ("tar_components", "tar"),
        ("truth", "best"),
    ],
)
def test_every_sweep_is_compared_with_the_papers_setting(name: str, reference: str, tmp_path: Path) -> None:
    params = read_sweep(name, ROOT)["hydra"]["sweeper"]["params"]
    assert reference_of(planned(tmp_path, cells(axes(params)))) == reference
