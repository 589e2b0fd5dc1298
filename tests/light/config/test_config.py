"""The settings: every YAML composes, precedence, refusals, run folders. Nothing here may import torch."""

import json
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from forking import call_here
from helpers.settings import RECORDING_STAGE, ROOT, composed, composed_below, composer, files
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from tartvg.config import AdvantageScale, Config, Credit, IouKind, SettingError, StageName, Strategy
from tartvg.config.errors import explain
from tartvg.launch.job import MAX_FOLDER_LENGTH, job_name
from tartvg.launch.sweep_files import axes, cells
from tartvg.launch.sweeps import jobs_below

GROUPS = ["dataset", "difficulty", "anchors", "reward", "grpo", "trainer", "tracking", "monitors", "policy", "stage"]
GROUND = ["video=clip.mp4", "query=a door opens"]
"""What stage=ground cannot do without."""
PARTS = ["dataset.parts={planted: 1, planted_long: 2}"]
"""What dataset=mix cannot do without."""


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def run(*arguments: str, cwd: Path, flags: Sequence[str] = ()) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command in an interpreter, and its processor time in seconds: other work on the machine barely changes it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TARTVG_ROOT", "HYDRA_FULL_ERROR")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *flags, str(ROOT / "run.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def run_clone(clone: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The clone's run.py in a copy of this process, which has imported Hydra already."""
    said, errors = cwd / ".stdout", cwd / ".stderr"
    process = call_here(become, clone, cwd, arguments, output=said, errors=errors)
    done = subprocess.CompletedProcess(arguments, process.wait(120), said.read_text(), errors.read_text())
    said.unlink()
    errors.unlink()
    return done


def become(clone: Path, cwd: Path, arguments: Sequence[str]) -> int:
    """Turn this process into the clone's run.py."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tartvg"]:
        del sys.modules[name]
    for name in ("TARTVG_ROOT", "HYDRA_FULL_ERROR"):
        os.environ.pop(name, None)
    GlobalHydra.instance().clear()
    os.chdir(cwd)
    sys.path.insert(0, str(clone))
    sys.argv = [str(clone / "run.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0  # type: ignore[return-value]
    return 0


def run_within(
    seconds: float, *arguments: str, cwd: Path, flags: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """The command, which must answer in time at least once in three attempts."""
    for _ in range(3):
        done, taken = run(*arguments, cwd=cwd, flags=flags)
        if taken < seconds:
            return done
    raise AssertionError(f"{arguments} takes {taken:.1f} s")


# --- every YAML is a test case


@pytest.mark.parametrize("group,choice", [(group, choice) for group in GROUPS for choice in choices(group)])
def test_every_choice_composes_and_validates(group: str, choice: str) -> None:
    composed(f"{group}={choice}", *GROUND, *(PARTS if choice == "mix" else ()))


@pytest.mark.parametrize("sweep", files("sweeps"))
def test_every_sweep_composes_and_so_does_each_of_its_jobs(sweep: str) -> None:
    with composer():
        cfg: DictConfig = compose("config", overrides=[f"sweeps={sweep}"], return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert len(cfg.hydra.sweeper.params) >= 1
    of = axes(cfg.hydra.sweeper.params)
    # The seeds alone differ only where nothing else does: one cell of each variant, and every seed without variants.
    named = {}
    for cell in cells(of):
        variant = tuple(o for o in cell if not o.startswith("seed="))
        if variant not in named or not variant:
            named[variant] = composed(f"sweeps={sweep}", *cell).name
    # One folder per cell, or the cells would overwrite each other.
    folders = [
        (
            named[tuple(o for o in cell if not o.startswith("seed="))],
            [o for o in cell if not o.startswith("experiments=")],
        )
        for cell in cells(of)
    ]
    names = {job_name(name, ",".join(rest)) for name, rest in folders}
    assert len(names) == len(cells(of))
    assert of["seed"] == ["0", "1", "2"]
    assert sweep == "seeds" or cfg.name == sweep


@pytest.mark.parametrize("experiment", files("experiments") or [pytest.param("", marks=pytest.mark.skip("none yet"))])
def test_every_experiment_composes_and_names_its_run(experiment: str) -> None:
    # The names of jobs leave `experiments` out, so two experiments in one sweep need run folders of their own.
    assert composed(f"experiments={experiment}").name != Config().name


def test_every_file_says_what_it_is() -> None:
    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")]:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), f"{path} has no header"


def test_a_policy_is_named_like_its_file() -> None:
    for choice in choices("policy"):
        assert composed(f"policy={choice}", *GROUND).policy.name == choice


def test_stage_and_dataset_files_cover_the_enums_and_choose_themselves() -> None:
    assert choices("stage") == sorted(name.value for name in StageName)
    for choice in choices("stage"):
        assert composed(f"stage={choice}", *GROUND).stage.name.value == choice
    for choice in choices("dataset"):
        parts = PARTS if choice == "mix" else ()
        assert composed(f"dataset={choice}", *GROUND, *parts).dataset.name.value == choice


# --- values that the paper states, and ours that follow from them


def test_default_is_the_papers_method() -> None:
    config = composed()
    reward, rule = config.reward, config.filter
    assert (reward.format_weight, reward.beta, reward.gamma, reward.iou) == (3.0, 5.0, 1.0, IouKind.soft)
    assert (config.anchors.count, rule.min_reward, rule.min_anchors, rule.min_ious) == (2, 6.4, 2, [0.5, 0.7])
    assert (config.policy.lora.rank, config.policy.lora.alpha) == (16, 32)
    training = [stage.value for stage in config.stage.sequence if stage not in (StageName.evaluate, StageName.report)]
    assert training == ["grpo1", "filter", "sft", "grpo2"]


@pytest.mark.parametrize("choice", choices("anchors"))
def test_filter_asks_the_same_share_of_the_best_total(choice: str) -> None:
    config = composed(f"anchors={choice}", *GROUND)
    k, reward = config.anchors.count, config.reward
    best = reward.format_weight + reward.iou_weight + reward.tar1_weight * k * (k + 1) / 2 + reward.gamma * (k - 1)
    assert config.filter.min_reward == pytest.approx(0.8 * best)
    assert config.filter.min_anchors == len(config.filter.min_ious) == k
    assert config.anchors.max_count == k + 1


def test_grpo_variants_differ_from_the_default_only_in_their_idea() -> None:
    def changed(variant: str) -> set[str]:
        default, other = composed().grpo, composed(f"grpo={variant}", *GROUND).grpo
        return {name for name in vars(default) if getattr(default, name) != getattr(other, name)}

    assert changed("dr_grpo") == {"advantage_scale", "loss_aggregation"}
    assert composed("grpo=dr_grpo", *GROUND).grpo.advantage_scale is AdvantageScale.none
    assert changed("dapo") == {"clip_high", "kl_coef", "loss_aggregation", "mask_truncated", "drop_zero_variance"}
    assert changed("gspo") == {"importance_level", "clip_low", "clip_high"}
    assert changed("gdpo") == {"normalise"} and changed("kl_free_times") == {"kl_time_coef"}
    assert composed("grpo=kl_free_times", *GROUND).grpo.kl_time_coef == 0.0


def test_credit_is_one_setting_beside_any_other() -> None:
    config = composed("stage=grpo1", "reward.beta=5", "grpo.credit=potential")
    assert config.grpo.credit is Credit.potential and composed().grpo.credit is Credit.outcome
    reward, graded = (vars(composed(f"reward={name}", *GROUND).reward) for name in ("tar", "tar_graded"))
    assert {name for name in reward if reward[name] != graded[name]} == {"format_kind"}


def test_thinking_or_not_has_the_same_number_of_rollouts() -> None:
    direct, timezero, one, two = (composed(f"experiments=thinking/{n}") for n in ("direct", "timezero", "one", "two"))
    assert direct.anchors.is_direct and not timezero.anchors.is_direct
    assert vars(direct.reward) == vars(timezero.reward) and direct.reward.tar1_weight == 0
    both = [config.grpo.steps_of("grpo1") + config.grpo.steps_of("grpo2") for config in (direct, one, two)]
    assert both == [timezero.grpo.max_steps] * 3 and StageName.grpo1 not in direct.stage.sequence
    assert (one.anchors.count, two.anchors.count) == (1, 2)


# --- precedence: schema < group < policy < stage < experiment < command line


def test_policy_sets_learning_rate_and_trainer_whatever_the_grpo_variant() -> None:
    for variant in choices("grpo"):
        assert composed(f"grpo={variant}", *GROUND).grpo.lr == composed().grpo.lr
        assert composed("policy=qwen2_5_vl_7b", f"grpo={variant}").grpo.lr == 1e-6
    assert composed("policy=qwen2_5_vl_7b").trainer.accelerator == "gpu"
    assert composed("policy=qwen2_5_vl_7b", "trainer=zero3").trainer.strategy is Strategy.zero3
    assert composed("trainer=cpu", "policy=qwen2_5_vl_7b").trainer.accelerator == "cpu"


def test_command_line_beats_stage_beats_group_beats_schema(clone: Path) -> None:
    stage = clone / "conf" / "stage" / "grpo1.yaml"
    assert composed_below(clone, "stage=grpo1").grpo.clip_high == 0.2
    assert composed_below(clone, "stage=grpo1", "grpo=dapo").grpo.clip_high == 0.28
    stage.write_text("# @package _global_\nstage:\n  name: grpo1\ngrpo:\n  clip_high: 0.3\n")
    assert composed_below(clone, "stage=grpo1", "grpo=dapo").grpo.clip_high == 0.3
    assert composed_below(clone, "stage=grpo1", "grpo=dapo", "grpo.clip_high=0.4").grpo.clip_high == 0.4


def test_experiment_beats_stage_and_policy_and_may_choose_groups(clone: Path) -> None:
    folder = clone / "experiments" / "clip"
    folder.mkdir()
    (folder / "higher.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /reward: tar1\n  - override /trainer: ddp\n"
        "name: clip\nevaluate:\n  policies: [sft]\ngrpo:\n  lr: 0.5\n"
    )
    chosen = ("policy=qwen2_5_vl_3b", "experiments=clip/higher")
    config = composed_below(clone, *chosen)
    assert (config.name, config.evaluate.policies, config.grpo.lr) == ("clip", ["sft"], 0.5)
    assert (config.reward.gamma, config.trainer.strategy) == (0.0, Strategy.ddp)
    assert composed_below(clone, *chosen, "reward=tar", "grpo.lr=0.1").reward.gamma == 1.0
    assert composed_below(clone, *chosen, "reward=tar", "grpo.lr=0.1").grpo.lr == 0.1


# --- refusals


@pytest.mark.parametrize(
    "file,old,new,named",
    [
        ("conf/stage/check_data.yaml", "name:", "nmae:", "stage/check_data.yaml: stage.nmae"),
        ("conf/reward/tar.yaml", "beta:", "bta:", "reward/tar.yaml: reward.bta"),
        ("conf/reward/tar.yaml", "beta: 5.0", "beta: five", "reward/tar.yaml: reward.beta"),
        ("conf/policy/tiny.yaml", "max_new_tokens", "max_tokens", "policy/tiny.yaml: grpo.sampling.max_tokens"),
        ("sweeps/seeds.yaml", "hydra:", "sede: 1\nhydra:", "sweeps/seeds.yaml: sede"),
    ],
)
def test_typo_inside_a_file_is_refused_with_the_file_and_the_setting(
    clone: Path, file: str, old: str, new: str, named: str
) -> None:
    text = (clone / file).read_text()
    assert old in text
    (clone / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigCompositionException) as caught:
        composed_below(clone, "stage=check_data", "sweeps=seeds")
    assert explain(caught.value).startswith(named)


def test_unknown_key_appended_with_a_plus_is_refused() -> None:
    for override, named in [
        ("+reward.bta=1", "reward.bta is"),
        ("+new=1", "new is"),
        ("+policy.lora.r=8", "lora.r is"),
    ]:
        with pytest.raises(SettingError, match=named):
            composed(override)


def test_experiment_without_its_package_header_is_refused(clone: Path) -> None:
    (clone / "experiments" / "bare.yaml").write_text("reward:\n  beta: 1.0\n")
    with pytest.raises(SettingError, match="experiments"):
        composed_below(clone, "experiments=bare")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a//b", "a/../b", "a/"])
def test_name_stays_below_runs_dir(name: str) -> None:
    with pytest.raises(SettingError, match="name"):
        Config(name=name)


@pytest.mark.parametrize(
    "override,expected",
    [
        ("reward.bta=1", ["reward.bta", "RewardConfig", "did you mean reward.beta?", "gamma"]),
        ("reward.beta=five", ["reward.beta", "five", "Float"]),
        ("stage=grpo3", ["stage=grpo3", "did you mean grpo2?", "pipeline"]),
        ("anchors.max_count=0", ["anchors.max_count", ">= 1", "0"]),
        ("grpo.credit=potental", ["grpo.credit", "outcome, return_to_go", "did you mean potential?"]),
        ("grpo.kl=k1", ["error: grpo.kl is now called grpo.kl_estimator\n"]),
    ],
)
def test_command_line_refusals_are_short_and_quick(tmp_path: Path, override: str, expected: list[str]) -> None:
    done = run_within(3.0, override, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for words in expected:
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_settings_answer_at_once_and_without_torch(tmp_path: Path, arguments: list[str]) -> None:
    """0.9 s on one machine, 2.7 s on another: Hydra copies its configuration for each of its groups."""
    done = run_within(5.0, *arguments, cwd=tmp_path, flags=("-X", "importtime"))
    assert done.returncode == 0
    assert "grpo" in done.stdout
    assert list(tmp_path.iterdir()) == []
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "omegaconf" in modules
    assert not modules & {"torch", "transformers", "peft", "deepspeed", "pytorch_lightning", "wandb"}


# --- run folders and how a run ends


def seen(cwd: Path) -> dict[str, list[int]]:
    runs = cwd / "runs"
    return {path.parent.relative_to(runs).as_posix(): json.loads(path.read_text()) for path in runs.rglob("seen.json")}


def test_single_run_writes_into_its_name_and_nothing_else(clone: Path, tmp_path: Path) -> None:
    (clone / "tartvg" / "stages.py").write_text(RECORDING_STAGE)
    done = run_clone(clone, tmp_path, "name=a/b")
    assert (done.returncode, done.stderr) == (0, "")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and clone not in path.parents] == [
        tmp_path / "runs" / "a" / "b" / "seen.json"
    ]


def test_exit_codes_of_a_single_run(clone: Path, tmp_path: Path) -> None:
    (clone / "tartvg" / "stages.py").write_text(RECORDING_STAGE)
    failed = run_clone(clone, tmp_path, "seed=1", "name=x")
    assert failed.returncode == 1
    assert "RuntimeError: no luck" in failed.stderr
    assert run_clone(clone, tmp_path, "seed=3", "name=y").returncode == 3


@pytest.mark.slow
def test_jobs_of_a_sweep_have_their_own_folders_and_survive_a_failure(clone: Path, tmp_path: Path) -> None:
    (clone / "tartvg" / "stages.py").write_text(RECORDING_STAGE)
    done = run_clone(clone, tmp_path, "sweeps=anchors", "anchors=one,three", "name=t", "stage=grpo1")
    assert done.returncode == 1
    assert done.stderr.count("\nRuntimeError: no luck") == 2
    assert "The job anchors=three,seed=1 failed (exit code 1)" in done.stderr
    assert "6 jobs in runs/t: 4 finished, 2 failed" in done.stderr
    assert "failed: anchors=three, seed=1 (exit code 1): RuntimeError: no luck" in done.stderr
    jobs = {folder.name: job.status for folder, job in jobs_below(tmp_path / "runs")}
    ended = {0: "finished", 1: "failed", 2: "finished"}
    assert jobs == {f"anchors={w},seed={s}": status for w in ("one", "three") for s, status in ended.items()}
    expected = {
        f"t/anchors={word},seed={seed}": [k, seed] for word, k in [("one", 1), ("three", 3)] for seed in (0, 1, 2)
    }
    assert seen(tmp_path) == expected


def test_a_table_needs_no_flag_and_one_cell_of_it_runs_in_its_place(clone: Path, tmp_path: Path) -> None:
    """As a W&B agent gives it: the same folder as in the whole sweep."""
    (clone / "tartvg" / "stages.py").write_text(RECORDING_STAGE.replace("config.seed])", "config.reuse_stages])"))
    done = run_clone(clone, tmp_path, "sweeps=anchors", "anchors=three", "seed=2")
    assert (done.returncode, seen(tmp_path)) == (0, {"anchors/anchors=three,seed=2": [3, True]})


def test_an_experiment_keeps_its_name_in_a_sweep(clone: Path, tmp_path: Path) -> None:
    (clone / "tartvg" / "stages.py").write_text(RECORDING_STAGE)
    done = run_clone(clone, tmp_path, "sweeps=stage_order", "experiments=stage_order/base", "seed=0,2")
    assert (done.returncode, seen(tmp_path)) == (
        0, {"stage_order/base/seed=0": [2, 0], "stage_order/base/seed=2": [2, 2]}
    )  # fmt: skip
    refused = run_clone(clone, tmp_path, "sweeps=stage_order", "experiments=stage_order/base", "seed=0", "name=x")
    assert refused.returncode == 2 and "name" in refused.stderr and "x/seed=0" not in seen(tmp_path)


@pytest.mark.slow
def test_jobs_of_a_sweep_share_a_group(clone: Path, tmp_path: Path) -> None:
    (clone / "tartvg" / "stages.py").write_text("def run(config):\n    print('group', config.tracking.group)\n")
    for extra, group in (([], "t/anchors"), (["tracking.group=mine"], "mine")):
        done = run_clone(
            clone, tmp_path, "sweeps=anchors", "anchors=one,two", "seed=0", "name=t", "stage=grpo1", *extra
        )
        assert {line for line in done.stdout.splitlines() if line.startswith("group")} == {f"group {group}"}
    done = run_clone(clone, tmp_path, "sweeps=stage_order", "seed=0")  # whose variants bring their own names
    assert {line for line in done.stdout.splitlines() if line.startswith("group")} == {"group stage_order/stage_order"}
    done = run_clone(clone, tmp_path, "name=t")
    assert "group None" in done.stdout, "the tracker takes the name of the run"


def test_sweep_of_several_devices_needs_an_outer_launcher(clone: Path, tmp_path: Path) -> None:
    (clone / "tartvg" / "stages.py").write_text(RECORDING_STAGE)
    done = run_clone(clone, tmp_path, "-m", "seed=0", "trainer=ddp")
    assert done.returncode == 2
    assert "trainer.devices" in done.stderr
    assert seen(tmp_path) == {}


def test_job_name_by_hand() -> None:
    assert job_name("default", "seed=0") == "default/seed=0"
    assert job_name("a/b", "anchors=one,seed=0") == "a/b/anchors=one,seed=0"
    assert job_name("default", "") == "default"


@given(st.text(min_size=1, max_size=400), st.text(min_size=1, max_size=400))
def test_job_names_are_valid_and_distinct(first: str, second: str) -> None:
    name = job_name("default", first)
    Config(name=name)
    assert len(name.split("/")) == 2
    assert len(name) <= len("default/") + MAX_FOLDER_LENGTH + len("-01234567")
    assert (name == job_name("default", second)) == (first == second)
