"""What a stage's key is made of: the settings that change its result and the content of its inputs, nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forking import start as start_command
from helpers.settings import composed
from interruptions import PATIENCE, num_lines, results, rows
from omegaconf import OmegaConf

from tartvg.config import Config, SettingError, to_dataclasses
from tartvg.config.fields import Effect, flattened
from tartvg.launch.signals import REQUEUE_CODE
from tartvg.policy.loading import ADAPTER_FILE
from tartvg.records import to_json
from tartvg.stages import controls, evaluate, export, filter, grpo, rollouts, sft
from tartvg.stages.common import base_identity, refuse_missing_videos, train_data
from tartvg.stages.folder import StageFolder
from tartvg.stages.keys import BLOCK, UNKNOWN, comparable, data_identity, settings_of, video_identity
from tartvg.types import GroundingSample, Prompt, Span

EFFECTS = {name: effect for name, _, effect in flattened(Config())}
FEW = [f"dataset.planted.num_{split}=1" for split in ("train", "val", "test")]


# --- which settings


def in_grpo(config: Config) -> dict[str, Any]:
    return grpo.key_of(config, "grpo1", None)


@pytest.mark.slow
def test_every_setting_is_part_of_a_key_or_marked(untrained_base: Path, small: list[str], tmp_path: Path) -> None:
    config = composed(*small, *FEW, f"policy.path={untrained_base}", "validation.every=2")
    (tmp_path / "source").write_text("")
    keys = [
        grpo.key_of(config, "grpo1", None), grpo.key_of(config, "grpo2", None), rollouts.key_of(config),
        filter.key_of(config, tmp_path / "source"), sft.key_of(config, tmp_path / "source"),
        evaluate.key_of(config, None), controls.key_of(config, tmp_path / "source"),
        export.key_of(config, tmp_path / "source"),
    ]  # fmt: skip
    (tmp_path / "measured").write_text("{}")
    chosen = ["difficulty=band", "difficulty.passes=1", f"difficulty.file={tmp_path / 'measured'}"]
    keys += [
        key_of(composed(*small, *FEW, f"policy.path={untrained_base}", *chosen))
        for key_of in (in_grpo, rollouts.key_of)
    ]
    mixed = ["dataset=mix", "dataset.parts={planted: 1}", f"dataset.sources.planted.root={tmp_path}"]
    keys.append(in_grpo(composed("grpo.max_steps=2", *FEW, f"policy.path={untrained_base}", *mixed)))
    inputs = {
        "data",
        "validation_data",
        "base",
        "adapter",
        "traces",
        "rollouts",
        "predictions",
        "difficulties",
        "scores",
    }
    held = {name.replace("dataset.parts.planted", "dataset.parts") for key in keys for name in key} - inputs
    assert held == {name for name, effect in EFFECTS.items() if effect is Effect.value}
    for key in keys:
        assert not any(str(untrained_base.name) in str(value) or "/" in str(value) for value in key.values())


def test_the_other_stages_and_places_of_a_run_are_no_part_of_a_training(small: list[str], untrained_base: Path) -> None:
    config = OmegaConf.structured(composed(*small, *FEW, f"policy.path={untrained_base}"))

    def key(stage: str, name: str = "seed", value: Any = 0) -> dict[str, Any]:
        changed = config.copy()
        OmegaConf.update(changed, name, value)
        return grpo.key_of(to_dataclasses(changed), stage, None)

    same = key("grpo1")
    for name, value in (
        ("filter.min_reward", 1), ("grpo.max_steps_grpo2", 9), ("sft.lr", 1), ("evaluate.split", "val"), ("name", "x"),
        ("policy.feature_cache_gib", 0), ("policy.frames.timeout_s", 9), ("policy.logit_chunk", 7),
        ("trainer.num_threads", 3), ("dataset.planted.num_test", 2),
    ):  # fmt: skip
        assert key("grpo1", name, value) == same, name
    for name, value in (("grpo.max_steps", 9), ("seed", 1), ("reward.beta", 1), ("policy.lora.rank", 8)):
        assert key("grpo1", name, value) != same, name
    assert key("grpo1", "dataset.planted.seed", 1)["data"] != same["data"]
    assert key("grpo2", "grpo.max_steps_grpo2", 9)["grpo.max_steps_grpo2"] == 9
    assert "grpo.max_steps" not in key("grpo2") and "grpo.max_steps_grpo2" not in same


# --- the content of inputs


def sample(video: Path, query: str = "q", end: float = 2.0) -> GroundingSample:
    return GroundingSample("s_0", video, query, (Span(1.0, end),), 9.0, "train")


def test_a_video_is_its_size_and_three_of_its_blocks(tmp_path: Path) -> None:
    content = bytearray(os.urandom(10 * BLOCK))
    path, other = tmp_path / "a.mp4", tmp_path / "elsewhere.mp4"
    path.write_bytes(content)
    other.write_bytes(content)
    os.utime(other, (0, 0))
    known = video_identity(path)
    assert known is not None and video_identity(other) == known
    for place in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        other.write_bytes(changed)
        assert video_identity(other) != known, place
    other.write_bytes(content[:-1])
    assert video_identity(other) != known
    (tmp_path / "link.mp4").symlink_to(path)
    (tmp_path / "dangling.mp4").symlink_to("nowhere")
    assert video_identity(tmp_path / "link.mp4") == known
    assert video_identity(tmp_path / "dangling.mp4") is video_identity(tmp_path) is None
    (tmp_path / "empty.mp4").touch()
    assert video_identity(tmp_path / "empty.mp4") is not None


def test_data_are_their_questions_and_videos_wherever_they_lie(tmp_path: Path) -> None:
    here, there = tmp_path / "a.mp4", tmp_path / "there" / "a.mp4"
    there.parent.mkdir()
    here.write_bytes(b"one")
    there.write_bytes(b"one")
    same = data_identity([sample(here)])
    assert data_identity([sample(there)]) == same
    others = [[sample(here, "another")], [sample(here, end=3.0)], [sample(tmp_path / "gone.mp4")], [sample(here)] * 2]
    there.write_bytes(b"two")
    assert len({same, data_identity([sample(there)]), *map(data_identity, others)}) == 6


def test_spellings_of_a_base_are_one_base(untrained_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(untrained_base.parent)
    (tmp_path / "link").symlink_to(untrained_base)
    (tmp_path / "copy").mkdir()
    for file in untrained_base.iterdir():
        shutil.copy(file, tmp_path / "copy" / file.name)
    (tmp_path / "copy" / ".cache").mkdir()
    (tmp_path / "copy" / ".cache" / "a.lock").write_text("of a download")
    spellings = (untrained_base, f"{untrained_base}/", untrained_base.name, f"./{untrained_base.name}",
                 tmp_path / "link", tmp_path / "copy")  # fmt: skip
    config = composed()
    found = {base_identity(replace(config, policy=replace(config.policy, path=str(s)))) for s in spellings}
    assert len(found) == 1
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert base_identity(replace(config, policy=replace(config.policy, path=str(tmp_path / "copy")))) not in found


# --- what happens where a key differs


def place_of(config: Config, key: dict[str, Any], is_training: bool = True) -> StageFolder:
    folder = Path(config.runs_dir) / config.name / "grpo1"
    return StageFolder(folder, config, lambda: key, is_training=is_training)


def do(place: StageFolder) -> bool:
    with place.work() as is_needed:
        if is_needed:
            (place.folder / "result").write_text("days of work")
        return is_needed


def old_inputs(config: Config) -> dict[str, Any]:
    """What 0.1 wrote into the manifest of grpo1, paths and memory among it."""
    dataset = to_json(config.dataset)
    del dataset["max_missing_share"]
    own = {**to_json(config.grpo), "max_steps": 1, "max_steps_grpo2": None, "rows_per_pass": None}
    return {
        "policy": to_json(config.policy), "dataset": dataset, "anchors": to_json(config.anchors),
        "reward": to_json(config.reward), "grpo": own, "max_steps": config.grpo.max_steps, "seed": config.seed,
        "base": base_identity(config), "adapter": None, "threads": config.trainer.num_threads,
    }  # fmt: skip


def test_a_changed_training_names_each_setting_and_moves_nothing(tmp_path: Path) -> None:
    config = replace(composed(), runs_dir=str(tmp_path), name="r")
    assert do(place_of(config, {"seed": 0, "reward.beta": 5.0, "data": "a"}))
    other = replace(config, dataset=replace(config.dataset, root="/elsewhere"))
    changed = {"seed": 1, "reward.beta": 5.0, "data": "b", "validation.every": 5}
    with pytest.raises(SettingError) as caught, place_of(other, changed).work():
        pass
    said = str(caught.value)
    assert f"seed 0 -> 1, the videos or their annotations (dataset.root {config.dataset.root} -> /elsewhere)" in said
    assert "validation.every unset -> 5" in said and "overwrite=true" in said and "\n" not in said
    assert [p.name for p in (tmp_path / "r").iterdir() if p.is_dir()] == ["grpo1"]
    assert do(place_of(replace(other, overwrite=True), changed))
    assert not do(place_of(replace(other, overwrite=True), changed)), "what is the same is not done again"
    assert (tmp_path / "r" / "grpo1.old1" / "result").exists()


def test_an_interrupted_training_is_kept_as_well_and_other_stages_ask_nothing(tmp_path: Path) -> None:
    config = replace(composed(), runs_dir=str(tmp_path), name="r")
    with pytest.raises(KeyboardInterrupt), place_of(config, {"seed": 0}).work():
        (tmp_path / "r" / "grpo1" / "half").write_text("")
        raise KeyboardInterrupt
    with pytest.raises(SettingError, match="seed 0 -> 1"):
        do(place_of(config, {"seed": 1}))
    assert do(place_of(config, {"seed": 1}, is_training=False))
    assert (tmp_path / "r" / "grpo1.old1" / "half").exists()


def test_a_folder_of_version_0_1_matches_or_says_why_not(
    small: list[str], untrained_base: Path, tmp_path: Path
) -> None:
    config = replace(composed(*small, *FEW, f"policy.path={untrained_base}"), runs_dir=str(tmp_path), name="r")
    folder = tmp_path / "r" / "grpo1"
    folder.mkdir(parents=True)
    manifest = {"finished": True, "key": "0123", "inputs": old_inputs(config), "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    # the policy is called otherwise, its folder and that of the data are spelled in another way
    policy = replace(config.policy, name="mine", path=f"{untrained_base}/", feature_cache_gib=0.25)
    data = replace(config.dataset, root=f"{config.dataset.root}/../{Path(config.dataset.root).name}/")
    assert not do(place_of(config, grpo.key_of(config, "grpo1", None)))
    moved = replace(config, policy=policy, dataset=data)
    assert not do(place_of(moved, grpo.key_of(moved, "grpo1", None)))
    drawn, hashed = ({"data": data, "dataset": old_inputs(config)["dataset"]} for data in ("drawn", "0123"))
    assert comparable(drawn, {"data": "x"}, config) == {"data": "x"}
    assert comparable(hashed, {"data": "x"}, config) == {"data": UNKNOWN}
    shutil.copytree(config.dataset.root, tmp_path / "data")
    for change, words in (
        (replace(config, reward=replace(config.reward, beta=1.0)), "settings or inputs: reward.beta 5.0 -> 1.0. G"),
        (replace(config, grpo=replace(config.grpo, max_steps=9)), "inputs: grpo.max_steps 4 -> 9. G"),
        (replace(config, dataset=replace(config.dataset, root=str(tmp_path / "data"))),
         "inputs: the videos or their annotations (not recorded by the version that began it). G"),
    ):  # fmt: skip
        with pytest.raises(SettingError) as caught:
            do(place_of(change, grpo.key_of(change, "grpo1", None)))
        assert words in str(caught.value)


# --- videos that are not there


def test_missing_videos_are_said_before_anything_is_loaded(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "videos").mkdir()
    lines = [{"video": f"v{i}.mp4", "query": "q", "window": [0, 1], "duration": 5} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "val.jsonl").write_text(json.dumps(lines[0]))
    config = composed("dataset=jsonl", f"dataset.root={tmp_path}", "policy.path=/no/such/base")
    with pytest.raises(SettingError) as caught:
        grpo.key_of(config, "grpo1", None)
    assert f"40 of 40 videos are missing in {tmp_path}/videos" in str(caught.value)
    for i in range(37):
        (tmp_path / "videos" / f"v{i}.mp4").write_bytes(b"x")
    with pytest.raises(SettingError, match=r"3 of 40 videos .*such as v37.mp4; .* dataset.max_missing_share=1$"):
        train_data(config)
    many = composed("dataset=jsonl", f"dataset.root={tmp_path}", "dataset.max_missing_share=0.1")
    train_data(many)
    train_data(many)
    assert capsys.readouterr().err.count("3 of 40 videos are missing") == 1
    (tmp_path / "videos" / "v37.mp4").write_bytes(b"x")
    train_data(config)  # a share of 0.05 is allowed
    with pytest.raises(SettingError, match="1 of 1 videos"):
        refuse_missing_videos(config, "test", [Prompt(sample(tmp_path / "gone.mp4"), "q")], max_share=1.0)


# --- real runs


def without_places(run: Path) -> dict[str, Any]:
    """Results, with videos by name: rollouts and predictions say where a video lay."""
    found = results(run)
    for name in found:
        if name.endswith("rollouts.jsonl"):
            found[name] = rows(run / name)
            for row in found[name]:
                row["prompt"]["sample"]["video"] = Path(row["prompt"]["sample"]["video"]).name
    return found


@pytest.mark.slow
def test_a_run_goes_on_when_its_data_were_moved(small, untrained_base, run_command, tmp_path: Path) -> None:
    """Preempted at step 5; the data lie elsewhere then, given by a relative path, and so does the base."""
    command = [*(o for o in small if not o.startswith("dataset.root")), "stage=grpo1", "grpo.max_steps=8",
               "grpo.sampling.max_new_tokens=24", "trainer.checkpoint_every=1000", f"runs_dir={tmp_path}"]  # fmt: skip
    data, moved, base = tmp_path / "data", tmp_path / "moved" / "data", tmp_path / "base"
    first = [f"dataset.root={data}", f"policy.path={untrained_base}"]
    run_command(*command, *first, "name=whole")
    process = start_command([*command, *first, "name=cut"])
    deadline = time.monotonic() + PATIENCE
    while num_lines(tmp_path / "cut/grpo1/metrics.jsonl") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == REQUEUE_CODE
    moved.parent.mkdir()
    data.rename(moved)
    shutil.copytree(untrained_base, base)
    second = [f"dataset.root={os.path.relpath(moved, Path(__file__).parents[2])}/", f"policy.path={base}/",
              "policy.frames.timeout_s=50", "policy.feature_cache_gib=0.25"]  # fmt: skip
    assert "grpo1: continuing" in run_command(*command, *second, "name=cut").stdout
    assert without_places(tmp_path / "cut") == without_places(tmp_path / "whole")
    assert "finished before" in run_command(*command, *second, "name=cut").stdout


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_two_processes_are_refused_in_one_line(small, untrained_base, run_command, tmp_path: Path) -> None:
    """Rank 0 alone makes the key; what it refuses ends both."""
    command = [
        "trainer=ddp", *small, "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_workers=0", "stage=grpo1",
        "grpo.max_steps=1", "grpo.sampling.max_new_tokens=8", f"policy.path={untrained_base}", f"runs_dir={tmp_path}",
        "name=r",
    ]  # fmt: skip
    run_command(*command)
    refused = run_command(*command, "reward.beta=1", check=False)
    assert refused.returncode == 2 and refused.stderr.count("reward.beta 5.0 -> 1.0") == 1
    assert [line for line in refused.stderr.splitlines() if line.startswith("error:")] == [refused.stderr.strip()]
    assert not list((tmp_path / "r").glob("*.old*"))
    assert "finished before" in run_command(*command).stdout


WHAT_IS_DONE = {"stage.name", "stage.sequence", "video", "query", "experiments", "sweeps", "report.group"}
"""Marked as without effect on a result because they say which one is asked for. The last excludes report.runs."""


OTHER = {
    "name": "other", "runs_dir": "{folder}/elsewhere", "reuse_stages": "true", "overwrite": "true",
    "policy.name": "mine", "policy.feature_cache_gib": "0", "policy.feature_cache_dir": "{folder}/features",
    "policy.feature_cache_dir_gib": "1", "policy.frames.timeout_s": "50", "dataset.max_missing_share": "0.5",
    "evaluate.num_shards": "2", "evaluate.shard": "1",
    "faithfulness.every": "1", "monitors.watch": "[kl_blowup,non_finite]", "monitors.stop": "[kl_blowup]",
    "monitors.kl_every": "1", "trainer.timeout_minutes": "9", "trainer.num_workers": "1",
    "trainer.checkpoint_every": "2", "trainer.checkpoint_minutes": "1e-6", "trainer.checkpoints_kept": "3",
    "trainer.max_skipped_steps": "2", "trainer.memory_gib": "500", "trainer.progress_bar": "true",
    "tracking.mode": "offline", "tracking.project": "p", "tracking.entity": "e", "tracking.group": "g",
    "tracking.tags": "[t]", "report.runs": "[other]", "report.view": "https://w",
    "serve.host": "localhost", "serve.port": "7861", "serve.policies": "[base]", "serve.max_megabytes": "1",
    "serve.max_seconds": "9", "serve.max_characters": "9", "serve.timeout_s": "9", "serve.num_examples": "1",
}  # fmt: skip
"""Another value of every other such setting; `{folder}` is the test's."""


