"""The flowing objects as JSON lines: what a run writes, anybody can read.

Files are plain UTF-8, one object a line, without NaN or infinity. A half-written last line (the process was killed
while it wrote) is not an error for a reader that says so.
"""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from tartvg.types import (
    Completion,
    Estimate,
    Fault,
    GroundingSample,
    Prediction,
    Prompt,
    Response,
    RewardBreakdown,
    Rollout,
    RolloutGroup,
    Span,
    Trace,
)

UNKNOWN_LOGP = -1e9
"""Stands for a log-probability that is not finite."""


def to_json(value: Any) -> Any:
    """Dataclasses, enums, paths and tuples as JSON values; a Span is `[start, end]`, an Estimate says what is what.

    A field whose metadata say `is_left_out_when_empty` is not there where it is empty.
    """
    if is_dataclass(value) and not isinstance(value, type):
        items = ((f, getattr(value, f.name)) for f in fields(value))
        return {f.name: to_json(v) for f, v in items if v or "is_left_out_when_empty" not in f.metadata}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return value


def dumps(value: Any) -> str:
    """One line of JSON. Raises ValueError for NaN and infinity."""
    text = json.dumps(to_json(value), ensure_ascii=False, allow_nan=False)
    # a lone surrogate has no UTF-8 form; its backslash escape is JSON's own
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_jsonl(path: Path, *, is_partial_allowed: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order. Raises ValueError naming file and line.

    With `is_partial_allowed` a last line that does not end in a newline is left out instead.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if is_partial_allowed and not line.endswith(b"\n"):
                return
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}: expected an object, got {type(value).__name__}")
            yield value


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file to the side and rename it, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = path.with_name(f".{path.name}.{os.getpid()}")
    with side.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    side.replace(path)


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write all objects at once, atomically."""
    write_atomic(path, "".join(dumps(v) + "\n" for v in values))


def append_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Add objects at the end, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(dumps(v) + "\n" for v in values))


def side_folder(final: Path) -> Path:
    """An empty folder beside `final` for what is renamed when it is whole; removes those of processes that are gone.

    Other machines may write beside it, too: a process is known to be gone on its own machine only.
    """
    here = socket.gethostname()
    for path in final.parent.glob(f".*.{glob.escape(here)}.*"):
        process = path.suffix[1:]
        if process.isdecimal() and not is_alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)
    side = final.with_name(f".{final.name}.{here}.{os.getpid()}")
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    return side


def is_alive(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def flush_to_disk(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _span(value: Any) -> Span:
    start, end = value
    return Span(float(start), float(end))


def _spans(values: Any) -> tuple[Span, ...]:
    return tuple(_span(v) for v in values)


def sample_from_json(value: dict[str, Any]) -> GroundingSample:
    """Inverse of `to_json`."""
    return GroundingSample(
        sample_id=value["sample_id"],
        video=Path(value["video"]),
        query=value["query"],
        windows=_spans(value["windows"]),
        duration=value["duration"],
        split=value["split"],
        tags=tuple(value.get("tags", ())),
        source=value.get("source", ""),
    )


def response_from_json(value: dict[str, Any]) -> Response:
    """Inverse of `to_json`."""
    answer = value["answer"]
    return Response(
        anchors=_spans(value["anchors"]),
        answer=None if answer is None else _span(answer),
        faults=tuple(Fault(f) for f in value["faults"]),
        reasoning=value["reasoning"],
    )


def reward_from_json(value: dict[str, Any]) -> RewardBreakdown:
    """Inverse of `to_json`. Older files have the terms beside the total instead of below `terms`."""
    terms = dict(value)
    total, anchor_ious = terms.pop("total"), tuple(terms.pop("anchor_ious"))
    return RewardBreakdown(total, terms.get("terms", terms), anchor_ious)


def group_from_json(value: dict[str, Any]) -> RolloutGroup:
    """Inverse of `to_json`."""
    rollouts = []
    for item in value["rollouts"]:
        completion = dict(item["completion"])
        completion["token_ids"] = tuple(completion["token_ids"])
        completion["logps"] = tuple(completion["logps"])
        response, reward = response_from_json(item["response"]), reward_from_json(item["reward"])
        rollouts.append(Rollout(Completion(**completion), response, reward))
    prompt = Prompt(sample_from_json(value["prompt"]["sample"]), value["prompt"]["text"])
    return RolloutGroup(prompt, tuple(rollouts), value["step"])


def with_rounded_logps(group: RolloutGroup) -> RolloutGroup:
    """Round log-probabilities to five digits: rollouts are read by people and by the filter, not trained on again."""
    rollouts = []
    for rollout in group.rollouts:
        # a policy whose weights broke must still be readable; JSON has no NaN
        rounded = tuple(round(v, 5) if math.isfinite(v) else UNKNOWN_LOGP for v in rollout.completion.logps)
        rollouts.append(replace(rollout, completion=replace(rollout.completion, logps=rounded)))
    return replace(group, rollouts=tuple(rollouts))


def trace_from_json(value: dict[str, Any]) -> Trace:
    """Inverse of `to_json`."""
    return Trace(value["sample_id"], value["text"], value["reward"], tuple(value["anchor_ious"]))


def prediction_from_json(value: dict[str, Any]) -> Prediction:
    """Inverse of `to_json`."""
    answer = value["answer"]
    return Prediction(
        **{
            **value,
            "windows": _spans(value["windows"]),
            "anchors": _spans(value["anchors"]),
            "answer": None if answer is None else _span(answer),
            "faults": tuple(value["faults"]),
        }
    )
