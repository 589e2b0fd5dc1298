"""What a run folder holds, read into objects. Every piece may be absent: a run is reported while it is under way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

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

Metrics = list[dict[str, float | None]]


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
    config: str | None
    """config.yaml as text: the run's own, else that of its last stage."""
    metrics: dict[str, Metrics]
    scores: dict[str, Scorecard]
    predictions: dict[str, list[Prediction]]
    filtered: FilterSummary | None
    manifests: dict[str, dict[str, Any]]
    rollouts: dict[str, Path] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    """Paths, relative to the folder, that a complete run has and this one does not."""


def read_run(run_dir: Path) -> RunFolder:
    """Raises ValueError if the folder does not exist or a file in it is damaged, naming the file."""
    if not run_dir.is_dir():
        raise ValueError(f"there is no run folder {run_dir}")
    config = _config_file(run_dir)
    scores = read_scores(run_dir)
    predictions = {
        target: [prediction_from_json(v) for v in read_jsonl(path, is_partial_allowed=True)]
        for target, path in _of_targets(run_dir, "predictions.jsonl")
    }
    metrics = {
        stage: list(read_jsonl(run_dir / stage / "metrics.jsonl", is_partial_allowed=True))
        for stage in LOGGED_STAGES
        if (run_dir / stage / "metrics.jsonl").exists()
    }
    summary = _read_json(run_dir / "filter" / "summary.json")
    manifests = {
        stage: value
        for stage in (*ALL_STAGES, *(f"evaluate/{target}" for target, _ in _of_targets(run_dir, "manifest.json")))
        if (value := _read_json(run_dir / stage / "manifest.json")) is not None
    }
    rollouts = {stage: run_dir / stage / "rollouts.jsonl" for stage in LOGGED_STAGES}
    return RunFolder(
        path=run_dir,
        config=config.read_text(encoding="utf-8") if config else None,
        metrics=metrics,
        scores=scores,
        predictions=predictions,
        filtered=None
        if summary is None
        else FilterSummary(summary["num_rollouts"], summary["num_kept"], summary["rejected"]),
        manifests=manifests,
        rollouts={stage: path for stage, path in rollouts.items() if path.exists()},
        missing=tuple(_missing(run_dir, config)),
    )


def read_scores(run_dir: Path) -> dict[str, Scorecard]:
    """Scorecards by target, in the order of the method, other targets after it by name."""
    return {
        target: scorecard_from_json(json.loads(path.read_text(encoding="utf-8")))
        for target, path in _of_targets(run_dir, "scores.json")
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


def _of_targets(run_dir: Path, name: str) -> Iterator[tuple[str, Path]]:
    found = {path.parent.name: path for path in sorted(run_dir.glob(f"evaluate/*/{name}"))}
    for target in (*TARGETS, *sorted(found.keys() - set(TARGETS))):
        if target in found:
            yield target, found[target]


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


def _config_file(run_dir: Path) -> Path | None:
    """Every stage keeps the settings that it ran with; the last one knows most."""
    stages = [run_dir / stage for stage in ALL_STAGES] + sorted(run_dir.glob("evaluate/*"))
    found = [run_dir / "config.yaml", *(folder / "config.yaml" for folder in reversed(stages))]
    return next((path for path in found if path.is_file()), None)


def _missing(run_dir: Path, config: Path | None) -> Iterator[str]:
    """What the run was to give and has not given; without its settings, what the paper's order gives."""
    settings: Any = {}
    if config is not None:
        with suppress(ValueError, OmegaConfBaseException, YAMLError):
            settings = OmegaConf.load(config)
    sequence, targets = OmegaConf.select(settings, "stage.sequence") if settings else None, TARGETS
    stages = {str(s) for s in sequence} if sequence else set(ALL_STAGES)
    if sequence:
        targets = tuple(OmegaConf.select(settings, "evaluate.targets") or TARGETS)
    expected = [] if config else ["config.yaml"]
    expected += ["filter/summary.json"] if "filter" in stages else []
    expected += [f"{stage}/metrics.jsonl" for stage in TRAINING_STAGES if stage in stages]
    expected += [f"{stage}/rollouts.jsonl" for stage in ("grpo1", "grpo2") if stage in stages]
    if "evaluate" in stages:
        expected += [f"evaluate/{target}/{name}" for target in targets for name in ("scores.json", "predictions.jsonl")]
    yield from (name for name in expected if not (run_dir / name).exists())
