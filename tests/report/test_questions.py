"""The questions of a report are those of its runs, whatever data set the command names."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from helpers.report import Samples, make_run, make_samples, prediction

from tartvg.config import Config, DatasetConfig, DatasetName
from tartvg.launch.sweeps import Job
from tartvg.records import write_atomic, write_jsonl
from tartvg.report.cards import choose_cases
from tartvg.report.cells import read_runs
from tartvg.report.compare import comparison_table, differences, pooled_p_value
from tartvg.report.questions import questions_of
from tartvg.report.runs import read_run
from tartvg.stages.report import run_report
from tartvg.types import Span

ELSEWHERE = DatasetConfig(DatasetName.tacos, root="nowhere")


def write_data(root: Path, samples: Samples) -> None:
    """`test.jsonl` and its videos, as dataset=jsonl reads them."""
    rows = [{**vars(s), "video": s.video.name, "windows": [list(w) for w in s.windows]} for s in samples.values()]
    write_jsonl(root / "test.jsonl", rows)
    (root / "videos").mkdir(parents=True, exist_ok=True)
    for sample in samples.values():
        shutil.copyfile(sample.video, root / "videos" / sample.video.name)


def settings(root: Path, split: str = "test") -> str:
    return (
        f"dataset: {{name: jsonl, root: '{root}'}}\nevaluate: {{split: {split}, policies: [base, grpo1, sft, grpo2]}}\n"
        "stage: {sequence: [grpo1, filter, sft, grpo2, evaluate]}\n"
    )


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    """Ten queries about as many videos, which look the same."""
    (tmp_path / "drawn").mkdir()
    found = make_samples(tmp_path / "drawn")
    for name, sample in found.items():
        found[name] = dataclasses.replace(sample, video=tmp_path / "drawn" / f"{name}.mp4")
        shutil.copyfile(sample.video, found[name].video)
    return found


@pytest.fixture
def run(tmp_path: Path, samples: Samples) -> Path:
    write_data(tmp_path / "data", samples)
    make_run(tmp_path / "demo", samples)
    write_atomic(tmp_path / "demo" / "config.yaml", settings(tmp_path / "data"))
    return tmp_path / "demo"


@pytest.mark.slow
def test_the_data_set_of_the_run_is_read(run: Path, samples: Samples, capsys: pytest.CaptureFixture[str]) -> None:
    found = questions_of([read_run(run)], ELSEWHERE)
    assert found.remarks == () and set(found.samples_by_id) == set(samples)
    assert found.samples_by_id["q1"].video == run.parent / "data" / "videos" / "q1.mp4"
    run_report(Config(name="demo", runs_dir=str(run.parent), dataset=ELSEWHERE))
    page = (run / "report.html").read_text("utf-8")
    assert page.count('class="frames"') == 6 and "permutation test" in page and "remark" not in page.split("<body>")[1]
    assert "cannot be read" not in capsys.readouterr().out


@pytest.mark.slow
def test_other_windows_or_queries_are_named_and_not_tested(run: Path, samples: Samples) -> None:
    changed = dict(samples)
    changed["q1"] = dataclasses.replace(samples["q1"], windows=(Span(0.0, 1.0),))
    changed["q2"] = dataclasses.replace(samples["q2"], query="another")
    del changed["q3"]
    write_data(run.parent / "data", changed)
    found = questions_of([read_run(run)], ELSEWHERE)
    assert set(found.samples_by_id) == set(samples) - {"q1", "q2", "q3"}
    (remark,) = found.remarks
    assert remark.startswith("3 of 10 recorded questions are not those of jsonl test as it is read here, in demo base")
    run_report(Config(name="demo", runs_dir=str(run.parent), dataset=ELSEWHERE))
    page = (run / "report.html").read_text("utf-8")
    assert '<p class="remark">3 of 10 recorded questions are not those of jsonl test' in page
    assert "permutation test" not in page


@pytest.mark.slow
def test_a_data_set_that_is_gone_is_looked_for_where_the_command_says(run: Path, samples: Samples) -> None:
    (run.parent / "data").rename(run.parent / "moved")
    found = questions_of([read_run(run)], DatasetConfig(DatasetName.jsonl, root=str(run.parent / "moved")))
    assert set(found.samples_by_id) == set(samples) and found.remarks == ()
    lost = questions_of([read_run(run)], ELSEWHERE)
    assert lost.samples_by_id == {} and len(lost.remarks) == 1
    assert "dataset=jsonl, test cannot be read here" in lost.remarks[0] and "no test by video" in lost.remarks[0]
    run_report(Config(name="demo", runs_dir=str(run.parent), dataset=ELSEWHERE))
    assert "cannot be read here" in (run / "report.html").read_text("utf-8")
    write_atomic(run / "config.yaml", "dataset: {name: nothing}\n")
    assert "no data set that can be read" in questions_of([read_run(run)], ELSEWHERE).remarks[0]


def test_runs_about_different_questions_are_not_compared(run: Path, samples: Samples) -> None:
    """Two data sets whose queries have the same ids, as planted and planted_long have."""
    top = run.parent
    others = {
        name: dataclasses.replace(s, query=f"in other words {s.query}", windows=(Span(0.5, 2.0),))
        for name, s in samples.items()
    }
    write_data(top / "others", others)
    for name, data, own in (("same", "data", samples), ("other", "others", others)):
        make_run(top / name, own)
        write_atomic(top / name / "config.yaml", settings(top / data))
        write_atomic(top / name / "grpo2" / "manifest.json", '{"finished": true}')
        Job([]).end(top / name, 0)
    write_atomic(run / "grpo2" / "manifest.json", '{"finished": true}')
    comparison = read_runs([run, top / "same", top / "other"], "three", top)
    found = questions_of(comparison.runs, ELSEWHERE)
    assert found.samples_by_id == {}, "of every id there are two questions"
    assert len(found.remarks) == 1 and "different questions under the same names" in found.remarks[0]
    assert [d.variant for d in differences(comparison, "demo", samples)] == ["same"]
    alike = questions_of(comparison.runs[:2], ELSEWHERE)
    (same,) = differences(comparison, "demo", alike.samples_by_id)
    assert same.p_value is not None


def test_rows_say_which_split_they_are_about(run: Path, samples: Samples) -> None:
    shutil.copytree(run, run.parent / "val")
    write_atomic(run.parent / "val" / "config.yaml", settings(run.parent / "data", "val"))
    for name in ("demo", "val"):
        write_atomic(run.parent / name / "grpo2" / "manifest.json", '{"finished": true}')
    table = comparison_table(read_runs([run, run.parent / "val"], "two", run.parent))
    place = table.columns.index("data set")
    assert [row[place].text for row in table.rows] == ["jsonl test", "jsonl val"]


def test_answers_to_different_questions_are_no_pair(samples: Samples) -> None:
    own = [prediction(s, 0, (), Span(0, 5)) for s in samples.values()]
    other = [dataclasses.replace(p, query="another") for p in own]
    assert pooled_p_value(samples, [(own, own)]) == 1.0
    assert pooled_p_value(samples, [(own, other)]) is None and pooled_p_value(samples, [(own[:5], own[5:])]) is None
    assert choose_cases(other, own, samples) == [] and len(choose_cases(own, own, samples)) == 6
