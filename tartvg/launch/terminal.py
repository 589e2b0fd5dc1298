"""What a process says: in letters that the terminal has, and once. No torch."""

from __future__ import annotations

import io
import os
import sys
from functools import lru_cache

from tartvg.launch.processes import is_follower


def print_anything() -> None:
    """Escape what the encoding of the terminal lacks instead of raising UnicodeEncodeError, here and in children."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="backslashreplace")
            os.environ["PYTHONIOENCODING"] = f"{stream.encoding}:backslashreplace"


@lru_cache(maxsize=4096)
def warn_once(text: str) -> None:
    """Print a warning on rank 0, the first time that this process has it."""
    if not is_follower():
        print(f"warning: {text}", file=sys.stderr, flush=True)
