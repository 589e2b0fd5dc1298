"""filter: rollouts -> traces worth imitating, by the published rule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tartvg.config import Config, FilterConfig, SettingError
from tartvg.records import group_from_json, read_jsonl, to_json, write_atomic, write_jsonl
from tartvg.response import read_marks
from tartvg.stages.folder import StageFolder, run_dir
from tartvg.stages.keys import fingerprint, settings_of
from tartvg.tracking import Tracker
from tartvg.types import Rollout, RolloutGroup, Trace


def rejections(rollout: Rollout, rule: FilterConfig) -> list[str]:
    """Return the clauses that a rollout fails; none for one that is kept (arXiv 2508.07683, stage 2)."""
    ious = rollout.reward.anchor_ious
    failed = []
    if not rollout.reward.total > rule.min_reward:
        failed.append(f"reward <= {rule.min_reward:g}")
    if len(ious) < rule.min_anchors:
        failed.append(f"fewer than {rule.min_anchors} anchors")
    for number, bound in enumerate(rule.min_ious, start=1):
        if len(ious) < number or not ious[number - 1] > bound:
            failed.append(f"soft IoU of anchor {number} <= {bound:g}")
    return failed


def answer_block(text: str) -> str | None:
    """Cut the answer's block out of a completion; None without a readable one."""
    place = read_marks(text).answer
    return None if place is None else f"<answer>{text[slice(*place)]}"


def select(
    groups: Iterable[RolloutGroup], rule: FilterConfig, *, is_direct: bool = False
) -> tuple[list[Trace], int, Counter[str]]:
    """Kept traces (in the order of the rollouts, each text once per query), rollouts read, rejections per clause.

    With `is_direct` a trace is the answer's block alone: a base that always reasons never says it by itself, so nothing
    but these traces can teach it.
    """
    rejected: Counter[str] = Counter()
    kept: dict[str, dict[str, Trace]] = {}
    total = 0
    for group in groups:
        for rollout in group.rollouts:
            total += 1
            failed = rejections(rollout, rule)
            rejected.update(failed)
            if failed:
                continue
            key, said = group.prompt.sample.sample_id, rollout.completion.text
            text = answer_block(said) if is_direct else said
            if text is None:
                rejected["no readable answer"] += 1
                continue
            trace = Trace(key, text, rollout.reward.total, rollout.reward.anchor_ious)
            if text in kept.setdefault(key, {}):
                rejected["the same text again"] += 1
            kept[key].setdefault(text, trace)
    traces = []
    for rows in kept.values():
        best = sorted(rows.values(), key=lambda t: -t.reward)
        limit = len(best) if rule.max_per_query is None else rule.max_per_query
        if best[limit:]:
            rejected[f"more than {limit} per query"] += len(best[limit:])
        traces += best[:limit]
    return traces, total, rejected


def key_of(config: Config, source: Path) -> dict[str, Any]:
    """What the traces depend on; `source` holds the rollouts."""
    cut = settings_of(config, "anchors.prompt") if config.anchors.is_direct else {}
    return {**settings_of(config, "filter"), **cut, "rollouts": fingerprint(source)}


def run_filter(config: Config) -> None:
    """Write `<run>/filter/traces.jsonl` and summary.json, and say what each clause rejected."""
    stage = config.filter.source
    source = run_dir(config) / stage / "rollouts.jsonl"
    if not source.is_file():
        raise SettingError(f"stage=filter needs {source}: run stage={stage} with the same name first")
    output = StageFolder(run_dir(config) / "filter", config, lambda: key_of(config, source))
    with output.work() as is_needed:
        if not is_needed:
            return
        traces, total, rejected = select(
            map(group_from_json, read_jsonl(source)), config.filter, is_direct=config.anchors.is_direct
        )
        write_jsonl(output.folder / "traces.jsonl", traces)
        summary = {"num_rollouts": total, "num_kept": len(traces), "rejected": dict(rejected)}
        write_atomic(output.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(f"filter: kept {len(traces)} of {total} rollouts ({len(traces) / max(total, 1):.1%})")
        for clause, count in rejected.most_common():
            print(f"  {count:6d} rejected by: {clause}")
        with Tracker(output.folder, config.tracking, config.name, "filter", to_json(config), config.seed) as tracker:
            tracker.uses(f"{source.parent.name}-rollouts", "rollouts", source)
            tracker.log({"progress/rollouts": float(total), "progress/traces": float(len(traces))}, 0)
            tracker.artifact("traces", "traces", output.folder / "traces.jsonl")
