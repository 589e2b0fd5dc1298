"""What became of the jobs of a sweep: one small file in each job's folder, and a summary at the end. No torch.

The jobs may run in this process, in others or on other machines: files in the run folders are what all of them share.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

JOB = "job.json"
RUNNING, FINISHED, FAILED = "running", "finished", "failed"


@dataclass
class Job:
    """One cell of a table."""

    overrides: list[str]
    """As given to this job: `anchors=one`, `seed=0`."""
    status: str = RUNNING
    """`running` also after the process died: there was nobody left to say more."""
    exit_code: int | None = None
    error: str = ""
    """One line."""
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""
    seconds: float = 0.0
    """Wall clock of the last attempt."""

    def save(self, folder: Path) -> None:
        """Write `<folder>/job.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def end(self, folder: Path, exit_code: int, error: str = "") -> None:
        """Record how the job ended."""
        self.status = FAILED if exit_code else FINISHED
        self.exit_code, self.error = exit_code, error
        self.seconds = round(time.time() - self.started, 3)
        self.save(folder)


def read_job(folder: Path) -> Job | None:
    """Read the job of a run folder; None where there is none or its file is damaged."""
    try:
        value = json.loads((folder / JOB).read_text(encoding="utf-8"))
        known = {f.name for f in fields(Job)}
        return Job(**{name: item for name, item in value.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def jobs_below(folder: Path) -> Iterator[tuple[Path, Job]]:
    """Run folders of jobs below a sweep's folder, in the order of their names, with their jobs."""
    for path in sorted(folder.rglob(JOB)):
        found = read_job(path.parent)
        if found is not None:
            yield path.parent, found


def value_of(overrides: Sequence[str], key: str) -> str | None:
    """Return the value that a job's overrides give one key."""
    return next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), None)


def differing(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Keys, other than the seed, in which the overrides of several jobs differ, in their order."""
    keys = dict.fromkeys(o.partition("=")[0] for overrides in jobs for o in overrides)
    return [k for k in keys if k != "seed" and len({value_of(overrides, k) for overrides in jobs}) > 1]


def summary(folder: Path, since: float) -> str:
    """Word how the jobs below `folder` that began at or after `since` ended, failed ones by name; empty without any."""
    ended = [(path, job) for path, job in jobs_below(folder) if job.started >= since]
    if not ended:
        return ""
    counts = {status: sum(job.status == status for _, job in ended) for status in (FINISHED, FAILED, RUNNING)}
    keys = [*differing([job.overrides for _, job in ended]), "seed"]
    lines = [f"{len(ended)} jobs in {folder}: {counts[FINISHED]} finished, {counts[FAILED]} failed"]
    if counts[RUNNING]:
        lines[0] += f", {counts[RUNNING]} not at an end"
    for path, job in ended:
        if job.status == FAILED:
            label = ", ".join(o for o in job.overrides if o.partition("=")[0] in keys) or path.name
            lines.append(f"  failed: {label} (exit code {job.exit_code}): {job.error}")
    if counts[FINISHED] < len(ended):
        lines.append("  The same command again does what is missing and nothing twice.")
    return "\n".join(lines)


class SweepWatch(Callback):
    """Hydra's own hook in the process that starts the jobs: it alone knows the sweep's folder."""

    sweeps: list[tuple[Path, float]] = []  # noqa: RUF012 - of the class: Hydra makes the object and keeps it

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where and when."""
        self.sweeps.append((Path(config.hydra.sweep.dir), time.time()))


def print_summaries() -> None:
    """Say on stderr how the jobs of this process's sweeps ended."""
    for folder, since in SweepWatch.sweeps:
        text = summary(folder, since)
        if text:
            print(text, file=sys.stderr)
    SweepWatch.sweeps.clear()
