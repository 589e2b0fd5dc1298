"""Where run.py, conf/, sweeps/ and experiments/ lie. No torch."""

from __future__ import annotations

import os
from pathlib import Path

ROOT_VARIABLE = "TARTVG_ROOT"
"""run.py sets it to its own folder; conf/config.yaml finds experiments/ and sweeps/ through it."""


def project_root() -> Path:
    """The folder that run.py has named; else that inside the package, where a wheel keeps it; else the clone."""
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(named)
    package = Path(__file__).resolve().parents[1]
    inside = package / "root"
    return inside if inside.is_dir() else package.parent
