"""What goes wrong in a step and costs that step, or one group of it, but not the run.

Every fault is a line of `<stage>/faults.jsonl`; what a non-finite step was made of lies in `<stage>/faults/`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tartvg.config import SettingError
from tartvg.records import append_jsonl, dumps, write_jsonl
from tartvg.training import distributed

FAULTS = "faults.jsonl"


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


class Faults:
    """The record of one stage's faults, and the number of steps skipped in a row.

    Of several processes only the active one writes; the others count along.
    """

    def __init__(self, folder: Path, max_skipped: int, in_row: int = 0, is_active: bool = True) -> None:
        self.folder = folder
        self.max_skipped = max_skipped
        self.in_row = in_row
        self.is_active = is_active
        self.own: list[str] = []
        """What an inactive process has to tell."""

    def record(self, step: int, kind: str, **what: Any) -> None:
        """Write one line into the file and to the screen."""
        if not self.is_active:
            return
        append_jsonl(self.folder / FAULTS, [{"step": step, "kind": kind, **finite(what)}])
        said = ", ".join(f"{name} {value}" for name, value in what.items())
        print(f"step {step}: {kind.replace('_', ' ')}: {said}", flush=True)

    def record_own(self, step: int, kind: str, **what: Any) -> None:
        """`record` for what happened to this process alone: it waits for `share` where this is not the active one."""
        if self.is_active:
            self.record(step, kind, **what)
        else:
            self.own.append(dumps({"step": step, "kind": kind, **finite(what)}))

    def share(self) -> None:
        """Record what happened to the other processes. All of them call it."""
        if distributed.world_size() == 1:
            return
        for line in distributed.all_gather_lines(self.own):
            self.record(**json.loads(line))
        self.own.clear()

    def passed(self) -> None:
        """Note a step whose loss and gradient were finite."""
        self.in_row = 0

    def skipped(self, step: int, norm: float, offenders: Sequence[dict[str, Any]]) -> None:
        """Note a step that was not taken. Raises SettingError at the last one of `max_skipped` in a row."""
        path = self.folder / "faults" / f"step_{step:06d}.jsonl"
        if self.is_active:
            write_jsonl(path, map(finite, offenders))
        self.in_row += 1
        ids = [offender.get("sample_id") for offender in offenders]
        self.record(step, "non_finite", grad_norm=norm, samples=ids, action="step skipped", in_row=self.in_row)
        self._stop_at_the_limit(
            "had a non-finite loss or gradient",
            f"what they were made of is in {path.parent}. A lower learning rate is the usual cure",
        )

    def empty(self, step: int) -> None:
        """Note a step that had nothing to train on. Raises SettingError at the last one of `max_skipped` in a row."""
        self.in_row += 1
        self.record(step, "empty_step", action="step skipped", in_row=self.in_row)
        self._stop_at_the_limit(
            "had nothing to train on",
            f"no video of theirs can be decoded, or none fits into memory: {FAULTS} in {self.folder} says which. "
            "stage=check_data looks the videos over, stage=memory the plan",
        )

    def _stop_at_the_limit(self, what: str, advice: str) -> None:
        if self.in_row >= self.max_skipped:
            raise SettingError(f"{self.in_row} steps in a row {what} (trainer.max_skipped_steps); {advice}")
