"""Sweeps: axes and cells, records of jobs, stages done once for several runs."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.settings import ROOT, composed, files
from omegaconf.errors import OmegaConfBaseException

from tartvg.config import Config, SettingError
from tartvg.config.errors import explain
from tartvg.launch.sweep_files import axes, cells, main, read_sweep, wandb_sweep
from tartvg.launch.sweeps import Job, jobs_below, read_job, summary
from tartvg.stages.folder import StageFolder, read_manifest
from tartvg.stages.shared import PLACE, code_identity, identity, result_files

# --- axes and cells


def test_axes_and_cells_by_hand() -> None:
    of = axes({"anchors": "one,two", "filter.min_ious": "[0.3,0.5],[0.5,0.7]", "seed": "0,1"}, ["seed=7", "x=2"])
    assert of == {
        "anchors": ["one", "two"],
        "filter.min_ious": ["[0.3,0.5]", "[0.5,0.7]"],
        "seed": ["7"],
        "x": ["2"],
    }
    assert cells({"a": ["1", "2"], "b": ["x", "y"]}) == [
        ["a=1", "b=x"],
        ["a=1", "b=y"],
        ["a=2", "b=x"],
        ["a=2", "b=y"],
    ]


def test_every_table_of_the_issue_is_there_with_three_seeds() -> None:
    expected = {
        "anchors": 3, "tar_components": 3, "iou_kind": 2, "tar2_form": 3, "filter_thresholds": 6, "stage_order": 5,
        "group_size": 3, "kl": 4, "beta_gamma": 9, "seeds": 1, "truth": 3, "difficulty": 4, "learning_rate": 3,
        "credit": 6, "credit_terms": 4, "thinking": 4, "budget": 12,
    }  # fmt: skip
    assert set(files("sweeps")) == set(expected)
    for name, variants in expected.items():
        assert len(cells(axes(read_sweep(name, ROOT)["hydra"]["sweeper"]["params"]))) == 3 * variants, name


@pytest.mark.parametrize("name", files("sweeps"))
def test_the_wandb_sweep_has_the_cells_of_the_sweep(name: str) -> None:
    value = wandb_sweep(name, ROOT)
    assert (value["method"], value["program"]) == ("grid", "run.py")
    assert f"sweeps={name}" in value["command"] and value["command"][-1] == "${args_no_hyphens}"
    given = cells({key: item["values"] for key, item in value["parameters"].items()})
    assert given == cells(axes(read_sweep(name, ROOT)["hydra"]["sweeper"]["params"]))
    json.dumps(value)


def test_the_command_prints_a_wandb_sweep_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kl"]) == 0
    assert "grpo.kl_coef:\n    values:\n    - '0'" in capsys.readouterr().out
    assert main(["nothing"]) == 2
    assert "anchors" in capsys.readouterr().err
    with pytest.raises(SettingError, match="no sweep"):
        read_sweep("../setup", ROOT)


@pytest.mark.slow
def test_variants_of_the_stage_order_draw_the_same_number_of_rollouts() -> None:
    """Steps of grpo1, of drawing without learning and of grpo2, added up over what each variant runs."""
    for policy in ("tiny", "qwen2_5_vl_3b", "qwen2_5_vl_7b"):
        steps = {}
        for name in ("grpo_only", "sft_grpo", "grpo_sft_grpo", "timezero"):
            config = composed(f"experiments=stage_order/{name}", f"policy={policy}")
            sequence = [s.value for s in config.stage.sequence]
            steps[name] = sum(config.grpo.steps_of(s) for s in ("rollouts", "grpo1", "grpo2") if s in sequence)
        grpo = composed(f"policy={policy}").grpo
        assert set(steps.values()) == {grpo.max_steps + (grpo.max_steps_grpo2 or grpo.max_steps)}
    assert composed("experiments=stage_order/timezero").anchors.prompt is composed().anchors.prompt
    assert composed("experiments=stage_order/base").evaluate.policies == ["base"]


def test_group_sizes_draw_the_same_number_of_completions() -> None:
    for size in (4, 8, 16):
        grpo = composed("sweeps=group_size", f"grpo.group_size={size}").grpo
        assert grpo.group_size * grpo.prompts_per_step == 64
    with pytest.raises(OmegaConfBaseException) as caught:
        composed("sweeps=group_size", "grpo.group_size=30")
    assert explain(caught.value) == "grpo.prompts_per_step: 64 is not a multiple of 30"
    with pytest.raises(OmegaConfBaseException) as caught:
        composed("experiments=stage_order/grpo_only", "policy.name=mine")
    assert explain(caught.value).startswith("grpo.max_steps: there is no number for mine among tiny, ")
    assert composed("experiments=stage_order/grpo_only", "policy.name=mine", "grpo.max_steps=7").grpo.max_steps == 7


# --- records of jobs


def test_a_job_says_what_became_of_it(tmp_path: Path) -> None:
    good, bad, cut = (tmp_path / f"x={i}" for i in range(3))
    for folder in (good, bad, cut):
        Job([folder.name, "seed=0", "same=7"]).save(folder)
    found = read_job(good)
    assert found is not None and (found.status, found.overrides) == ("running", ["x=0", "seed=0", "same=7"])
    found.end(good, 0)
    failed = read_job(bad)
    assert failed is not None
    failed.end(bad, 2, "reward.beta must be >= 0")
    assert [job.status for _, job in jobs_below(tmp_path)] == ["finished", "failed", "running"]
    text = summary(tmp_path, 0.0)
    assert "3 jobs" in text and "1 finished, 1 failed, 1 not at an end" in text
    assert "failed: x=1, seed=0 (exit code 2): reward.beta must be >= 0" in text
    assert summary(tmp_path, time.time() + 60) == ""
    (good / "job.json").write_text("{")
    assert read_job(good) is None and len(list(jobs_below(tmp_path))) == 2


# --- stages that are done once


def toy(config: Config, value: int = 1, kind: str = "grpo1") -> StageFolder:
    return StageFolder(
        Path(config.runs_dir) / config.name / kind, config, lambda: {"value": value, "seed": config.seed}
    )


def do(place: StageFolder, pause: float = 0.0) -> bool:
    """A stage that writes two files and, beside the runs, a line for each time it was really done."""
    with place.work() as is_needed:
        if is_needed:
            time.sleep(pause)
            (place.folder / "adapter").mkdir(exist_ok=True)
            (place.folder / "adapter" / "weights").write_text(str(place.inputs))
            (place.folder / "metrics.jsonl").write_text('{"progress/step": 0}\n')
            (place.folder / "checkpoints").mkdir(exist_ok=True)
            (place.folder / "wandb_id").write_text("mine")
            with (Path(place.config.runs_dir) / "done.txt").open("a") as file:
                file.write(f"{place.folder}\n")
        return is_needed


def config_at(runs: Path, name: str, is_sharing: bool | None = True) -> Config:
    return replace(composed(), runs_dir=str(runs), name=name, reuse_stages=is_sharing)


def test_a_finished_stage_is_skipped_and_a_damaged_one_done_again(tmp_path: Path) -> None:
    place = toy(config_at(tmp_path, "a", None))
    assert do(place) and not do(place)
    manifest = read_manifest(place.folder)
    assert manifest is not None and set(manifest["files"]) == {"adapter/weights", "metrics.jsonl"}
    (place.folder / "adapter" / "weights").write_text("cut")
    assert do(place) and not do(place)
    assert (place.folder.with_name("grpo1.old1") / "adapter" / "weights").read_text() == "cut"
    (place.folder / "metrics.jsonl").unlink()
    assert do(place)
    (place.folder / "manifest.json").write_text("{")
    assert do(place) and not do(place)
    assert len((tmp_path / "done.txt").read_text().splitlines()) == 4


def test_two_runs_share_a_stage_with_the_same_settings_only(tmp_path: Path) -> None:
    first, second = (toy(config_at(tmp_path, f"sweep/{name}")) for name in ("a", "b"))
    assert do(first) and not do(second)
    assert (second.folder / "adapter" / "weights").read_text() == (first.folder / "adapter" / "weights").read_text()
    manifest = read_manifest(second.folder)
    assert manifest is not None and manifest["finished"] and manifest["copied_from"] == "sweep/a/grpo1"
    assert not (second.folder / "wandb_id").exists() and not (second.folder / "checkpoints").exists()
    assert "name: sweep/b" in (second.folder / "config.yaml").read_text()
    assert do(toy(config_at(tmp_path, "sweep/c"), value=2))
    assert do(toy(replace(config_at(tmp_path, "sweep/d"), seed=5)))
    assert do(toy(config_at(tmp_path, "sweep/e"), kind="grpo2"))
    assert do(toy(config_at(tmp_path, "alone", is_sharing=None)))
    # A copy is a file of its own: what happens to it later does not reach the others.
    (second.folder / "metrics.jsonl").write_text("changed")
    assert (first.folder / "metrics.jsonl").read_text() == '{"progress/step": 0}\n'


@pytest.mark.parametrize("harm", ["edit", "remove", "entry", "escape"])
def test_what_is_not_as_it_was_is_not_shared(tmp_path: Path, harm: str) -> None:
    first = toy(config_at(tmp_path, "a"))
    do(first)
    (entry,) = (tmp_path / PLACE).glob("*.json")
    if harm == "edit":
        (first.folder / "adapter" / "weights").write_text("other")
    elif harm == "remove":
        (first.folder / "metrics.jsonl").unlink()
    elif harm == "entry":
        entry.write_text("[")
    else:
        value = json.loads(entry.read_text())
        value["files"]["../../outside"] = value["files"]["metrics.jsonl"]
        entry.write_text(json.dumps(value))
    assert do(toy(config_at(tmp_path, "b")))
    assert not (tmp_path / "outside").exists()
    assert not do(toy(config_at(tmp_path, "c")))  # the entry points to b now


def test_an_interrupted_stage_gives_way_to_a_finished_one(tmp_path: Path) -> None:
    cut = toy(config_at(tmp_path, "cut"))
    with pytest.raises(KeyboardInterrupt), cut.work():
        (cut.folder / "half").write_text("")
        raise KeyboardInterrupt
    assert do(toy(config_at(tmp_path, "whole")))
    assert not do(cut)
    assert not (cut.folder / "half").exists() and (cut.folder.with_name("grpo1.old1") / "half").exists()


def test_an_interrupted_stage_goes_on_where_the_finished_one_is_damaged(tmp_path: Path) -> None:
    cut, whole = (toy(config_at(tmp_path, name)) for name in ("cut", "whole"))
    with pytest.raises(KeyboardInterrupt), cut.work():
        (cut.folder / "half").write_text("")
        raise KeyboardInterrupt
    assert do(whole)
    (whole.folder / "metrics.jsonl").write_text("other")
    assert do(cut)
    assert (cut.folder / "half").exists() and not cut.folder.with_name("grpo1.old1").exists()


def test_identity_is_everything_that_moves_a_number(tmp_path: Path) -> None:
    config = config_at(tmp_path, "a")
    same = identity("grpo1", "key", config, {"torch": "2"})
    assert identity("grpo1", "key", replace(config, name="other", tracking=None), {"torch": "2"}) == same  # type: ignore[arg-type]
    gpu = replace(config, trainer=replace(config.trainer, accelerator="gpu"))
    others = [
        identity("grpo2", "key", config, {"torch": "2"}),
        identity("grpo1", "key2", config, {"torch": "2"}),
        identity("grpo1", "key", config, {"torch": "3"}),
        identity("grpo1", "key", gpu, {"torch": "2"}),
    ]
    assert len({same, *others}) == 5
    assert len(code_identity()) == 16


def test_links_and_hidden_files_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / ".b").write_text("")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert [p.as_posix() for p in result_files(tmp_path)] == ["a"]


def _work(runs: str, name: str, pause: float) -> None:
    do(toy(config_at(Path(runs), name)), pause)


def test_of_two_jobs_that_want_the_same_stage_one_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_work, args=(str(tmp_path), name, 0.5)) for name in ("a", "b")]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert len((tmp_path / "done.txt").read_text().splitlines()) == 1
    assert {read_manifest(tmp_path / n / "grpo1")["finished"] for n in ("a", "b")} == {True}  # type: ignore[index]


def test_a_job_that_dies_does_not_block_the_others(tmp_path: Path) -> None:
    victim = multiprocessing.get_context("fork").Process(target=_work, args=(str(tmp_path), "a", 600.0))
    victim.start()
    while not list((tmp_path / PLACE).glob("*.lock")) or not (tmp_path / "a" / "grpo1" / "manifest.json").exists():
        time.sleep(0.01)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert do(toy(config_at(tmp_path, "b")))
    assert not do(toy(config_at(tmp_path, "a")))
