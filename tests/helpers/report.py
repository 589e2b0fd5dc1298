"""Finished runs as the stages leave them, made up."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np

from tartvg.evaluation.score import score
from tartvg.launch.sweeps import Job
from tartvg.records import dumps, read_jsonl, write_atomic, write_jsonl
from tartvg.types import (
    Completion,
    GroundingSample,
    Prediction,
    Prompt,
    Response,
    RewardBreakdown,
    Rollout,
    RolloutGroup,
    Span,
)

SECONDS = 8.0


ATTACK = "<script>alert(1)</script>"


def draw_video(path: Path, fps: int = 10) -> None:
    """A red square that moves from left to right, one eighth of the width per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for i in range(int(SECONDS * fps)):
            picture = np.full((96, 160, 3), 225, dtype=np.uint8)
            left = int(20 * i / fps)
            picture[30:66, left : left + 20] = (200, 30, 30)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def said(*anchors: Span, answer: Span | None = None) -> str:
    steps = " ".join(f"I look closer: <timestamp>{a}</timestamp>." for a in anchors)
    return f"<think>The square moves. {steps}</think><answer>{answer or (anchors[-1] if anchors else '')}</answer>"


def prediction(sample: GroundingSample, index: int, anchors: tuple[Span, ...], answer: Span | None) -> Prediction:
    faults = () if answer else ("no_answer",)
    return Prediction(
        sample_id=sample.sample_id,
        sample_index=index,
        query=sample.query,
        video=sample.video.as_posix(),
        windows=sample.windows,
        duration=sample.duration,
        text=said(*anchors, answer=answer),
        anchors=anchors,
        answer=answer,
        faults=faults,
        is_finished=True,
    )


def rollout_group(sample: GroundingSample, step: int) -> RolloutGroup:
    rollouts = []
    for total, anchors in ((7.25, (Span(1.0, 5.0), sample.target)), (-4.5, (Span(6.0, 7.0),))):
        rollouts.append(
            Rollout(
                Completion(said(*anchors), (1, 2, 3), (-0.1, -0.2, -0.3), True),
                Response(anchors, anchors[-1], ()),
                RewardBreakdown(total, {"format": 1.0, "iou": 0.9, "tar1": 2.5}, tuple(0.5 for _ in anchors)),
            )
        )
    return RolloutGroup(Prompt(sample, "prompt"), tuple(rollouts), step)


def make_samples(folder: Path, num: int = 10) -> dict[str, GroundingSample]:
    draw_video(folder / "clip.mp4")
    samples = {}
    for i in range(num):
        query = ATTACK if i == 0 else f"the red square crosses part {i}"
        window = Span(1.0 + 0.2 * i, 3.0 + 0.3 * i)
        samples[f"q{i}"] = GroundingSample(f"q{i}", folder / "clip.mp4", query, (window,), SECONDS, "test")
    return samples


def write_metrics(run: Path, stage: str, num_steps: int) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(num_steps):
        share = step / max(1, num_steps - 1)
        line: dict[str, Any] = {"progress/step": step, "loss/total": 0.5 - 0.3 * share, "time/update_s": 0.25}
        line["optim/grad_norm"] = 2.0 - share
        if stage != "sft":
            line |= {"reward/total_mean": 1 + 5 * share, "anchors/valid_rate": 0.25 + 0.6 * share}
            line |= {"anchors/count_mean": 1.4 + 0.6 * share, "anchors/refinement_rate": 0.5 + 0.3 * share}
            line |= {"loss/kl": 0.0, "rollout/kl": None if step == 0 else 0.01 * share, "time/sample_s": 1.5}
            line |= {"rollout/entropy": 1.5 - share, "rollout/truncated_rate": 0.1 * share}
        lines.append(line)
    write_jsonl(run / stage / "metrics.jsonl", lines)
    write_atomic(run / stage / "manifest.json", dumps({"seconds": 75.0, "finished": stage != "grpo2"}))


def make_run(run: Path, samples: dict[str, GroundingSample]) -> None:
    for stage, num_steps in (("grpo1", 40), ("sft", 12), ("grpo2", 25)):
        write_metrics(run, stage, num_steps)
    for stage in ("grpo1", "grpo2"):
        write_jsonl(run / stage / "rollouts.jsonl", [rollout_group(s, n) for n in (0, 1) for s in samples.values()])
    summary = {"num_rollouts": 1000, "num_kept": 160, "rejected": {"min_reward": 700, "min_anchors": 140}}
    write_atomic(run / "filter" / "summary.json", dumps(summary))
    write_atomic(run / "config.yaml", f"name: demo\nnote: {ATTACK}\n")
    for rank, target in enumerate(("base", "grpo1", "sft", "grpo2")):
        predictions = []
        for i, sample in enumerate(samples.values()):
            truth, off = sample.target, (3 - rank) * 0.5 * (1 + i % 3)
            answer = None if target == "base" and i == 3 else Span(truth.start + off, truth.end + off)
            coarse = Span(max(0.0, truth.start - 1), truth.end + off + 1)
            anchors = (coarse, answer) if answer and rank else (coarse,)
            predictions += [prediction(sample, index, anchors, answer) for index in (0, 1, 2)]
        write_jsonl(run / "evaluate" / target / "predictions.jsonl", predictions)
        card = score(list(samples.values()), predictions, resamples=100)
        write_atomic(run / "evaluate" / target / "scores.json", dumps(card))


class Reader(HTMLParser):
    """Collects what a browser would load or run, and checks that elements close in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k.split(":")[-1] in ("href", "src", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


Samples = dict[str, GroundingSample]


SETTINGS = """
reward: {format_weight: 3.0, iou: soft}
anchors: {count: 2, max_count: 3}
grpo: {group_size: 4, prompts_per_step: 2}
trainer: {accelerator: gpu, devices: 2, num_nodes: 1}
stage: {sequence: [grpo1, filter, sft, grpo2, evaluate]}
evaluate: {policies: [base, grpo1, sft, grpo2]}
"""


def shift(run: Path, samples: Samples, seconds: float) -> None:
    """Move every answer of the final policy by some seconds, and score again."""
    path = run / "evaluate" / "grpo2" / "predictions.jsonl"
    moved = [
        prediction(s, i, (Span(0, 7), a := Span(s.target.start + seconds, s.target.end + seconds)), a)
        for s in samples.values()
        for i in (0, 1)
    ]
    write_jsonl(path, moved)
    write_atomic(path.with_name("scores.json"), dumps(score(list(samples.values()), moved, resamples=50)))


def tilt(run: Path, factor: float) -> None:
    """Scale the logged rewards, so that variants and seeds have curves of their own."""
    for path in run.glob("grpo*/metrics.jsonl"):
        rows = [{**row, "reward/total_mean": factor * row["reward/total_mean"]} for row in read_jsonl(path)]
        write_jsonl(path, rows)


def make_sweep(top: Path) -> tuple[Path, Samples]:
    """anchors=one,two,three with seeds 0, 1: one of them failed, one never began. Eight videos that look the same."""
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
