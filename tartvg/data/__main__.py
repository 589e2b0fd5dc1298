"""`python -m tartvg.data convert`: annotation files of one form in, another form out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tartvg.config import DatasetName
from tartvg.data.annotations import SPLITS
from tartvg.data.convert import FORMS, Conversion, convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 with one line on stderr when a file or a value cannot be used."""
    parsed = _parser().parse_args(arguments)
    try:
        done = convert(DatasetName(parsed.dataset), parsed.annotations, parsed.split, parsed.to, parsed.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(done, parsed.to, parsed.out))
    return 0


def render(done: Conversion, form: str, out: Path) -> str:
    """What was read and written, and what the new file does not say."""
    lost = ", ".join(f"{what} of {count} queries" for what, count in done.losses.items())
    wrote = f"{done.num_queries} queries with {done.num_windows} windows about {done.num_videos} videos"
    return f"read   {done.source}\nwrote  {out} ({form}): {wrote}\nlost   {lost or 'nothing'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tartvg.data", description="Annotation files.")
    commands = parser.add_subparsers(required=True, metavar="convert")
    command = commands.add_parser("convert", help="write annotations in another form", description=convert.__doc__)
    add = command.add_argument
    add("--dataset", required=True, choices=[name.value for name in DatasetName], help="the reader")
    add("--annotations", required=True, nargs="+", type=Path, metavar="FILE", help="Charades: .txt and .csv")
    add("--split", choices=SPLITS, default="test", help="what the annotations are (default: test)")
    add("--to", required=True, choices=FORMS, help="the form")
    add("--out", required=True, type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
