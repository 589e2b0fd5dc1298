"""The curriculum between stage=rollouts, which measures the untouched base, and the stages that train with GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tartvg.config import Config, DifficultyRule, SettingError
from tartvg.data.difficulty import Difficulty, Selection, difficulties, difficulty_from_json, select
from tartvg.records import dumps, group_from_json, read_jsonl, write_atomic, write_jsonl
from tartvg.stages.folder import run_dir
from tartvg.stages.keys import fingerprint, settings_of
from tartvg.types import Prompt

MEASURED = "difficulty.jsonl"
"""What stage=rollouts writes: one line per query."""
CHOSEN = "difficulty.json"
"""What a training stage writes: the rule, its counts and its histogram."""


def write_difficulties(folder: Path) -> None:
    """Write the difficulty of every query of `folder`/rollouts.jsonl beside it."""
    write_jsonl(folder / MEASURED, difficulties(map(group_from_json, read_jsonl(folder / "rollouts.jsonl"))))


def difficulty_key(config: Config) -> dict[str, Any]:
    """What a training stage depends on, where it selects its queries: rule and measurements."""
    if config.difficulty.keep is DifficultyRule.all:
        return {}
    rule = {name: value for name, value in settings_of(config, "difficulty").items() if name != "difficulty.passes"}
    return {**rule, "difficulties": fingerprint(_source(config))}


def choose(config: Config, stage: str, folder: Path, prompts: list[Prompt], *, is_writing: bool) -> list[Prompt]:
    """The prompts that `difficulty` keeps. With `is_writing` it says what they are, and writes it into `folder`.

    Raises SettingError where a file cannot be read, or nothing is kept, also of one part of a mix.
    """
    rule = config.difficulty
    if rule.keep is DifficultyRule.all:
        return prompts
    chosen, selection = select(prompts, _read(_source(config)), rule, config.seed)
    if is_writing:
        print("\n".join(words(stage, rule.keep, selection)))
        write_atomic(folder / CHOSEN, dumps(selection) + "\n")
    for part in config.dataset.parts or [""]:
        if all(p.sample.source != part for p in chosen):
            raise SettingError(
                f"difficulty.keep={rule.keep.value}: no query{f' of {part}' * bool(part)} is left "
                f"({selection.rule}; {selection.num_unmeasured} of {selection.num_queries} were not measured)"
            )
    return chosen


def words(stage: str, keep: DifficultyRule, selection: Selection) -> list[str]:
    """What a rule keeps, as lines: the counts, then one line per bin that holds a query."""
    unmeasured = f"; {selection.num_unmeasured} were not measured" if selection.num_unmeasured else ""
    head = f"{stage}: difficulty.keep={keep.value} keeps {selection.num_kept} of {selection.num_queries} queries"
    edges = selection.edges
    bins = zip(edges, edges[1:], selection.measured, selection.kept, strict=False)
    rows = [f"  mean {low:6.2f} to {high:6.2f}: {kept:6d} of {count:6d}" for low, high, count, kept in bins if count]
    return [f"{head} ({selection.rule}){unmeasured}", *rows]


def _source(config: Config) -> Path:
    """The measurements. Raises SettingError where there are none."""
    given = config.difficulty.file
    path = run_dir(config) / "rollouts" / MEASURED if given is None else Path(given)
    if not path.is_file():
        what = f"difficulty.keep={config.difficulty.keep.value} needs {path}"
        how = "run stage=rollouts with the same name first, with difficulty.passes=1 for every training query"
        raise SettingError(f"{what}: {how}" if given is None else f"difficulty.file: there is no file {path}")
    return path


def _read(path: Path) -> dict[str, Difficulty]:
    try:
        return {row["sample_id"]: difficulty_from_json(row) for row in read_jsonl(path)}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} is not what stage=rollouts writes ({error})") from error
