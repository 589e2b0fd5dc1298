from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.report import (
    ATTACK,
    SECONDS,
    Reader,
    prediction,
    rollout_group,
)
from PIL import Image
from rich.console import Console

from tartvg.evaluation.score import score
from tartvg.launch.sweeps import Job
from tartvg.records import append_jsonl, dumps, write_atomic, write_jsonl
from tartvg.report.cards import choose_cases, marked
from tartvg.report.curves import running_mean
from tartvg.report.page import build_report
from tartvg.report.runs import Metrics, first_and_last_groups, read_run, read_scores
from tartvg.report.strips import contact_row, film_strip, thumbnails
from tartvg.report.tables import (
    DASH,
    Cell,
    Table,
    duration,
    filter_table,
    seconds_table,
    stage_table,
    throughput_table,
    to_html,
    to_markdown,
    to_rich,
)
from tartvg.types import (
    GroundingSample,
    Span,
)


def test_the_page_loads_nothing_and_runs_nothing(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    page = demo[2]
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(reader.tags)
    assert all(a.startswith(("#", "data:image/")) for a in reader.addresses), reader.addresses
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(page) < 10_000_000


def test_every_text_is_escaped(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    page = demo[2]
    assert ATTACK not in page
    # The query in the rollouts and the config; the first sample is also among the chosen test queries or not.
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3


def test_the_page_has_every_part(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    page = demo[2]
    for anchor in ("scores", "curves", "filter", "time", "examples", "rollouts", "config"):
        assert f'<section id="{anchor}">' in page
    assert 'id="missing"' not in page
    assert page.count('class="frames"') == 6
    assert page.count("<svg") == 10
    for title in ("KL to the reference", "Entropy", "Outputs cut off by the length limit", "Gradient norm"):
        assert f"<figcaption>{title}" in page
    assert page.count('<p class="kind">best improved</p>') == 2
    assert page.count('<p class="kind">step 0, best</p>') == page.count('<p class="kind">step 1, worst</p>') == 2
    assert '<mark class="anchor">&lt;timestamp&gt;' in page
    assert "Not finished: grpo2" in page
    for number in ("61.1", "50.2", "83.6", "59.3", "41.3"):
        assert f'<td class="theirs">{number}</td>' in page
    assert "not comparable" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_stage_table_shows_the_scores(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    run, samples, page = demo
    table = stage_table(read_scores(run))
    assert [row[0].text for row in table.rows] == ["base", "grpo1", "sft", "grpo2"]
    assert table.columns[-3:] == ("R1@0.3", "R1@0.5", "R1@0.7")
    final = dict(zip(table.columns, table.rows[-1], strict=True))
    assert (final["mIoU"].text, final["mIoU"].interval) == ("100.0", "[100.0, 100.0]")
    assert final["Anchors per answer"].text == "2.00"
    assert final["Answer = last anchor"].text == "100.0"
    base = dict(zip(table.columns, table.rows[0], strict=True))
    assert (base["Format"].text, base["Valid: 2+ anchors"].text) == ("90.0", "0.0")
    value = score(list(samples.values()), read_run(run).predictions["base"]).miou.value
    assert base["mIoU"].text == f"{100 * value:.1f}" and f">{100 * value:.1f}<" in page
    assert "base: 10 queries, 1 unreadable, 0 missing" in table.note


def test_a_run_that_has_only_begun_is_reported(tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    page = build_report(tmp_path / "young", {}, tmp_path / "out" / "a.html").read_text("utf-8")
    assert "No policy of this run has been scored yet" in page and "grpo1/metrics.jsonl" in page
    assert all(cell.text == "–" for row in stage_table(read_scores(tmp_path / "young")).rows for cell in row[1:])  # noqa: RUF001

    append_jsonl(tmp_path / "young" / "grpo1" / "metrics.jsonl", [{"progress/step": 0, "reward/total_mean": 1.0}])
    with (tmp_path / "young" / "grpo1" / "metrics.jsonl").open("a") as file:
        file.write('{"progress/st')
    page = build_report(tmp_path / "young", {}, tmp_path / "a.html").read_text("utf-8")
    assert page.count("<svg") == 1 and "No data for:" in page
    with pytest.raises(ValueError, match="no run folder"):
        build_report(tmp_path / "nowhere", {}, tmp_path / "a.html")


def test_one_scored_policy_and_lost_or_damaged_videos(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    sample = GroundingSample("a", tmp_path / "broken.mp4", "q $x$", (Span(1, 2),), 8.0, "test")
    other = GroundingSample("b", tmp_path / "gone.mp4", "another", (Span(1, 2),), 8.0, "test")
    predictions = [prediction(s, 0, (Span(5, 1), Span(20, 30)), None) for s in (sample, other)]
    folder = tmp_path / "run" / "evaluate" / "my_adapter"
    write_jsonl(folder / "predictions.jsonl", predictions)
    write_atomic(folder / "scores.json", dumps(score([sample, other], predictions)))
    page = build_report(tmp_path / "run", {"a": sample}, tmp_path / "a.html").read_text("utf-8")
    assert "could not be read" in page and "not among the samples" in page
    assert "(reversed)" in page and "(outside)" in page and "unreadable" in page
    assert [row[0].text for row in stage_table(read_scores(tmp_path / "run")).rows][-1] == "my_adapter"


def test_a_failed_job_says_so_on_the_page_of_its_run(tmp_path: Path) -> None:
    Job(["seed=0"]).end(tmp_path / "cell", 1, "ValueError: <b>")
    page = build_report(tmp_path / "cell", {}, tmp_path / "a.html").read_text("utf-8")
    assert "The job of this run failed: ValueError: &lt;b&gt;" in page


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_atomic(tmp_path / "filter" / "summary.json", "{")
    with pytest.raises(ValueError, match=r"summary\.json"):
        read_run(tmp_path)


def test_tables_render_three_ways() -> None:
    table = Table("T & co", ("Policy", "a|b"), ((Cell("x<y"), Cell("1.0", "[0.5, 1.5]", share=0.25)),), "a note")
    html = to_html(table)
    assert "<caption>T &amp; co</caption>" in html and '<th scope="row">x&lt;y</th>' in html
    assert '<th scope="col">Policy</th>' in html and "width:25.0%" in html
    markdown = to_markdown(table)
    assert "| x<y | 1.0 [0.5, 1.5] |" in markdown and "a\\|b" in markdown and "| --- | ---: |" in markdown
    console = Console(width=80, file=io.StringIO())
    console.print(to_rich(table))
    assert "[0.5, 1.5]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_seconds_add_up_by_stage(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    run = read_run(demo[0])
    table = seconds_table(run.metrics, run.manifests)
    assert table is not None and table.columns == ("Stage", "sample", "update", "whole stage")
    assert [c.text for c in table.rows[0]] == ["grpo1", "1 min 00 s", "10.0 s", "1 min 15 s"]
    assert [c.text for c in table.rows[1]] == ["sft", "–", "3.0 s", "1 min 15 s"]  # noqa: RUF001
    assert seconds_table({}, {}) is None
    drawn: Metrics = [{"time/update_s": 0.5, "time/monitor_s": 2.0, "time/decode_s": 1.0}] * 2
    table = seconds_table({"rollouts": drawn}, {"rollouts": {"seconds": 8.0}, "controls/grpo2": {"seconds": 30.0}})
    assert table is not None and table.columns == ("Stage", "decode", "update", "monitor", "whole stage")
    assert [c.text for c in table.rows[0]] == ["rollouts", "2.0 s", "1.0 s", "4.0 s", "8.0 s"]
    assert [c.text for c in table.rows[1]] == ["controls/grpo2", "–", "–", "–", "30.0 s"]  # noqa: RUF001
    assert [duration(s) for s in (0.123, 59.94, 60, 3599.6, 11220)] == [
        *("0.12 s", "59.9 s", "1 min 00 s"),
        *("1 h 00 min", "3 h 07 min"),
    ]


def test_the_filter_table_shows_shares_of_all_rollouts(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    summary = read_run(demo[0]).filtered
    assert summary is not None
    rows = {row[0].text: (row[1].text, row[2].text) for row in filter_table(summary).rows}
    assert rows["read"] == ("1,000", "100.0 %")
    assert rows["kept as traces"] == ("160", "16.0 %")
    assert rows["rejected: min_reward"] == ("700", "70.0 %")


def test_cases_are_the_extremes_and_the_middle_without_repetition() -> None:
    samples = {
        f"q{i}": GroundingSample(f"q{i}", Path("v.mp4"), f"query {i}", (Span(0, 10),), 20.0, "test") for i in range(9)
    }
    before = [prediction(s, 0, (), Span(0, 5)) for s in samples.values()]
    after = [prediction(s, 0, (), Span(0, 1 + i)) for i, s in enumerate(samples.values())]
    cases = choose_cases(before, after, samples)
    assert [(c.kind, c.after.sample_id) for c in cases] == [
        ("best improved", "q8"),
        ("best improved", "q7"),
        ("typical", "q5"),
        ("typical", "q4"),
        ("worst", "q0"),
        ("worst", "q1"),
    ]
    assert (cases[0].iou_before, cases[0].iou_after) == (0.5, 0.9)
    for num in range(6):
        few = choose_cases(before[:num], after[:num], samples)
        assert len({c.after.sample_id for c in few}) == len(few) == num
    assert {c.kind for c in choose_cases([], after, samples)} == {"best", "typical", "worst"}


def test_marks_surround_anchors_and_answer_only() -> None:
    text = "<think>a < b <timestamp>1 to 2</timestamp> <timestamp>3</think><answer>1 to 2</answer>"
    assert marked(text) == (
        '&lt;think&gt;a &lt; b <mark class="anchor">&lt;timestamp&gt;1 to 2&lt;/timestamp&gt;</mark> '
        '&lt;timestamp&gt;3&lt;/think&gt;<mark class="answer">&lt;answer&gt;1 to 2&lt;/answer&gt;</mark>'
    )
    assert marked("<timestamp>" * 5000).count("mark") == 0


def test_both_ends_of_a_rollout_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = GroundingSample("a", Path("v.mp4"), "q", (Span(1, 2),), 8.0, "train")
    path = tmp_path / "rollouts.jsonl"
    write_jsonl(path, [rollout_group(sample, step) for step in range(20) for _ in range(3)])
    with path.open("a") as file:
        file.write('{"half')
    monkeypatch.setattr("tartvg.report.runs.TAIL_BYTES", 6000)
    first, last = first_and_last_groups(path)
    assert [g.step for g in first] == [0, 0, 0]
    assert [g.step for g in last] == [19, 19, 19]
    write_jsonl(path, [rollout_group(sample, 4)])
    first, last = first_and_last_groups(path)
    assert (len(first), len(last)) == (1, 0)


def test_thumbnails_show_the_right_moments(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    video = demo[1]["q0"].video
    for time, image in zip((0.5, 3.5, 6.5), thumbnails(video, [0.5, 3.5, 6.5]), strict=True):
        pixels = np.asarray(image).astype(int)
        assert pixels.shape == (96, 160, 3)
        red = (pixels[:, :, 0] - pixels[:, :, 1]) > 80
        assert np.nonzero(red)[1].mean() == pytest.approx(20 * time + 10, abs=4)
    late = thumbnails(video, [1.0, 500.0])
    assert len(late) == 2
    with pytest.raises(ValueError, match=r"gone\.mp4"):
        thumbnails(video.with_name("gone.mp4"), [0.5])


def test_film_strips_are_pictures(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    video = demo[1]["q0"].video
    assert Image.open(io.BytesIO(contact_row(video, SECONDS))).size == (8 * 160, 96)
    png = film_strip(video, SECONDS, [Span(1, 3)], [Span(0, 5), Span(1, 3.5)], Span(1, 3.5), "costs $5 and $6")
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG" and picture.width > 800
    colours = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3)[::7]}
    assert {(0, 158, 115), (0, 114, 178), (213, 94, 0)} <= colours
    assert film_strip(video, SECONDS, [], [Span(5, 1), Span(90, 99)], None, "")
    with pytest.raises(ValueError, match="duration"):
        film_strip(video, 0.0, [], [], None, "")


def test_running_mean() -> None:
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_the_page_is_the_same_every_time(demo: tuple[Path, dict[str, GroundingSample], str], tmp_path: Path) -> None:
    run, samples, page = demo
    assert build_report(run, samples, tmp_path / "again.html").read_text("utf-8") == page


def test_scores_are_plain_json(demo: tuple[Path, dict[str, GroundingSample], str]) -> None:
    value = json.loads((demo[0] / "evaluate" / "grpo2" / "scores.json").read_text())
    assert set(value["recall"]) == {"0.3", "0.5", "0.7"}


def test_throughput_and_memory_by_stage():
    lines = [
        {"progress/step": s, "perf/seconds_per_step": 2.0 + s, "perf/tokens_per_second_sampled": 100.0,
         "perf/mfu": 0.25, "memory/peak_gib": 1.0 + s}
        for s in range(3)
    ]  # fmt: skip
    table = throughput_table({"grpo1": lines, "sft": [{"progress/step": 0, "loss/total": 1.0}]})
    assert [[cell.text for cell in row] for row in table.rows] == [["grpo1", "3.00", "100", DASH, "25.0", "3.00"]]
    assert throughput_table({"sft": [{"loss/total": 1.0}]}) is None