def test_every_setting_without_effect_has_another_value_to_try() -> None:
    assert {*OTHER, *WHAT_IS_DONE} == {name for name, effect in EFFECTS.items() if effect is Effect.none}


@pytest.mark.slow
@pytest.mark.campaign
def test_what_is_marked_as_without_effect_changes_no_bit(small, untrained_base, run_command, tmp_path: Path) -> None:
    """All such settings at once have another value: rollouts and adapter of grpo1 are the same to the last bit."""
    other = {name: value.format(folder=tmp_path) for name, value in OTHER.items()}
    given = [o for o in small if o.partition("=")[0] not in other]
    command = [*given, "stage=grpo1", "grpo.max_steps=2", "grpo.sampling.max_new_tokens=24", "grpo.lr=1e-3",
               "grpo.kl_coef=0", "policy.lora.dropout=0.1", f"policy.path={untrained_base}"]  # fmt: skip
    default = ["tracking.mode=off", "trainer.progress_bar=false", "monitors=off", "faithfulness.every=0"]
    run_command(*command, *default, f"runs_dir={tmp_path}", "name=r")
    run_command(*command, *(f"{name}={value}" for name, value in other.items()))
    first, second = tmp_path / "r/grpo1", tmp_path / "elsewhere/other/grpo1"
    for name in ("rollouts.jsonl", f"adapter/{ADAPTER_FILE}"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    keys = [json.loads((folder / "manifest.json").read_text())["key"] for folder in (first, second)]
    assert keys[0] == keys[1]
    config = composed(*small)
    assert settings_of(config, *WHAT_IS_DONE) == {}
