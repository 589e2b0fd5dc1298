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

from tartvg.config import SamplingConfig, ValidationConfig
from tartvg.evaluation.answers import prediction
from tartvg.evaluation.score import score
from tartvg.policy.policy import Policy
from tartvg.records import append_jsonl, dumps, prediction_from_json, read_jsonl, write_atomic
from tartvg.training import distributed
from tartvg.training.prefetch import clips_ahead, split, videos_of
from tartvg.training.probes import decodable, greedy_answers
from tartvg.types import Prediction, Prompt

ROWS = "validation.jsonl"
BEST = "best"


@dataclass(frozen=True)
class Questions:
    """What a policy is asked, and how often."""

    settings: ValidationConfig
    prompts: Sequence[Prompt]
    """Each with at least one window."""
    limits: SamplingConfig
    batch_size: int
    num_workers: int = 0
    """Decoder processes that work ahead."""


class Validation:
    """The measurements of one stage. Every process calls every method, and rank 0 writes."""

    def __init__(self, questions: Questions, folder: Path, max_steps: int) -> None:
        self.questions = questions
        self.folder = folder
        self.max_steps = max_steps
        path = folder / ROWS
        found = read_jsonl(path, is_partial_allowed=True) if path.is_file() else ()
        self.rows = {int(row["step"]): row for row in found}

    def is_due(self, step: int) -> bool:
        """Return whether the policy is measured after so many steps."""
        return step == self.max_steps or (step > 0 and step % self.questions.settings.every == 0)

    def known(self, step: int) -> dict[str, float]:
        """Return the metrics of a step that has been measured."""
        row = self.rows[step]
        names = [name for name in row if name in ("miou", "num_unparsed", "num_missing") or name.endswith("/miou")]
        return {f"eval/val/{name}": float(row[name]) for name in names}

    def answers(self, policy: Policy) -> list[Prediction]:
        """Answer this rank's share of the queries. Its parameters must be gathered."""
        own = self.questions.prompts[distributed.rank() :: distributed.world_size()]
        batches = split(own, self.questions.batch_size)
        answers: list[Prediction] = []
        with policy.timer.booked_as("monitor"):
            for prompts, clips in clips_ahead(batches, videos_of, policy, self.questions.num_workers):
                prepared = decodable(policy, prompts, "validation", clips)
                clips.clear()  # pixels, of which nothing is needed any more
                said = greedy_answers(policy, prepared, self.questions.limits)
                answers += [prediction(p.prompt.sample, c, 0) for p, c in zip(prepared, said, strict=True)]
        return answers

    def row(self, step: int, answers: Sequence[Prediction]) -> dict[str, Any]:
        """Gather the answers of all ranks and score them."""
        everyone = [
            prediction_from_json(json.loads(line)) for line in distributed.all_gather_lines(list(map(dumps, answers)))
        ]
        samples = [p.sample for p in self.questions.prompts]
        card = score(samples, everyone, resamples=0)
        counts = {name: getattr(card, name) for name in ("num_queries", "num_unparsed", "num_missing")}
        row = {"step": step, "miou": card.miou.value, **counts}
        for source in sorted({s.source for s in samples} - {""}):
            own = [s for s in samples if s.source == source]
            ids = {s.sample_id for s in own}
            said = [p for p in everyone if p.sample_id in ids]
            row[f"{source}/miou"] = score(own, said, resamples=0).miou.value
        return row

    def keep(self, row: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Record a row. `save` writes the adapter into a folder, where the row is the best so far.

        The adapter comes first: what a kill separates from its row is measured and saved again.
        """
        if distributed.is_rank_zero():
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
        """Return the adapter that becomes the stage's result instead of the last one; None keeps the last one."""
        return self.folder / BEST / "adapter" if self.questions.settings.keep_best else None
