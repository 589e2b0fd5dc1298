"""The curriculum from stage=rollouts over the selection to the report."""

import json
import re

import pytest
from interruptions import rows


@pytest.fixture(scope="module")
def measured(settings, run_command, tmp_path_factory):
    """A runs_dir whose run `m` has asked every training query once."""
    folder = tmp_path_factory.mktemp("runs")
    run_command(*settings, f"runs_dir={folder}", "name=m", "stage=rollouts", "difficulty.passes=1")
    return folder


@pytest.mark.slow
def test_every_training_query_is_measured_and_the_rest_is_trained_on(settings, measured, run_command):
    found = rows(measured / "m/rollouts/difficulty.jsonl")
    groups = rows(measured / "m/rollouts/rollouts.jsonl")
    assert len(found) == len({g["prompt"]["sample"]["sample_id"] for g in groups}) == 6 * 2
    assert all(len(row["rewards"]) == len(row["ious"]) == 4 for row in found)
    means = {row["sample_id"]: sum(row["rewards"]) / 4 for row in found}
    low = sorted(means.values())[6]
    command = [*settings, f"runs_dir={measured}", "name=m", "stage=grpo1"]
    band = ["difficulty.keep=band", "difficulty.measure=reward", f"difficulty.low={low}", "difficulty.high=100"]
    done = run_command(*command, *band)
    kept = {name for name, mean in means.items() if mean >= low}
    assert f"grpo1: difficulty.keep=band keeps {len(kept)} of 12 queries (mean reward in [" in done.stdout
    trained = rows(measured / "m/grpo1/rollouts.jsonl")
    assert {g["prompt"]["sample"]["sample_id"] for g in trained} <= kept
    counts = json.loads((measured / "m/grpo1/difficulty.json").read_text())
    assert (counts["num_queries"], counts["num_kept"], sum(counts["measured"])) == (12, len(kept), 12)
    assert "finished before" in run_command(*command, *band).stdout
    run_command(*command, "stage=report")
    report = (measured / "m/report/report.md").read_text()
    assert "Queries of grpo1 by the base's mean" in report
    for stage in ("rollouts", "grpo1"):  # each completion is on the page, with what its tokens were paid
        page = (measured / f"m/report/rollouts_{stage}.html").read_text()
        data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
        shown = [g for step in data["steps"] for g in step["groups"]]
        assert len(shown) == len(rows(measured / f"m/{stage}/rollouts.jsonl"))
        assert all(isinstance(value, float) for g in shown for r in g["rollouts"] for _, value in r["parts"])
    # another rule is another stage, and no rule asks for no measurement
    other = [*command, *band, "difficulty.low=-100"]
    refused = run_command(*other, check=False)
    assert refused.returncode == 2 and "difficulty.low -11.0 -> -100.0" in refused.stderr
    assert "its settings or inputs changed" in run_command(*other, "overwrite=true").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["name=m", "difficulty.low=99", "difficulty.high=100", "overwrite=true"],
            "difficulty.keep=band: no query is left (mean IoU in [",
        ),
        (["name=new"], "rollouts/difficulty.jsonl: run stage=rollouts with the same name first"),
        (["name=new", "difficulty.file=nowhere.jsonl"], "difficulty.file: there is no file nowhere.jsonl"),
        (["name=new", "difficulty.file={}/m/rollouts/rollouts.jsonl"], "is not what stage=rollouts writes"),
    ],
)
def test_refusals_are_one_line(overrides, said, settings, measured, run_command):
    given = [override.replace("{}", str(measured)) for override in overrides]
    done = run_command(*settings, f"runs_dir={measured}", "stage=grpo1", "difficulty=band", *given, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and said in line
