"""report: a run, a sweep or several runs as HTML pages, tables and figures; the table in the terminal, too."""

from __future__ import annotations

from pathlib import Path

from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from tartvg.config import Config, GrpoConfig, SettingError
from tartvg.report.alarms import alarms_table
from tartvg.report.cells import (
    Comparison,
    is_run,
    is_sweep,
    read_entry,
    read_group,
    read_runs,
    read_sweep_folder,
)
from tartvg.report.compare_page import FOLDER, addresses, build_comparison, rubric_of, write_stage_pages
from tartvg.report.difficulty import difficulty_tables
from tartvg.report.export import write_tables
from tartvg.report.faithfulness import controls_table
from tartvg.report.page import build_report
from tartvg.report.questions import questions_of
from tartvg.report.rollout_page import write_rollout_pages
from tartvg.report.rollout_steps import Advantages
from tartvg.report.runs import RunFolder, settings_of, typed
from tartvg.report.sources import source_tables
from tartvg.report.tables import Table, filter_table, seconds_table, stage_table, throughput_table, to_rich
from tartvg.stages.folder import run_dir
from tartvg.training.credit import segment_advantages

SWEEP = "sweep"
"""Where the page of a sweep goes whose folder holds a single run as well; below the report folder of that run."""


def run_report(config: Config) -> None:
    """Write `<run>/report.html` and `<run>/report/`, and print the table of scores."""
    comparison, folder = comparison_of(config), run_dir(config)
    if comparison is not None:
        _compare(comparison, folder, config)
        return
    pages = views_of(config)
    if is_sweep(folder):
        _compare(read_sweep_folder(folder), folder / FOLDER / SWEEP, config)
        pages["the sweep in this folder"] = f"{FOLDER}/{SWEEP}/report.html"
    _show(*report_run(folder, config, pages))


def comparison_of(config: Config) -> Comparison | None:
    """Find the runs to compare; None for a single run. Raises SettingError naming what is not there."""
    top, folder = Path(config.runs_dir), run_dir(config)
    if config.report.runs:
        folders = [top / name for name in config.report.runs]
        for name, path in zip(config.report.runs, folders, strict=True):
            if not is_run(path) and not is_sweep(path):
                raise SettingError(f"report.runs: there is no run or sweep {name} in {top}")
        return read_runs(folders, config.name, top)
    if config.report.group is not None:
        comparison = read_group(top, config.report.group)
        if not comparison.entries:
            raise SettingError(f"report.group: no run below {top} has the group {config.report.group}")
        return comparison
    if not folder.is_dir():
        raise SettingError(f"name={config.name}: there is no run in {folder}")
    return read_sweep_folder(folder) if is_sweep(folder) and not is_run(folder) else None


def report_run(folder: Path, config: Config, pages: dict[str, str]) -> tuple[Path, list[Table], tuple[str, ...]]:
    """Write the page of one run, those of its stages and rollouts, and its tables; `pages` are more to link to."""
    entry = read_entry(folder, folder.parent)
    run = entry.run
    assert run is not None
    questions = questions_of([run], config.dataset)
    stages = write_stage_pages(Comparison(folder.name, (entry,)), folder / FOLDER)
    rollouts = write_rollout_pages(run, folder / FOLDER, lambda stage: advantages_of(run, stage))
    links = addresses(stages) | {title: f"{FOLDER}/{name}" for title, name in rollouts.items()} | pages
    page = folder / "report.html"
    build_report(folder, questions.samples_by_id, page, links, questions.remarks)
    tables = _tables(run)
    write_tables(tables, folder / FOLDER, f"TAR-TVG run: {config.name}")
    return page, tables, questions.remarks


def views_of(config: Config) -> dict[str, str]:
    """The link to W&B, if there is a view to link to."""
    return {"the same in W&B": config.report.view} if config.report.view else {}


def advantages_of(run: RunFolder, stage: str) -> Advantages | None:
    """What a stage paid the segments of a group's completions; None where its settings cannot be read."""
    judge = rubric_of(run, stage)
    try:
        settings = typed(GrpoConfig, settings_of(run, stage).grpo)
    except (OmegaConfBaseException, SettingError, AttributeError):
        return None
    return (lambda group: segment_advantages(group, judge, settings).tolist()) if judge else None


def _compare(comparison: Comparison, folder: Path, config: Config) -> None:
    questions = questions_of(comparison.runs, config.dataset)
    page, tables = build_comparison(comparison, questions.samples_by_id, folder, questions.remarks, views_of(config))
    _show(page, tables[:2], questions.remarks)


def _show(page: Path, tables: list[Table], remarks: tuple[str, ...]) -> None:
    console = Console(width=max(150, Console().width))
    for table in tables:
        console.print(to_rich(table))
    print("\n".join([*remarks, f"report: {page}"]))


def _tables(run: RunFolder) -> list[Table]:
    """Scores, then what there is beside them."""
    beside = (
        *source_tables(run.path, run.metrics),
        controls_table(run.path),
        alarms_table(run.path),
        *difficulty_tables(run.path),
        filter_table(run.filtered) if run.filtered else None,
        seconds_table(run.metrics, run.manifests),
        throughput_table(run.metrics),
    )
    return [stage_table(run.scores), *(table for table in beside if table)]
