"""The installed command `tartvg`: what `python run.py` does in a clone, from any folder. No torch."""

from __future__ import annotations

import os
import sys

from tartvg.config.place import project_root


def main() -> None:
    """Become run.py, with the same arguments: the processes that it starts run that file again."""
    os.execv(sys.executable, [sys.executable, str(project_root() / "run.py"), *sys.argv[1:]])
