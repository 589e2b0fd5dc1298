"""Whoever asks the policy about videos has them decoded ahead, by processes that start before the policy is loaded."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
from helpers.settings import composed
from interruptions import rows

from tartvg.data.clips import DECODERS
from tartvg.policy.policy import Policy
from tartvg.records import append_jsonl
from tartvg.stages import common

ASKING = {
    "tartvg.stages.rollouts", "tartvg.stages.grpo", "tartvg.stages.sft", "tartvg.stages.evaluate",
    "tartvg.stages.controls", "tartvg.training.validation",
}  # fmt: skip


def watch_clips(path: Path) -> None:
    """Write down who prepares a prompt, and whether its clip is there by then."""
    prepare = Policy.prepare

    def watched(self, prompt, clip=None):
        frame, callers = sys._getframe(1), set()
        while frame is not None:
            callers.add(frame.f_globals.get("__name__"))
            frame = frame.f_back
        append_jsonl(path, [{"asking": sorted(callers & ASKING), "is_ahead": clip is not None}])
        return prepare(self, prompt, clip)

    Policy.prepare = watched


@pytest.mark.slow
def test_every_stage_and_every_validation_decodes_ahead(settings, run_command, tmp_path):
    """Without a cache, as with one it is only the first that asks about a video who decodes it."""
    command = [
        *settings, "stage=pipeline", "stage.sequence=[rollouts,grpo1,filter,sft,evaluate]", "grpo.max_steps=2",
        "sft.epochs=1", "validation.every=1", "evaluate.policies=[sft]", "faithfulness.kinds=[shuffled]",
        "policy.feature_cache_gib=0", "trainer.num_workers=2", f"runs_dir={tmp_path}", "name=r",
    ]  # fmt: skip
    run_command(*command, prepare=partial(watch_clips, tmp_path / "asked.jsonl"))
    asked = rows(tmp_path / "asked.jsonl")
    assert {name for row in asked for name in row["asking"]} == ASKING
    assert [row for row in asked if not row["is_ahead"]] == []


def test_decoders_start_before_the_policy_is_loaded(untrained_base, tmp_path, monkeypatch):
    config = composed(f"policy.path={untrained_base}", "trainer.num_workers=2", f"runs_dir={tmp_path}")
    waiting = []

    class Loaded(Policy):
        def __init__(self, *arguments):
            waiting.append(sum(decoder.is_usable for decoder in DECODERS._idle))
            super().__init__(*arguments)

    DECODERS.stop()
    monkeypatch.setattr(common, "Policy", Loaded)
    common.load_policy(config, None)
    assert waiting == [2]
    DECODERS.stop()
