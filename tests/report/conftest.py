"""What several files of tests show: a run, and a sweep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.report import (
    SETTINGS,
    Samples,
    make_run,
    make_samples,
    shift,
    tilt,
)

from tartvg.launch.sweeps import Job
from tartvg.records import dumps, write_atomic
from tartvg.report.page import build_report
from tartvg.types import (
    GroundingSample,
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples]:
    """anchors=one,two,three with seeds 0, 1: one of them failed, one never began. Eight videos that look the same."""
    top = tmp_path_factory.mktemp("compare")
    samples = make_samples(top)
    video = (top / "clip.mp4").read_bytes()
    for i, (key, sample) in enumerate(samples.items()):
        (top / f"clip{i % 8}.mp4").write_bytes(video)
        samples[key] = replace(sample, video=top / f"clip{i % 8}.mp4")
    folder = top / "anchors"
    for number, choice in enumerate(("one", "two", "three")):
        for seed in (0, 1):
            overrides = [f"anchors={choice}", f"seed={seed}"]
            cell = folder / ",".join(overrides)
            if overrides == ["anchors=three", "seed=1"]:
                continue
            job = Job(overrides, started=1.0)
            if overrides == ["anchors=three", "seed=0"]:
                job.end(cell, 1, "ValueError: the filter kept none")
                continue
            make_run(cell, samples)
            write_atomic(cell / "config.yaml", SETTINGS)
            tilt(cell, 1 - 0.1 * number + 0.05 * seed)
            shift(cell, samples, 0.5 * (1 - number) + 0.05 * seed)
            write_atomic(cell / "grpo2" / "manifest.json", dumps({"seconds": 75.0, "finished": True}))
            if choice == "two":
                manifest = {"seconds": 75.0, "finished": True, "copied_from": "anchors/anchors=one,seed=0/grpo1"}
                write_atomic(cell / "grpo1" / "manifest.json", dumps(manifest))
            job.end(cell, 0)
    plan = {"hydra": {"sweeper": {"params": {"anchors": "one,two,three", "seed": "0,1"}}, "overrides": {"task": []}}}
    write_atomic(folder / "multirun.yaml", json.dumps(plan))
    return folder, samples


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, GroundingSample], str]:
    folder = tmp_path_factory.mktemp("report")
    samples = make_samples(folder)
    make_run(folder / "demo", samples)
    return folder / "demo", samples, build_report(folder / "demo", samples, folder / "report.html").read_text("utf-8")
