"""Tables over several runs, as Markdown: `python -m tartvg.report runs/default/seed=0 runs/default/seed=1`."""

from __future__ import annotations

import sys
from pathlib import Path

from tartvg.report.seeds import tables
from tartvg.report.tables import to_markdown


def main(arguments: list[str]) -> int:
    """Print the tables; returns the exit code."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        for table in tables([Path(a) for a in arguments]):
            print(to_markdown(table) + "\n")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
