"""Settings as run.py composes them. Nothing here imports torch."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir

from tartvg.config import Config, register, to_dataclasses

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["monitors=off", "faithfulness.kinds=[]"]
"""Nothing is measured for monitors alone, and no evaluation is followed by its controls."""
OPEN_FILTER = ["filter.min_reward=-100", "filter.min_anchors=0", "filter.min_ious=[]"]
"""A filter that keeps whatever an untrained base says."""

register()


def watched(overrides):
    """The same settings with monitors and controls, where a test is about them."""
    return [override for override in overrides if override not in QUIET]


@contextmanager
def composer(root: Path = ROOT) -> Iterator[None]:
    """Hydra's compose API on the conf/ below `root`."""
    before = os.environ.get("TARTVG_ROOT")
    os.environ["TARTVG_ROOT"] = str(root)
    try:
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            yield
    finally:
        if before is None:
            del os.environ["TARTVG_ROOT"]
        else:
            os.environ["TARTVG_ROOT"] = before


@functools.cache
def composed(*overrides: str) -> Config:
    return composed_below(ROOT, *overrides)


def composed_below(root: Path, *overrides: str) -> Config:
    with composer(root):
        return to_dataclasses(compose("config", overrides=list(overrides)))


def files(folder: str) -> list[str]:
    """Choices of a top-level group, nested ones as `question/variant`."""
    top = ROOT / folder
    return sorted(path.relative_to(top).with_suffix("").as_posix() for path in top.rglob("*.yaml"))


RECORDING_STAGE = """
import json
from pathlib import Path


def run(config):
    folder = Path(config.runs_dir) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seen.json").write_text(json.dumps([config.anchors.count, config.seed]))
    if config.seed == 1:
        raise RuntimeError("no luck")
    return 3 if config.seed == 3 else None
"""
