"""The fields of the settings: ranges, old names, bases of YAML files, and where each one is written about. No torch."""

import dataclasses
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.settings import ROOT, composed, composed_below, composer
from hydra import compose
from hydra.errors import ConfigCompositionException
from test_config import run_clone

from docs.make_settings import leaves, page
from tartvg.config import (
    Config,
    FilterConfig,
    GrpoConfig,
    LoraConfig,
    RewardConfig,
    SettingError,
    TrainerConfig,
    register,
)
from tartvg.config.errors import explain
from tartvg.config.fields import RANGE, Range
from tartvg.config.renamed import REMOVED, RENAMED, refusal_of, refuse_old_names
from tartvg.launch.job import launch
from tartvg.launch.signals import SIGNALS

register()

OLD = [*RENAMED, *REMOVED]
SOME_OLD = ["stage=validate", "selection.keep", "anchors.filter.min_reward", "grpo.kl", "monitors.window"]
"""A choice, a group, a group within one, a setting, and one that is gone: Hydra takes half a second for each."""
NAMES = {leaf.name for leaf in leaves()}
GROUPS = {name.rpartition(".")[0] for name in NAMES} - {""}


def expected(old: str) -> str:
    return f"{old} is now called {RENAMED[old]}" if old in RENAMED else f"{old} is no setting any more: {REMOVED[old]}"


# --- ranges


