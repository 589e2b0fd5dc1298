"""report: a run, a sweep or several runs as HTML pages, tables and figures; the table in the terminal, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tartvg.config import Config, SettingError
from tartvg.report.alarms import alarms_table
from tartvg.report.cells import Comparison, is_run, is_sweep, read_runs, read_sweep_folder, runs_of_group
from tartvg.report.compare_page import FOLDER, build_comparison, write_stage_pages
from tartvg.report.export import write_tables
from tartvg.report.faithfulness import controls_table
from tartvg.report.page import build_report
from tartvg.report.runs import RunFolder, read_run
from tartvg.report.tables import Table, filter_table, seconds_table, stage_table, to_rich
from tartvg.stages.common import prompts_of
from tartvg.stages.folder import run_dir
from tartvg.types import GroundingSample


def run_report(config: Config) -> None:
    """Write `<run>/report.html` and `<run>/report/`, and print the table of scores."""
    samples = {p.sample.sample_id: p.sample for p in prompts_of(config, config.evaluate.split)}
    folder = run_dir(config)
    comparison = comparison_of(config)
    if comparison is None:
        page, tables = report_run(folder, config.name, samples)
    else:
        page, tables = build_comparison(comparison, samples, folder)
    console = Console(width=max(150, Console().width))
    for table in tables[:2] if comparison else tables:
        console.print(to_rich(table))
    print(f"report: {page}")


def comparison_of(config: Config) -> Comparison | None:
    """What to compare; None for a single run. Raises SettingError naming what is not there."""
    top, folder = Path(config.runs_dir), run_dir(config)
    if config.report.runs:
        folders = [top / name for name in config.report.runs]
        for name, path in zip(config.report.runs, folders, strict=True):
            if not is_run(path) and not is_sweep(path):
                raise SettingError(f"report.runs: there is no run or sweep {name} in {top}")
        return read_runs(folders, config.name, top)
    if config.report.group is not None:
        folders = runs_of_group(top, config.report.group)
        if not folders:
            raise SettingError(f"report.group: no run below {top} has the group {config.report.group}")
        return read_runs(folders, config.report.group, top)
    if not folder.is_dir():
        raise SettingError(f"name={config.name}: there is no run in {folder}")
    return read_sweep_folder(folder) if is_sweep(folder) else None


def report_run(folder: Path, name: str, samples: Mapping[str, GroundingSample]) -> tuple[Path, list[Table]]:
    """The page of one run, its stage pages and its tables as files."""
    run = read_run(folder)
    alone = read_runs([folder], name.rpartition("/")[2], folder.parent)
    pages = write_stage_pages(alone, folder / FOLDER)
    page = build_report(folder, samples, folder / "report.html", {n: f"{FOLDER}/{a}" for n, a in pages.items()})
    tables = _tables(run)
    write_tables(tables, folder / FOLDER, f"TAR-TVG run: {name}")
    return page, tables


def _tables(run: RunFolder) -> list[Table]:
    """Scores, then what there is beside them."""
    beside = (
        controls_table(run.path),
        alarms_table(run.path),
        filter_table(run.filtered) if run.filtered else None,
        seconds_table(run.metrics, run.manifests),
    )
    return [stage_table(run.scores), *(table for table in beside if table)]
