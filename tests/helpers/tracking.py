"""A tracker, what it is given, and what W&B's files hold."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tartvg import rewards
from tartvg.config import TrackingConfig, TrackingMode
from tartvg.tracking.tracker import Tracker
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

OFF = TrackingConfig(mode=TrackingMode.off)


def tracker(folder: Path, settings: TrackingConfig = OFF, **kwargs: Any) -> Tracker:
    return Tracker(folder, settings, "myrun", "grpo1", {"policy": {"name": "tiny"}}, seed=7, **kwargs)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def group(*totals: float, query: str = "the red square appears") -> RolloutGroup:
    sample = GroundingSample("s", Path("v.mp4"), query, (Span(1.0, 3.0),), 10.0, "train")
    rollouts = tuple(
        Rollout(
            Completion(f"text of {total}", (1, 2), (-0.5, -0.5), True),
            Response((Span(0.0, 3.0), Span(1.0, 3.0)), Span(1.0, 3.0) if total > 0 else None, ()),
            RewardBreakdown(total, {term.name: 0.5 for term in rewards.rubric.TERMS}, (0.6, 1.0)),
        )
        for total in totals
    )
    return RolloutGroup(Prompt(sample, "prompt"), rollouts, 0)


def answer(sample_id: str, span: Span | None) -> Prediction:
    return Prediction(
        sample_id, 0, "q", "v.mp4", (Span(0.0, 3.0),), 9.0, f"says {sample_id}", (), span, ("x", "y"), True
    )


def wandb_payloads(path: Path) -> Iterator[bytes]:
    """Records of a `.wandb` file: LevelDB log blocks of 32 KiB behind a header of 7 bytes."""
    with path.open("rb") as file:
        ident, magic, _ = struct.unpack("<4sHB", file.read(7))
        assert (ident, magic) == (b":W&B", 0xBEE1)
        position, parts = 7, b""
        while True:
            left = 32768 - position % 32768
            if left < 7:
                file.read(left)
                position += left
                continue
            header = file.read(7)
            if len(header) < 7:
                return
            crc, length, kind = struct.unpack("<IHB", header)
            data = file.read(length)
            position += 7 + length
            assert crc == zlib.crc32(bytes([kind]) + data)
            parts = data if kind in (1, 2) else parts + data
            if kind in (1, 4):
                yield parts


def wandb_records(folder: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for payload in wandb_payloads(path):
            record = Record()
            record.ParseFromString(payload)
            found.append(record)
    return found


def artifacts(records: list[Any]) -> list[Any]:
    """Artifact records stand alone or inside a request."""
    alone = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    asked = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")]
    return alone + asked