@pytest.mark.parametrize(
    "allowed,words,inside,outside",
    [
        (Range(above=0), "> 0", [1e-9, math.inf], [0, -1.0, math.nan]),
        (Range(at_least=1), ">= 1", [1, 2], [0]),
        (Range(at_least=0, below=1), "in [0, 1)", [0, 0.99], [1, -0.1, math.nan]),
        (Range(above=0, at_most=1), "in (0, 1]", [1, 0.1], [0, 1.1]),
        (Range(at_least=-1, at_most=1), "in [-1, 1]", [-1, 1, [], [0.5]], [-1.1, [0.5, 2]]),
        (Range(at_least=0, below=math.inf), "finite and >= 0", [0, 1e300], [math.inf, math.nan, -1]),
        (Range(at_least=2, because="it takes two"), ">= 2 (it takes two)", [2], [1]),
        (Range(among=("cpu", "gpu")), "cpu or gpu", ["cpu"], ["tpu", ""]),
        (Range(among=("a", "b", "c")), "a, b or c", ["c"], ["d"]),
    ],
)
def test_a_range_by_hand(allowed: Range, words: str, inside: list[Any], outside: list[Any]) -> None:
    assert str(allowed) == words
    assert all(map(allowed.holds, inside)) and not any(map(allowed.holds, outside))


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: GrpoConfig(lr=-1.0), "grpo.lr must be > 0, got -1.0"),
        (lambda: GrpoConfig(group_size=1), "grpo.group_size must be >= 2 (advantages compare completions), got 1"),
        (lambda: GrpoConfig(max_steps_grpo2=0), "grpo.max_steps_grpo2 must be null or >= 1, got 0"),
        (lambda: LoraConfig(dropout=1.0), "policy.lora.dropout must be in [0, 1), got 1.0"),
        (lambda: RewardConfig(beta=math.inf), "reward.beta must be finite and >= 0, got inf"),
        (lambda: FilterConfig(min_ious=[0.5, 2.0]), "filter.min_ious must be a list in [-1, 1], got [0.5, 2.0]"),
        (lambda: TrainerConfig(accelerator="tpu"), "trainer.accelerator must be cpu or gpu, got 'tpu'"),
        (lambda: Config(seed=-1), "seed must be >= 0, got -1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_setting(build: Any, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        build()
    assert str(caught.value) == message


def test_a_list_that_is_a_default_belongs_to_one_object() -> None:
    FilterConfig().min_ious.append(0.9)
    assert FilterConfig().min_ious == [0.5, 0.7]


def test_every_default_lies_in_its_range() -> None:
    def ranges(settings: Any) -> Iterator[tuple[str, bool]]:
        for known in dataclasses.fields(settings):
            value = getattr(settings, known.name)
            if dataclasses.is_dataclass(value):
                yield from ranges(value)
            elif RANGE in known.metadata and value is not None:
                yield known.name, known.metadata[RANGE].holds(value)

    found = list(ranges(composed()))
    assert len(found) > 50 and all(holds for _, holds in found)


# --- old names


def test_the_tables_hold_old_names_on_one_side_and_today_s_on_the_other() -> None:
    assert not set(RENAMED) & set(REMOVED)
    assert not set(OLD) & (NAMES | GROUPS)
    for new in RENAMED.values():
        assert new in NAMES | GROUPS or composed(new)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `launch` changes in its process, as it was before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
@pytest.mark.parametrize("old", OLD)
def test_an_old_name_on_the_command_line_is_refused_with_the_new_one(
    old: str, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(sys, "argv", ["run.py", "seed=1", prefix + (old if "=" in old else f"{old}=1")])
    assert launch(main) == 2
    assert capsys.readouterr().err == f"error: {expected(old)}\n"


@pytest.mark.parametrize("old", SOME_OLD)
def test_an_old_name_is_refused_where_hydra_composes(old: str) -> None:
    """As in a notebook, without a command line."""
    with pytest.raises(Exception) as caught, composer():
        compose("config", overrides=[old if "=" in old else f"{old}=1"])
    said = explain(caught.value)
    parent = old.rpartition(".")[0]
    assert said == expected(old) or (parent in RENAMED and said == expected(parent))


@pytest.mark.parametrize("old", [old for old in SOME_OLD if "=" not in old])
def test_an_old_name_in_a_file_is_refused_with_the_new_one(old: str, clone: Path) -> None:
    (clone / "experiments" / "old.yaml").write_text(f"# @package _global_\nname: old\n{yaml_of(old)}")
    with pytest.raises(ConfigCompositionException) as caught:
        composed_below(clone, "experiments=old")
    group = next((old[: len(g)] for g in RENAMED if old.startswith(f"{g}.")), old)
    assert explain(caught.value) == f"experiments/old.yaml: {expected(group)}"


def yaml_of(setting: str) -> str:
    return yaml.safe_dump({setting.split(".")[0]: nested(setting.split(".")[1:])})


def nested(parts: list[str]) -> Any:
    return {parts[0]: nested(parts[1:])} if parts else 1


def test_an_old_choice_in_a_file_is_refused_with_the_new_one(clone: Path) -> None:
    (clone / "experiments" / "old.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /stage: validate\nname: old\n"
    )
    with pytest.raises(Exception) as caught:
        composed_below(clone, "experiments=old")
    assert explain(caught.value).endswith("stage=validate is now called stage=check_data")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "anchors.target=1,2"],
        ["-m", "+anchors.target=1,2", "seed=0,1"],
        ["sweeps=seeds", "anchors.target=1"],
        ["sweeps=old"],
    ],
)
def test_an_old_name_as_an_axis_ends_the_sweep_in_one_line(clone: Path, tmp_path: Path, arguments: list[str]) -> None:
    (clone / "sweeps" / "old.yaml").write_text(
        "# @package _global_\nname: old\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      anchors.target: 1,2\n      seed: 0,1\n"
    )
    done = run_clone(clone, tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (2, "error: anchors.target is now called anchors.count\n")


def test_an_old_choice_as_an_axis_is_refused() -> None:
    with pytest.raises(SettingError, match="stage=validate is now called stage=check_data"):
        refuse_old_names(["seed=0", "stage=grpo1,validate"])
    refuse_old_names(["stage=check_data", "grpo.kl_coef=0", "+seed=1", "--cfg", "job", "query=selection=validate"])
    assert refusal_of("selection.everything") == "selection is now called validation"
    assert refusal_of("grpo.kl_coef") is None


# --- files that build on others


def test_the_two_qwens_differ_in_their_names_only() -> None:
    small, large = (flat(composed(f"policy=qwen2_5_vl_{size}")) for size in ("3b", "7b"))
    assert {name for name in small if small[name] != large[name]} == {"policy.name", "policy.path"}


def test_the_trainers_of_several_gpus_differ_in_their_strategy_only() -> None:
    first, *others = (flat(composed(f"trainer={name}")) for name in ("ddp", "zero2", "zero3", "zero3_offload"))
    for other in others:
        assert {name for name in first if first[name] != other[name]} == {"trainer.strategy"}
    one = flat(composed("trainer=one_gpu"))
    assert {name for name in first if first[name] != one[name]} == {"trainer.strategy", "trainer.devices"}


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for known in dataclasses.fields(settings):
        value, name = getattr(settings, known.name), f"{path}{known.name}"
        found |= flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


# --- where a setting is written about


def test_the_page_of_settings_is_up_to_date_and_complete() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == page(), "python docs/make_settings.py > docs/settings.md"
    assert all(leaf.meaning for leaf in leaves()), "a docstring under every field"
    assert len(NAMES) == len(list(leaves()))
    assert {name for name in flat(Config()) if name not in ("experiments", "sweeps")} == NAMES


def test_every_setting_is_set_in_a_file_or_named_in_a_document() -> None:
    documents = "\n".join(
        path.read_text() for folder in (".", "docs", "recipes", "experiments") for path in markdown(ROOT / folder)
    )
    named = {name for name in NAMES if f"`{name}`" in documents or f"{name}=" in documents}
    assert NAMES - settings_of_files() - named == set()


def markdown(folder: Path) -> Iterator[Path]:
    return folder.glob("*.md") if folder == ROOT else folder.rglob("*.md")


def settings_of_files() -> set[str]:
    """Names that a YAML file of conf/, sweeps/ or experiments/ gives a value."""
    found: set[str] = set()
    for top in ("conf", "sweeps", "experiments"):
        for path in (ROOT / top).rglob("*.yaml"):
            values = yaml.safe_load(path.read_text()) or {}
            is_global = "# @package _global_" in path.read_text()
            found |= keys(values, "" if is_global or path.parent.name == "conf" else f"{path.parent.name}.")
            found |= set((((values.get("hydra") or {}).get("sweeper") or {}).get("params")) or {})
    return found


def keys(values: dict[str, Any], path: str) -> set[str]:
    found: set[str] = set()
    for name, value in values.items():
        found |= keys(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}"}
    return found
