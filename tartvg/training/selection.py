"""How well a policy answers while it is trained, on queries that it does not train on, and its best state so far.

    <stage>/validation.jsonl   one line per measurement, with the number of steps behind it
    <stage>/best/              the adapter with the highest mIoU of them, the earliest of equals, and best.json

Greedy answers, so a measurement depends on the weights alone and a stage that is resumed comes to the same ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tartvg.config import SamplingConfig, SelectionConfig
from tartvg.data.packets import VideoError
from tartvg.evaluation.score import answer_iou
from tartvg.policy.policy import Policy
from tartvg.policy.sampling import greedy
from tartvg.records import append_jsonl, dumps, read_jsonl, write_atomic
from tartvg.response import parse_response
from tartvg.training import ranks
from tartvg.types import Prompt

ROWS = "validation.jsonl"
BEST = "best"


@dataclass(frozen=True)
class Questions:
    """What a policy is asked, and how often."""

    settings: SelectionConfig
    prompts: Sequence[Prompt]
    """Each with at least one window."""
    limits: SamplingConfig
    batch_size: int


class Selection:
    """The measurements of one stage. Every method is called by all processes, and the leader writes."""

    def __init__(self, questions: Questions, folder: Path, max_steps: int) -> None:
        self.questions = questions
        self.folder = folder
        self.max_steps = max_steps
        path = folder / ROWS
        found = read_jsonl(path, is_partial_allowed=True) if path.is_file() else ()
        self.rows = {int(row["step"]): row for row in found}

    def is_due(self, step: int) -> bool:
        """Whether the policy is measured after so many steps."""
        return step == self.max_steps or (step > 0 and step % self.questions.settings.every == 0)

    def known(self, step: int) -> dict[str, float]:
        """The metrics of a step that has been measured."""
        row = self.rows[step]
        return {f"eval/val/{name}": float(row[name]) for name in ("miou", "num_unparsed", "num_missing")}

    def ask(self, policy: Policy, step: int) -> dict[str, Any]:
        """A new row; each process answers its share. The policy's weights must be whole."""
        prompts, size = self.questions.prompts, self.questions.batch_size
        own = range(ranks.rank(), len(prompts), ranks.world_size())
        lines: list[str] = []
        with policy.timer.booked_as("monitor"):
            for start in range(0, len(own), size):
                lines += self._answers(policy, own[start : start + size])
        answers = sorted((json.loads(line) for line in ranks.gather(lines)), key=lambda answer: int(answer[0]))
        return {
            "step": step,
            "miou": sum(value for _, value, _ in answers) / len(prompts),
            "num_queries": len(prompts),
            "num_unparsed": sum(not is_read for _, _, is_read in answers),
            "num_missing": len(prompts) - len(answers),
        }

    def _answers(self, policy: Policy, places: Sequence[int]) -> list[str]:
        prepared = []
        for place in places:
            prompt = self.questions.prompts[place]
            try:
                prepared.append((place, policy.prepare(prompt)))
            except VideoError as error:
                print(f"validation: {prompt.sample.sample_id} counts as missing: {error}")
        if not prepared:
            return []
        limits = greedy(self.questions.limits)
        groups = policy.sample([p for _, p in prepared], 1, limits, [0] * len(prepared))
        lines = []
        for (place, item), (completion,) in zip(prepared, groups, strict=True):
            answer = parse_response(completion.text).answer
            value = answer_iou(answer, item.prompt.sample.windows)
            lines.append(json.dumps([place, value, answer is not None]))
        return lines

    def keep(self, row: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Record a row. `save` writes the adapter into a folder, where the row is the best so far.

        The adapter comes first: what a kill separates from its row is measured and saved again.
        """
        if ranks.is_leader():
            if row["miou"] > max((r["miou"] for r in self.rows.values() if r["step"] < row["step"]), default=-1.0):
                side = self.folder / f".{BEST}"
                shutil.rmtree(side, ignore_errors=True)
                save(side / "adapter")
                write_atomic(side / "best.json", dumps(row) + "\n")
                shutil.rmtree(self.folder / BEST, ignore_errors=True)
                side.rename(self.folder / BEST)
            append_jsonl(self.folder / ROWS, [row])
        self.rows[row["step"]] = row

    def chosen(self) -> Path | None:
        """The adapter that becomes the stage's result instead of the last one; None: the last one does."""
        return self.folder / BEST / "adapter" if self.questions.settings.keep == "best" else None
