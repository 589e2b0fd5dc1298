"""What did not fit into memory under ZeRO-3, remembered from one start of a stage to the next.

There every process brings its share of the weights to every pass of the others. One that runs out of memory in the
middle of a pass cannot try again, as the others wait for it in that pass. It notes here what did not fit and ends with
`AGAIN_CODE`; the same command goes on from the last checkpoint and computes in parts what is as large.
"""

from __future__ import annotations

from pathlib import Path

from tartvg.records import append_jsonl, flush_to_disk, read_jsonl
from tartvg.training import distributed
from tartvg.training.out_of_memory import GroupLoss, fewer_rows

FOLDER = "retreats"


class Retreats:
    """The retreats of one stage: `<stage>/retreats/<rank>.jsonl`, each process its own file; all are read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FOLDER / f"{distributed.rank()}.jsonl"
        files = sorted(self.path.parent.glob("*.jsonl"))
        self.rows = [row for file in files for row in read_jsonl(file, is_partial_allowed=True)]

    def parts(self, step: int, group: GroupLoss) -> int:
        """In how many parts a group of this step is computed; 0: it is left out.

        A group that failed is left out where it failed as single rows, and nowhere else.
        """
        found = [row for row in self.rows if self.is_about(row, step, group)]
        if any(row["parts"] == 0 for row in found):
            return 0
        as_large = [r for r in self.rows if r["step"] <= step and r["num_tokens"] <= group.num_tokens]
        return min(group.num_rows, max((row["parts"] for row in as_large), default=1) or 1)

    def is_about(self, row: dict[str, object], step: int, group: GroupLoss) -> bool:
        """Whether a row is about this very group."""
        return row["step"] == step and row["sample_id"] == group.sample_id

    def is_new(self, step: int, group: GroupLoss) -> bool:
        """Whether this very group is why there is a retreat."""
        return any(self.is_about(row, step, group) for row in self.rows)

    def add(self, step: int, group: GroupLoss) -> int:
        """Note that a group did not fit; returns in how many parts it is tried next, 0 for leaving it out."""
        parts = fewer_rows(self.parts(step, group), group.num_rows)
        row = {"step": step, "sample_id": group.sample_id, "num_tokens": group.num_tokens, "parts": parts}
        append_jsonl(self.path, [row])
        flush_to_disk(self.path)
        self.rows.append(row)
        return parts
