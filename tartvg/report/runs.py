"""What a run folder holds, read into objects. Every piece may be absent: a run is reported while it is under way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tartvg.config import policy_label
from tartvg.evaluation.score import scorecard_from_json
from tartvg.records import group_from_json, prediction_from_json, read_jsonl
from tartvg.types import Prediction, RolloutGroup, Scorecard

TARGETS = ("base", "grpo1", "sft", "grpo2")
"""Policies in the order in which the method makes them."""
TRAINING_STAGES = ("grpo1", "sft", "grpo2")
LOGGED_STAGES = ("rollouts", *TRAINING_STAGES)
ALL_STAGES = ("rollouts", "grpo1", "filter", "sft", "grpo2", "evaluate")
TAIL_BYTES = 8 * 1024 * 1024
MAX_GROUPS = 64
OWN = ""
"""The place of a run's own config.yaml, beside those of its stages."""
_MOVED_ASIDE = re.compile(r".+\.old[0-9]+")

Metrics = list[dict[str, float | None]]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class FilterSummary:
    """How many rollouts the filter read and kept, and how many each clause turned away."""

    num_rollouts: int
    num_kept: int
    rejected: dict[str, int]


@dataclass(frozen=True)
class RunFolder:
    """Everything of one run that a report shows; dictionaries hold only the stages or targets that exist."""

    path: Path
    configs: dict[str, str]
    """config.yaml as text, by place: the run's own (`OWN`), then the stages, then `evaluate/<target>`."""
    metrics: dict[str, Metrics]
    scores: dict[str, Scorecard]
    predictions: dict[str, list[Prediction]]
    filtered: FilterSummary | None
    manifests: dict[str, dict[str, Any]]
    """By stage; those of the evaluation and its controls by `evaluate/<target>` and `controls/<target>`."""
    rollouts: dict[str, Path] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    """Paths, relative to the folder, that a complete run has and this one does not."""

    @property
    def config(self) -> str | None:
        """The settings to show: the run's own, else those of its last stage, which know most."""
        return _shown(self.configs)


def read_run(run_dir: Path) -> RunFolder:
    """Raises ValueError if the folder does not exist or a file in it is damaged, naming the file."""
    if not run_dir.is_dir():
        raise ValueError(f"there is no run folder {run_dir}")
    configs = _configs(run_dir)
    scores = read_scores(run_dir)
    predictions = {
        target: [prediction_from_json(v) for v in read_jsonl(path, is_partial_allowed=True)]
        for target, path in of_targets(run_dir, "evaluate", "predictions.jsonl").items()
    }
    metrics = {
        stage: _computed(
            read_jsonl(run_dir / stage / "metrics.jsonl", is_partial_allowed=True),
            configs.get(stage) or _shown(configs),
        )
        for stage in LOGGED_STAGES
        if (run_dir / stage / "metrics.jsonl").exists()
    }
    summary = _read_json(run_dir / "filter" / "summary.json")
    manifests = {
        stage: value
        for stage in (*ALL_STAGES, *_places_of_targets(run_dir, "manifest.json"))
        if (value := _read_json(run_dir / stage / "manifest.json")) is not None
    }
    rollouts = {stage: run_dir / stage / "rollouts.jsonl" for stage in LOGGED_STAGES}
    return RunFolder(
        path=run_dir,
        configs=configs,
        metrics=metrics,
        scores=scores,
        predictions=predictions,
        filtered=None
        if summary is None
        else FilterSummary(summary["num_rollouts"], summary["num_kept"], summary["rejected"]),
        manifests=manifests,
        rollouts={stage: path for stage, path in rollouts.items() if path.exists()},
        missing=tuple(_missing(run_dir, _shown(configs))),
    )


def read_scores(run_dir: Path) -> dict[str, Scorecard]:
    """Scorecards by target, in the order of the method, other targets after it by name."""
    return {
        target: scorecard_from_json(json.loads(path.read_text(encoding="utf-8")))
        for target, path in of_targets(run_dir, "evaluate", "scores.json").items()
    }


def first_and_last_groups(path: Path) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    """The groups of the first and of the last step of a rollouts.jsonl, at most `MAX_GROUPS` each.

    Reads only the two ends of the file: a full-size run writes gigabytes. The last list is empty when both would
    show the same step.
    """
    first: list[RolloutGroup] = []
    for value in read_jsonl(path, is_partial_allowed=True):
        if len(first) == MAX_GROUPS or (first and value["step"] != first[0].step):
            break
        first.append(group_from_json(value))
    last: list[RolloutGroup] = []
    for value in reversed(_tail(path)):
        if len(last) == MAX_GROUPS or (last and value["step"] != last[0].step):
            break
        last.append(group_from_json(value))
    if first and last and last[0].step == first[0].step:
        last = []
    return first, last[::-1]


