"""A whole method tracked offline and read back: W&B's own files hold what the run folder holds."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.settings import watched
from helpers.tracking import artifacts, wandb_records

from tartvg.records import group_from_json, read_jsonl
from tartvg.tracking.dashboard import workspace
from tartvg.tracking.tables import fault_names

STAGES = ("grpo1", "filter", "sft", "grpo2", "evaluate/base", "evaluate/grpo2", "controls/base", "controls/grpo2")
LINEAGE = {
    "grpo1": {("made", "rollouts"), ("made", "adapter")},
    "filter": {("used", "rollouts"), ("made", "traces")},
    "sft": {("used", "traces"), ("made", "adapter")},
    "grpo2": {("used", "adapter"), ("made", "rollouts"), ("made", "adapter")},
    "evaluate/base": {("made", "predictions")},
    "evaluate/grpo2": {("used", "adapter"), ("made", "predictions")},
    "controls/base": set(),
    "controls/grpo2": set(),
}


@pytest.fixture(scope="module")
def run(small, untrained_base, run_command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    run_command(
        *watched(small), "tracking.mode=offline", "stage.sequence=[grpo1,filter,sft,grpo2,evaluate]",
        "grpo.max_steps=1", "grpo.prompts_per_step=1", "grpo.group_size=2", "grpo.sampling.max_new_tokens=8",
        "sft.epochs=1",
        "evaluate.policies=[base,grpo2]", "evaluate.num_queries=4", "evaluate.num_samples=0",
        "faithfulness.num_queries=4",
        "filter.min_reward=-100", "filter.min_anchors=0", "filter.min_ious=[]",
        f"policy.path={untrained_base}", f"runs_dir={folder}", "name=r",
        is_real=True,  # forked, W&B's own process would be left before it has written everything
    )  # fmt: skip
    return folder / "r"


def history(records: list[Any]) -> dict[int, dict[str, Any]]:
    """Rows by `progress/step`, merged."""
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found.setdefault(row["progress/step"], {}).update(row)
    return found


def tables(folder: Path, name: str) -> list[Any]:
    found = sorted(folder.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json"))
    return [json.loads(path.read_text()) for path in found]


def headlines(records: list[Any]) -> dict[str, Any]:
    """The summary of a run."""
    updates = [i for r in records if r.WhichOneof("record_type") == "summary" for i in r.summary.update]
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in updates}


@pytest.mark.slow
def test_wandb_holds_every_metric_table_and_artifact(run: Path) -> None:
    made: dict[str, set[tuple[str, str]]] = {}
    for stage in STAGES:
        records = wandb_records(run / stage)
        rows = history(records)
        for line in map(json.loads, (run / stage / "metrics.jsonl").read_text().splitlines()):
            kept = {name: value for name, value in line.items() if value is not None}
            assert kept.items() <= rows[line["progress/step"]].items(), stage
        own = [a for a in artifacts(records) if a.type in ("adapter", "rollouts", "traces", "predictions")]
        assert {("used" if a.use_after_commit else "made", a.type) for a in own} == LINEAGE[stage], stage
        for a in own:
            if a.use_after_commit:
                assert (a.name, a.digest) in made["all"], "what a stage uses is what another one made"
            made.setdefault("all", set()).add((a.name, a.digest))
        started = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (started.run_group, started.job_type) == ("r", stage.partition("/")[0])
        assert {"dataset:planted", "seed:0", "anchors:2"} <= set(started.tags)
    # W&B groups by the values of a column: as many of each as rollouts.jsonl has.
    (table,) = tables(run / "grpo1", "rollout/examples")
    at = table["columns"].index("faults")
    said = [r for g in read_jsonl(run / "grpo1" / "rollouts.jsonl") for r in group_from_json(g).rollouts]
    names = (fault_names([f.value for f in r.response.faults], r.completion.is_finished) for r in said)
    assert Counter(row[at] for row in table["data"]) == Counter(", ".join(n) or "none" for n in names)
    (answers,) = tables(run / "evaluate/grpo2", "eval/planted/answers")
    assert len(answers["data"]) == 4
    assert len(list((run / "evaluate/grpo2").glob("wandb/offline-run-*/files/media/images/eval/planted/*.png"))) == 4
    summary = headlines(wandb_records(run / "evaluate/grpo2"))
    scores = [json.loads((run / f"evaluate/{t}/metrics.jsonl").read_text()) for t in ("base", "grpo2")]
    for name in ("miou", "r1@0.7", "format_rate", "valid_rate"):
        gain = scores[1][f"eval/planted/{name}"] - scores[0][f"eval/planted/{name}"]
        assert summary[f"over_base/planted/{name}"] == gain
    assert not [name for name in headlines(wandb_records(run / "evaluate/base")) if name.startswith("over_base")]


@pytest.mark.slow
def test_the_workspace_names_only_metrics_of_a_real_run(run: Path) -> None:
    logged = set()
    for stage in STAGES:
        for row in history(wandb_records(run / stage)).values():
            logged |= {re.sub("/(path|filenames)$", "", name) for name in row}
    # An untrained model says no times to compare with shuffled frames, and the peak of a CPU is not known.
    assert workspace("planted").metrics - logged <= {"anchors/shuffled_agreement", "perf/mfu"}
