"""report: the run as one HTML page, and its table in the terminal."""

from __future__ import annotations

from rich.console import Console

from tartvg.config import Config, SettingError
from tartvg.report.page import build_report
from tartvg.report.tables import stage_table, to_rich
from tartvg.stages.common import prompts_of
from tartvg.stages.folder import run_dir


def run_report(config: Config) -> None:
    """Write `<run>/report.html` and print the table of stages."""
    folder = run_dir(config)
    if not folder.is_dir():
        raise SettingError(f"name={config.name}: there is no run in {folder}")
    samples = {p.sample.sample_id: p.sample for p in prompts_of(config, config.evaluate.split)}
    page = build_report(folder, samples, folder / "report.html")
    console = Console(width=max(150, Console().width))
    console.print(to_rich(stage_table(folder)))
    print(f"report: {page}")
