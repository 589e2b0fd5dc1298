"""Reports of several runs: cells, tables, significance by hand, exports, pages."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.report import ATTACK, SETTINGS, Reader, Samples, make_run, prediction
from PIL import Image

from tartvg.config import Config, DatasetConfig, DatasetName, SettingError
from tartvg.launch.sweeps import Job
from tartvg.records import write_atomic
from tartvg.report.__main__ import main
from tartvg.report.bands import band_of
from tartvg.report.cards import choose_extremes
from tartvg.report.cells import Comparison, is_run, is_sweep, read_runs, read_sweep_folder, runs_of_group, status_line
from tartvg.report.compare import (
    T_QUANTILES,
    Difference,
    _holm,
    budget_table,
    comparison_table,
    differences,
    pooled_p_value,
    reference_of,
    significance_table,
    verdict,
)
from tartvg.report.compare_page import build_comparison, closing, rubric_of
from tartvg.report.export import latex_text, slug, to_csv, to_latex
from tartvg.report.questions import data_of
from tartvg.report.runs import planned_targets, read_run
from tartvg.report.tables import Cell, Table, to_html, to_markdown
from tartvg.types import GroundingSample, Span


def test_cells_of_a_sweep_are_the_planned_ones(sweep: tuple[Path, Samples]) -> None:
    folder, _ = sweep
    assert is_sweep(folder) and not is_run(folder) and is_run(folder / "anchors=one,seed=0")
    comparison = read_sweep_folder(folder)
    assert comparison.variants == ["one", "two", "three"] and comparison.axes == ("anchors",)
    assert [(e.variant, e.seed, e.status) for e in comparison.entries] == [
        *(("one", "0", "finished"), ("one", "1", "finished"), ("two", "0", "finished"), ("two", "1", "finished")),
        *(("three", "0", "failed"), ("three", "1", "not run")),
    ]
    text = status_line(comparison)
    assert "4 of 6 runs finished" in text and "three, seed 0: failed (ValueError: the filter kept none)" in text
    assert reference_of(comparison) == "two"


def test_the_table_has_the_papers_numbers_apart(sweep: tuple[Path, Samples]) -> None:
    table = comparison_table(read_sweep_folder(sweep[0]))
    rows = {row[0].text: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert [rows[v]["paper: mIoU"].text for v in ("one", "two", "three")] == ["59.3", "61.1", "41.3"]
    assert rows["two"]["paper: R1@0.7"].text == "50.2" and rows["one"]["paper: R1@0.7"].text == "–"  # noqa: RUF001
    assert rows["two"]["seeds"].text == "2 of 2" and rows["three"]["seeds"].text == "0 of 2"
    values = [100 * read_run(sweep[0] / f"anchors=two,seed={s}").scores["grpo2"].miou.value for s in (0, 1)]
    assert rows["two"]["mIoU"].text == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    html = to_html(table)
    assert html.count('<td class="theirs">') == 9 and html.count('<th scope="col" class="theirs">') == 3
    assert "paper: mIoU" in to_markdown(table) and "not comparable" in table.note


def test_differences_are_paired_by_seed_and_by_video(sweep: tuple[Path, Samples]) -> None:
    comparison, samples = read_sweep_folder(sweep[0]), sweep[1]
    (found,) = differences(comparison, "two", samples)
    assert found.variant == "one" and len(found.by_seed) == 2 and all(g < 0 for g in found.by_seed)
    assert found.p_value is not None and found.p_value == found.adjusted and found.p_value < 0.05
    assert verdict(found) == "2 seeds: no claim"
    table = significance_table([found])
    assert table is not None and table.rows[0][3].text == "0 of 2"
    assert significance_table([]) is None
    # One seed alone is the test of the evaluation room; unknown samples and few videos give no test.
    first, second = (
        [p for p in read_run(sweep[0] / f"anchors={v},seed=0").predictions["grpo2"] if p.sample_index == 0]
        for v in ("one", "two")
    )
    assert pooled_p_value(samples, [(first, second)]) == pytest.approx(
        pooled_p_value(samples, [(first, second), (first, second)]) or 0.0, abs=0.01
    )
    assert pooled_p_value({}, [(first, second)]) is None
    alike = {key: replace(s, video=Path("one.mp4")) for key, s in samples.items()}
    assert pooled_p_value(alike, [(first, second)]) is None


def test_interval_and_corrections_by_hand() -> None:
    from scipy import stats

    for degrees, quantile in enumerate(T_QUANTILES, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)
    d = Difference("a", "b", (1.0, 2.0, 3.0), 0.01)
    assert d.interval == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert Difference("a", "b", (1.0,), None).interval is None
    rows = [Difference(str(p), "b", (1.0, 1.0, 1.0), p) for p in (0.04, 0.01, 0.03)]
    adjusted = [x.adjusted for x in _holm([*rows, Difference("n", "b", (1.0,), None)])]
    assert adjusted[:3] == pytest.approx([0.06, 0.03, 0.06]) and adjusted[3] is None
    assert verdict(_holm(rows)[1]) == "better in every seed" and verdict(_holm(rows)[0]) == "no difference shown"
    assert verdict(replace(rows[0], adjusted=0.001, by_seed=(1.0, -1.0, 1.0))) == "no difference shown"
    assert verdict(d) == "not tested by video"


def test_the_budget_counts_a_shared_stage_once(sweep: tuple[Path, Samples]) -> None:
    table = budget_table(read_sweep_folder(sweep[0]))
    rows = {row[0].text: dict(zip(table.columns, (c.text for c in row), strict=True)) for row in table.rows}
    # grpo1, sft and grpo2 at 75 s each; two GPUs for 225 s.
    assert rows["two"]["whole run, s"] == "225 ± 0" and rows["two"]["GPU-hours"] == f"{2 * 225 / 3600:.2f}"
    assert rows["one"]["spent on all seeds"] == "7 min 30 s" and rows["two"]["spent on all seeds"] == "5 min 00 s"
    assert rows["one"]["update, s"] == "19.2 ± 0.0"  # 0.25 s in 40 + 12 + 25 steps
    assert rows["three"]["whole run, s"] == "–"  # noqa: RUF001


@pytest.mark.slow
def test_pages_and_files_of_a_sweep(sweep: tuple[Path, Samples]) -> None:
    folder, samples = sweep
    page, tables = build_comparison(read_sweep_folder(folder), samples, folder)
    assert [t.title for t in tables] == [
        "Scores by variant", "Differences in mIoU", "First and last anchor", "Budget",
    ]  # fmt: skip
    place = folder / "report"
    for path in (page, *(place / f"{stage}.html" for stage in ("grpo1", "sft", "grpo2"))):
        text = path.read_text("utf-8")
        reader = Reader()
        reader.feed(text)
        assert reader.open == [] and not {"script", "iframe", "object", "embed"} & set(reader.tags)
        for address in reader.addresses:
            assert address.startswith(("#", "data:")) or (path.parent / address).is_file(), address
        assert "http://" not in text and "https://" not in text and ATTACK not in text
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert len(text) < 10_000_000
    main_page = page.read_text("utf-8")
    for kind in ("lost most", "best", "worst"):  # `one` is worse than `two` everywhere
        assert f'<p class="kind">{kind}</p>' in main_page
    assert main_page.count('<dl class="terms">') >= 8 and "TAR3" in main_page
    assert "59.3" in main_page and 'class="theirs"' in main_page and "seed 0: failed" in main_page
    assert "one (2)" in main_page and main_page.count("<svg") == 20
    assert {p.name for p in place.glob("*.csv")} == {
        "scores_by_variant.csv",
        "differences_in_miou.csv",
        "first_and_last_anchor.csv",
        "budget.csv",
        "runs.csv",
    }
    assert "| variant |" in (place / "report.md").read_text("utf-8")
    assert r"\toprule" in (place / "tables.tex").read_text("utf-8")
    figures = sorted(p.name for p in (place / "figures").iterdir())
    assert len(figures) == 40 and {p.rpartition(".")[2] for p in figures} == {"svg", "png"}
    assert Image.open(place / "figures" / figures[0]).format == "PNG"
    before = {p: p.read_bytes() for p in folder.rglob("report/**/*") if p.is_file()}
    build_comparison(read_sweep_folder(folder), samples, folder)
    assert all(p.read_bytes() == content for p, content in before.items())


def test_runs_by_name_and_by_group(sweep: tuple[Path, Samples], tmp_path: Path) -> None:
    folder, samples = sweep
    for name, group in (("x/seed=0", "july"), ("x/seed=1", "july"), ("y", None)):
        make_run(tmp_path / name, samples)
        write_atomic(tmp_path / name / "grpo1" / "config.yaml", f"seed: 0\ntracking: {{group: {group or 'null'}}}\n")
    named = read_runs([tmp_path / "x/seed=0", tmp_path / "x/seed=1", tmp_path / "y"], "both", tmp_path)
    assert [(e.variant, e.seed) for e in named.entries] == [("x", "0"), ("x", "1"), ("y", "0")]
    assert runs_of_group(tmp_path, "july") == [tmp_path / "x/seed=0", tmp_path / "x/seed=1"]
    assert runs_of_group(tmp_path, "y") == [tmp_path / "y"] and runs_of_group(tmp_path, "x") == []
    both = read_runs([folder, tmp_path / "y"], "both", folder.parent)
    assert both.variants == ["anchors: one", "anchors: two", "anchors: three", "y"]
    with pytest.raises(SettingError, match=r"report\.runs"):
        replace(Config().report, runs=["../x"])


def test_settings_that_differ_name_the_rows(tmp_path: Path) -> None:
    for beta in (1, 5):
        for gamma in (0, 1):
            Job([f"reward.beta={beta}", f"reward.gamma={gamma}", "seed=0", "x=1"]).save(tmp_path / f"{beta}{gamma}")
    expected = [f"beta={beta}, gamma={gamma}" for beta in (1, 5) for gamma in (0, 1)]
    assert read_sweep_folder(tmp_path).variants == expected


def test_bands_span_the_seeds() -> None:
    band = band_of([[(0, 0.1), (1, 0.2), (2, 0.9)], [(0, 0.3), (1, 0.6)]], 100)
    assert band is not None and (band.steps, band.num_seeds) == ([0, 1], 2)
    assert (band.mean, band.low, band.high) == (
        pytest.approx([20, 40]), pytest.approx([10, 20]), pytest.approx([30, 60])
    )  # fmt: skip
    assert band_of([[], []]) is None and band_of([[(0, 1.0)], [(1, 1.0)]]) is None


def test_closing_values_are_means_of_the_last_steps() -> None:
    lines = [{"progress/step": float(i), "loss/total": float(i), "time/x_s": 1.0, "loss/kl": None} for i in range(20)]
    assert closing(lines) == {"loss/total": 18.5}
    assert closing([]) == {}


def test_extremes_are_the_most_changed_and_the_ends() -> None:
    samples = {
        f"q{i}": GroundingSample(f"q{i}", Path("v.mp4"), f"query {i}", (Span(0, 10),), 20.0, "test") for i in range(10)
    }
    before = [prediction(s, 0, (), Span(0, 5)) for s in samples.values()]
    after = [prediction(s, 0, (), Span(0, 1 + i)) for i, s in enumerate(samples.values())]
    assert [(c.kind, c.after.sample_id) for c in choose_extremes(before, after, samples)] == [
        *(("gained most", "q9"), ("gained most", "q8"), ("lost most", "q0"), ("lost most", "q1")),
        *(("best", "q7"), ("best", "q6"), ("worst", "q2"), ("worst", "q3")),
    ]
    same = choose_extremes(before, before, samples)
    assert {c.kind for c in same} == {"best", "worst"}


def test_rewards_in_the_gallery_are_the_runs_own(sweep: tuple[Path, Samples]) -> None:
    rubric = rubric_of(read_run(sweep[0] / "anchors=two,seed=0"))
    assert rubric is not None and (rubric.anchors.max_count, rubric.reward.beta) == (3, 5.0)


def test_settings_under_old_names_are_not_understood_and_hurt_nobody(sweep: tuple[Path, Samples]) -> None:
    folder = sweep[0] / "anchors=two,seed=0"
    old = SETTINGS.replace("{count: 2, max_count: 3}", "{target: 2, max: 3, filter: {min_reward: 6.4}}")
    old = old.replace("policies:", "targets:") + "dataset: {name: planted, limit: null}\nselection: {keep: last}\n"
    for path in [folder / "config.yaml", *folder.glob("**/config.yaml")]:
        write_atomic(path, old)
    run = read_run(folder)
    assert rubric_of(run) is None
    assert data_of(run, "grpo2", DatasetConfig(name=DatasetName.planted)) is None
    assert planned_targets(run) == ["base", "grpo1", "sft", "grpo2"]


def test_latex_and_csv_of_awkward_text() -> None:
    table = Table("50 % of_it", ("a&b", "paper: x"), ((Cell("=1+1"), Cell("1.0", "[0.5, 1.5]", is_paper=True)),), "n±1")
    latex = to_latex(table)
    assert (
        r"\caption{50 \% of\_it}" in latex
        and r"a\&b" in latex
        and r"\textit{\textcolor{gray}{1.0 [0.5, 1.5]}}" in latex
    )
    assert latex_text("{\\}") == r"\{\textbackslash{}\}"
    rows = list(csv.reader(io.StringIO(to_csv(table))))
    assert rows == [["a&b", "paper: x", "paper: x (95 % interval)"], ["'=1+1", "1.0", "[0.5, 1.5]"]]
    assert to_csv(Table("t", ("d",), ((Cell("-1.5"),),))) == "d\n-1.5\n"
    assert slug("mIoU of each run") == "miou_of_each_run"


def test_the_command_prints_a_sweeps_tables(sweep: tuple[Path, Samples], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep[0])]) == 0
    out = capsys.readouterr().out
    assert "**Scores by variant**" in out and "paper: mIoU" in out and "not tested" not in out and "**Budget**" in out


def test_a_sweep_that_has_not_begun_is_no_sweep(tmp_path: Path) -> None:
    assert not is_sweep(tmp_path)
    comparison = Comparison("empty", read_sweep_folder(tmp_path).entries)
    assert comparison.variants == [] and status_line(comparison) == "0 of 0 runs finished."
