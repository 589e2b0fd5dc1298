"""Measuring a policy while it is trained, and keeping the best of its states."""

import json
import shutil

import pytest
from forking import start as start_command
from interruptions import kill_when, num_lines, rows

from tartvg.config import SamplingConfig, SettingError, ValidationConfig
from tartvg.policy.loading import ADAPTER_FILE
from tartvg.training.validation import BEST, ROWS, Questions, Validation

ASKED = [
    "validation.every=2", "validation.num_queries=3", "validation.keep_best=true", "grpo.max_steps=5", "grpo.lr=1e-3",
]  # fmt: skip
"""Measured after steps 2, 4 and 5; three queries, so that the two processes of a test have unequal shares."""


def row(step, miou):
    return {"step": step, "miou": miou, "num_unparsed": 0, "num_missing": 0}


def validation(folder, keep_best=True, max_steps=9):
    settings = ValidationConfig(every=2, keep_best=keep_best)
    return Validation(Questions(settings, [], SamplingConfig(), 4), folder, max_steps)


def saved(folder, step):
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))


def test_when_a_policy_is_measured(tmp_path):
    found = validation(tmp_path)
    assert [step for step in range(10) if found.is_due(step)] == [2, 4, 6, 8, 9]


def test_the_earliest_of_the_best_is_kept(tmp_path):
    found = validation(tmp_path)
    for step, miou in ((2, 0.0), (4, 0.5), (6, 0.5), (8, 0.4)):
        found.keep(row(step, miou), lambda folder, step=step: saved(folder, step))
    assert (found.chosen() / "weights").read_text() == "4"
    assert json.loads((tmp_path / BEST / "best.json").read_text())["step"] == 4
    assert [r["step"] for r in rows(tmp_path / ROWS)] == [2, 4, 6, 8]
    again = validation(tmp_path)
    assert again.rows == found.rows and again.known(8)["eval/val/miou"] == 0.4
    assert validation(tmp_path, keep_best=False).chosen() is None


def test_an_adapter_without_its_row_is_saved_again(tmp_path):
    """A kill between the two: the row is missing, so the step is measured again."""
    validation(tmp_path).keep(row(2, 0.3), lambda folder: saved(folder, 2))
    (tmp_path / ROWS).unlink()
    (tmp_path / f".{BEST}" / "adapter").mkdir(parents=True)  # and another one in the middle of saving
    found = validation(tmp_path)
    assert not found.rows
    found.keep(row(2, 0.3), lambda folder: saved(folder, "2 again"))
    assert (found.chosen() / "weights").read_text() == "2 again"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_best": True}, "without validation.every"),
        ({"every": -1}, ">= 0"),
        ({"every": 5, "num_queries": 0}, "validation.num_queries"),
    ],
)
def test_settings_that_are_refused(values, message):
    with pytest.raises(SettingError, match=message):
        ValidationConfig(**values)


@pytest.fixture(scope="module")
def chosen(small, run_command, tmp_path_factory):
    """A stage that kept its best state, with the embedded policy."""
    folder = tmp_path_factory.mktemp("chosen")
    run_command(*small, *ASKED, "stage=grpo1", "trainer.checkpoint_every=1", f"runs_dir={folder}", "name=r")
    return folder / "r"


def logged(folder):
    """Steps with a validation mIoU, and these."""
    key = "eval/val/miou"
    return [(line["progress/step"], line[key]) for line in rows(folder / "metrics.jsonl") if key in line]


@pytest.mark.slow
def test_the_best_state_is_the_result_and_evaluation_agrees(chosen, small, run_command):
    stage = chosen / "grpo1"
    found = rows(stage / ROWS)
    assert [r["step"] for r in found] == [2, 4, 5] and {r["num_queries"] for r in found} == {3}
    assert logged(stage) == [(r["step"], r["miou"]) for r in found]
    best = json.loads((stage / BEST / "best.json").read_text())
    assert best == max(found, key=lambda r: (r["miou"], -r["step"]))
    name = ADAPTER_FILE
    assert (stage / "adapter" / name).read_bytes() == (stage / BEST / "adapter" / name).read_bytes()
    run_command(*small, "stage=evaluate", f"evaluate.policies=[{stage / BEST / 'adapter'}]", "evaluate.split=val",
                "evaluate.num_queries=3", "evaluate.num_samples=0", "faithfulness.kinds=[]",
                f"runs_dir={chosen.parent}",
                "name=r")  # fmt: skip
    (scores,) = (chosen / "evaluate").glob("*/scores.json")
    assert json.loads(scores.read_text())["miou"]["value"] == pytest.approx(best["miou"], abs=1e-9)


@pytest.mark.slow
def test_a_stage_that_was_killed_keeps_the_same_best(chosen, small, run_command, tmp_path):
    command = [*small, *ASKED, "stage=grpo1", "trainer.checkpoint_every=1", f"runs_dir={tmp_path}", "name=r"]
    stage = tmp_path / "r/grpo1"
    process = start_command(command, tmp_path / "out", tmp_path / "err")
    kill_when(process, lambda: num_lines(stage / ROWS) >= 1)
    run_command(*command)
    for name in (ROWS, f"{BEST}/best.json", f"{BEST}/adapter/{ADAPTER_FILE}", f"adapter/{ADAPTER_FILE}"):
        assert (stage / name).read_bytes() == (chosen / "grpo1" / name).read_bytes(), name
    assert logged(stage) == logged(chosen / "grpo1")
    # As if the kill had come after the last checkpoint, before the last measurement.
    (stage / ROWS).write_text("".join(json.dumps(r) + "\n" for r in rows(stage / ROWS)[:-1]))
    (stage / "manifest.json").write_text(
        (stage / "manifest.json").read_text().replace('"finished": true', '"finished": false')
    )
    shutil.rmtree(stage / "adapter")
    run_command(*command)
    assert [r["step"] for r in rows(stage / ROWS)] == [2, 4, 5]
    assert logged(stage) == logged(chosen / "grpo1")
    assert (stage / "adapter" / ADAPTER_FILE).read_bytes() == (chosen / "grpo1/adapter" / ADAPTER_FILE).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_processes_measure_as_one_does(chosen, small, run_command, tmp_path, strategy):
    run_command(f"trainer={strategy}", *small, *ASKED, "stage=grpo1", "trainer.accelerator=cpu", "trainer.devices=2",
                "trainer.num_workers=0", "trainer.zero3.param_persistence_threshold=5000",
                f"runs_dir={tmp_path}", "name=r")  # fmt: skip
    stage = tmp_path / "r/grpo1"
    alone = rows(chosen / "grpo1" / ROWS)
    # Where training starts they are the same; rounding may part them later by a token.
    assert [r["step"] for r in rows(stage / ROWS)] == [r["step"] for r in alone] == [2, 4, 5]
    assert [r["miou"] for r in rows(stage / ROWS)] == pytest.approx([r["miou"] for r in alone], abs=0.05)
    assert (stage / "adapter" / ADAPTER_FILE).read_bytes() == (stage / BEST / "adapter" / ADAPTER_FILE).read_bytes()
