"""A mix of data sets: its settings, and what is read."""

import json
from pathlib import Path

import pytest
from helpers.settings import composed
from omegaconf import OmegaConf

from tartvg.config import DatasetConfig, SettingError
from tartvg.data.datasets import load_annotations, load_samples
from tartvg.records import dumps, sample_from_json


def mixed(*overrides: str, parts: str = "{jsonl: 1, planted: 2}") -> DatasetConfig:
    return composed("dataset=mix", f"dataset.parts={parts}", *overrides).dataset


def test_a_part_is_its_file_below_the_settings_of_the_mix_and_its_own() -> None:
    found = mixed("dataset.root=/d", "dataset.late_windows=drop", "dataset.sources.planted.planted.num_train=4")
    alone = composed("dataset=planted").dataset
    planted = found.sources["planted"]
    assert (planted.name, planted.root, planted.late_windows) == (alone.name, "/d/planted", "drop")
    assert (planted.planted.num_train, planted.planted.num_val) == (4, alone.planted.num_val)
    assert mixed().sources["planted"] == alone


def test_settings_on_disk_are_the_same_mix() -> None:
    found = mixed("dataset.sources.planted.planted.num_train=4")
    text = OmegaConf.to_yaml(OmegaConf.structured(found))
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DatasetConfig), OmegaConf.create(text))) == found


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["dataset=mix"], "dataset.parts must be such as"),
        (["dataset=mix", "dataset.parts={nothing: 1}"], "dataset.parts must be among activitynet, .*got 'nothing'"),
        (["dataset=mix", "dataset.parts={mix: 1}"], "dataset.parts must be among"),
        (["dataset=mix", "dataset.parts={planted: 0}"], "dataset.parts must be a map to numbers finite and > 0"),
        (["dataset.parts={planted: 1}"], "dataset.parts must be empty without dataset=mix"),
        (["dataset=mix", "dataset.parts={planted: 1}", "dataset.sources.tacos.root=x"], "dataset.sources .*tacos"),
        (["dataset=mix", "dataset.parts={planted: 1}", "dataset.sources.planted.rot=x"], "sources.planted: .*rot"),
        (["dataset=mix", "dataset.parts={planted: 1}", "dataset.sources.planted=3"], "sources.planted must be"),
    ],
)
def test_refusals_name_the_setting(overrides: list[str], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        composed(*overrides)


def write_jsonl(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    row = {"query": "a door opens", "windows": [[1, 2]], "duration": 9}
    for name in names:
        rows = [json.dumps({**row, "video": f"{name}{i}.mp4"}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text(
            "\n".join([*rows, json.dumps({**row, "video": "x.mp4", "query": " a b"})])
        )


def test_samples_keep_their_source_under_ids_of_their_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "jsonl", "train", "val", "test")
    small = [f"dataset.sources.planted.planted.num_{split}=1" for split in ("train", "val", "test")]
    settings = mixed(f"dataset.root={tmp_path}", *small, "dataset.num_queries=2")
    for split in ("train", "val", "test"):
        found = load_samples(settings, split)
        assert [s.source for s in found] == ["jsonl"] * 2 + ["planted"] * 2
        assert [s.own_id for s in found] == [
            s.sample_id for p in settings.sources.values() for s in load_samples(p, split)
        ]
        assert all(s.sample_id == f"{s.source}/{s.own_id}" for s in found)
    assert sample_from_json(json.loads(dumps(found[0]))) == found[0]
    assert "source" not in json.loads(dumps(load_samples(settings.sources["jsonl"], "test")[0]))
    whole = load_annotations(settings, "test")
    assert len(whole.samples) == 41 + 3 and whole.quirks.whitespace == 1


def test_a_missing_part_is_refused_before_any_other_is_read_or_drawn(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "jsonl", "train")
    settings = mixed(f"dataset.root={tmp_path}", parts="{planted: 1, jsonl: 1, tacos: 1}")
    with pytest.raises(ValueError, match=r"dataset=tacos has no train split in .*tacos: it needs train.json there"):
        load_samples(settings, "train")
    assert not (tmp_path / "planted").exists()