def _tail(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    # Before the first newline stands the rest of a line, after the last one a line that is still being written.
    complete = lines[:-1] if size <= TAIL_BYTES else lines[1:-1]
    return [json.loads(line) for line in complete if line.strip()]


def is_moved_aside(folder: Path) -> bool:
    """Return whether a stage's folder holds what other settings gave; tartvg/stages/folder.py renames it so."""
    return _MOVED_ASIDE.fullmatch(folder.name) is not None


def in_order(targets: Iterable[str]) -> list[str]:
    """Policies in the order of the method, others after them by name."""
    found = set(targets)
    return [t for t in TARGETS if t in found] + sorted(found - set(TARGETS))


def of_targets(run_dir: Path, group: str, name: str) -> dict[str, Path]:
    """`<run_dir>/<group>/<target>/<name>` of every policy, in order; `group` is `evaluate` or `controls`."""
    paths = run_dir.glob(f"{group}/*/{name}")
    found = {path.parent.name: path for path in paths if not is_moved_aside(path.parent)}
    return {target: found[target] for target in in_order(found)}


def _places_of_targets(run_dir: Path, name: str) -> list[str]:
    return [f"{group}/{target}" for group in ("evaluate", "controls") for target in of_targets(run_dir, group, name)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def settings_of(run: RunFolder, place: str = OWN) -> DictConfig:
    """The settings of a place of the run, else those to show; empty where none can be read."""
    return parsed(run.configs.get(place) or run.config or "")


def config_of(run: RunFolder, key: str, default: Any, place: str = OWN) -> Any:
    """One value of the settings of a place of the run, as `settings_of` has them."""
    value = OmegaConf.select(settings_of(run, place), key)
    return default if value is None else value


def typed(kind: type[Kind], values: object) -> Kind:
    """A part of the settings as its checked dataclass. Raises OmegaConfBaseException or SettingError."""
    value = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    assert isinstance(value, kind)
    return value


def planned_targets(run: RunFolder) -> list[str]:
    """The policies that the run's own commands evaluate, in order. Where no settings say it: the paper's, if any."""
    planned: set[str] = set()
    for text in run.configs.values():
        settings = parsed(text)
        stages = [OmegaConf.select(settings, "stage.name"), *(OmegaConf.select(settings, "stage.sequence") or ())]
        if "evaluate" in stages:
            planned |= {policy_label(str(t)) for t in OmegaConf.select(settings, "evaluate.policies") or ()}
    return in_order(planned or (TARGETS if run.scores else ()))


@lru_cache(maxsize=256)
def parsed(text: str) -> DictConfig:
    """Settings of their YAML, to be read only: stages and jobs share most texts. Empty for one that is none."""
    try:
        value = OmegaConf.create(text)
    except (ValueError, OmegaConfBaseException, YAMLError):
        value = None
    return value if isinstance(value, DictConfig) else OmegaConf.create({})


def _configs(run_dir: Path) -> dict[str, str]:
    """Every stage keeps the settings that it ran with."""
    evaluated = (f"evaluate/{target}" for target in of_targets(run_dir, "evaluate", "config.yaml"))
    paths = {place: run_dir / place / "config.yaml" for place in (OWN, *ALL_STAGES, *evaluated)}
    return {place: path.read_text(encoding="utf-8") for place, path in paths.items() if path.is_file()}


def _shown(configs: Mapping[str, str]) -> str | None:
    return configs.get(OWN) or next(reversed(list(configs.values())), None)


def _computed(lines: Iterable[dict[str, Any]], config: str | None) -> Metrics:
    """The lines without `loss/kl` where the penalty is off: the loss then has no reference and logs 0."""
    settings = parsed(config or "")
    if OmegaConf.select(settings, "grpo.kl_coef") == 0 and not OmegaConf.select(settings, "grpo.kl_time_coef"):
        return [{name: value for name, value in line.items() if name != "loss/kl"} for line in lines]
    return list(lines)


def _missing(run_dir: Path, config: str | None) -> Iterator[str]:
    """What the run was to give and has not given; without its settings, what the paper's order gives."""
    settings = parsed(config or "")
    sequence = OmegaConf.select(settings, "stage.sequence")
    stages = {str(s) for s in sequence} if sequence else set(ALL_STAGES)
    evaluated = OmegaConf.select(settings, "evaluate.policies") if sequence else None
    targets = [policy_label(str(target)) for target in evaluated or TARGETS]
    expected = [] if config else ["config.yaml"]
    expected += ["filter/summary.json"] if "filter" in stages else []
    expected += [f"{stage}/metrics.jsonl" for stage in TRAINING_STAGES if stage in stages]
    expected += [f"{stage}/rollouts.jsonl" for stage in ("grpo1", "grpo2") if stage in stages]
    if "evaluate" in stages:
        expected += [f"evaluate/{target}/{name}" for target in targets for name in ("scores.json", "predictions.jsonl")]
    yield from (name for name in expected if not (run_dir / name).exists())
