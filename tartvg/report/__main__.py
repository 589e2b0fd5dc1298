"""Tables over several runs or one sweep, as Markdown: `python -m tartvg.report runs/anchors` or `... runs/a runs/b`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tartvg.launch.terminal import print_anything
from tartvg.report.cells import is_run, is_sweep, read_sweep_folder
from tartvg.report.compare import (
    anchors_table,
    budget_table,
    comparison_table,
    differences,
    reference_of,
    significance_table,
)
from tartvg.report.seeds import tables
from tartvg.report.tables import Table, to_markdown


def main(arguments: list[str]) -> int:
    """Print the tables; returns the exit code."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    folders = [Path(a) for a in arguments]
    try:
        found = _tables(folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in found:
        print(to_markdown(table) + "\n")
    return 0


def _tables(folders: Sequence[Path]) -> list[Table]:
    """Of one folder, what it is: a sweep, a run, or both."""
    if len(folders) > 1 or not is_sweep(folders[0]):
        return tables(folders)
    return [*(tables(folders) if is_run(folders[0]) else []), *_of_sweep(folders[0])]


def _of_sweep(folder: Path) -> list[Table]:
    """Without the data set there is no test by video; stage=report makes it."""
    comparison = read_sweep_folder(folder)
    tested = significance_table(differences(comparison, reference_of(comparison), {}))
    scored = [comparison_table(comparison), *([tested] if tested else []), anchors_table(comparison)]
    return [*scored, budget_table(comparison)]


if __name__ == "__main__":
    print_anything()
    sys.exit(main(sys.argv[1:]))
