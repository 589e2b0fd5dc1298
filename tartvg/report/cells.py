"""Several runs as one comparison: a sweep, runs by name, or a W&B group -> variants, each with its seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tartvg.config.jobs import FAILED, FINISHED, Job, differing, jobs_below, value_of
from tartvg.config.sweeps import axes, cells
from tartvg.report.runs import ALL_STAGES, TARGETS, RunFolder, read_run

NOT_RUN = "not run"
SEED = re.compile(r"(^|[/,])seed=(\d+)")


@dataclass(frozen=True)
class Entry:
    """One run of a comparison, or the place of one that is not there yet."""

    variant: str
    seed: str
    status: str
    """`finished`, `failed`, `running` (or killed) or `not run`."""
    error: str = ""
    run: RunFolder | None = None
    overrides: tuple[str, ...] = ()

    @property
    def final(self) -> str | None:
        """The last policy of the method that was scored."""
        scores = self.run.scores if self.run else {}
        return next((t for t in reversed(TARGETS) if t in scores), next(iter(scores), None))


@dataclass(frozen=True)
class Comparison:
    """Entries in the order of the table; `axes` are the keys in which the variants differ."""

    title: str
    entries: tuple[Entry, ...]
    axes: tuple[str, ...] = ()

    @property
    def variants(self) -> list[str]:
        """Names of the rows, in order."""
        return list(dict.fromkeys(e.variant for e in self.entries))

    def of(self, variant: str) -> list[Entry]:
        """The entries of one row that have a run, by seed."""
        return [e for e in self.entries if e.variant == variant and e.run is not None]

    def overrides(self, variant: str) -> tuple[str, ...]:
        """The overrides of a row's first entry."""
        return next(e.overrides for e in self.entries if e.variant == variant)


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the jobs of a sweep."""
    return next(jobs_below(folder), None) is not None and not is_run(folder)


def is_run(folder: Path) -> bool:
    """Whether a folder holds the stages of a run."""
    return any((folder / stage).is_dir() for stage in ALL_STAGES)


def read_sweep_folder(folder: Path) -> Comparison:
    """All jobs below `folder` and, of the last call, those that never began. Raises ValueError for a damaged file."""
    done: dict[tuple[str, ...], tuple[Path | None, Job | None]] = {cell: (None, None) for cell in _planned(folder)}
    for path, job in jobs_below(folder):
        done[tuple(job.overrides)] = (path, job)
    keys = differing(list(done))
    entries = []
    for overrides, (place, found) in done.items():
        entries.append(
            Entry(
                _label(overrides, keys),
                value_of(overrides, "seed") or "0",
                found.status if found else NOT_RUN,
                found.error if found else "",
                read_run(place) if place is not None and is_run(place) else None,
                overrides,
            )
        )
    return Comparison(folder.name, tuple(_by_variant(entries)), tuple(keys))


def read_runs(folders: Sequence[Path], title: str, top: Path) -> Comparison:
    """Several run folders, or folders of sweeps. Runs whose paths differ in their seed only are one variant."""
    entries: list[Entry] = []
    for folder in folders:
        name = folder.relative_to(top).as_posix() if folder.is_relative_to(top) else folder.name
        if is_sweep(folder):
            inner = read_sweep_folder(folder)
            rows = [Entry(f"{name}: {e.variant}", e.seed, e.status, e.error, e.run, e.overrides) for e in inner.entries]
            entries += rows if len(folders) > 1 else inner.entries
            continue
        run = read_run(folder)
        seed = SEED.search(name)
        label = SEED.sub("", name).strip("/,") or name
        finished = bool(run.manifests) and all(m.get("finished") for m in run.manifests.values())
        status = FINISHED if finished or run.scores else "running"
        entries.append(Entry(label, seed.group(2) if seed else str(config_of(run, "seed", 0)), status, "", run))
    return Comparison(title, tuple(_by_variant(entries)))


def runs_of_group(top: Path, group: str) -> list[Path]:
    """Run folders below `top` whose W&B group is `group`: as set, else the name of the run or of its sweep."""
    given: dict[Path, str | None] = {}
    for manifest in sorted(top.rglob("manifest.json")):
        stage = manifest.parent
        run = stage.parent.parent if stage.parent.name == "evaluate" else stage.parent
        if not any(part.startswith(".") for part in run.relative_to(top).parts):
            given[run] = given.get(run) or _of_config(stage / "config.yaml", "tracking.group")

    def is_of_group(run: Path) -> bool:
        name = run.relative_to(top).as_posix()
        return name == group or name.startswith(f"{group}/")

    return sorted(run for run, name in given.items() if name == group or (name is None and is_of_group(run)))


def config_of(run: RunFolder, key: str, default: Any) -> Any:
    """One value of the run's settings."""
    if run.config is None:
        return default
    value = OmegaConf.select(OmegaConf.create(run.config), key)
    return default if value is None else value


def _of_config(path: Path, key: str) -> Any:
    try:
        return OmegaConf.select(OmegaConf.load(path), key)
    except (OSError, OmegaConfBaseException, ValueError):
        return None


def _planned(folder: Path) -> Iterator[tuple[str, ...]]:
    path = folder / "multirun.yaml"
    params = _of_config(path, "hydra.sweeper.params")
    task = _of_config(path, "hydra.overrides.task")
    if params:
        yield from (tuple(cell) for cell in cells(axes(dict(params), [str(o) for o in task or ()])))


def _label(overrides: Sequence[str], keys: Sequence[str]) -> str:
    """What tells a row from the others: the value alone where one key differs, else `key=value` for each."""
    if not keys:
        return "all"
    values = {key: value_of(overrides, key) or "default" for key in keys}
    if len(keys) == 1:
        (value,) = values.values()
        return value.rpartition("/")[2] if list(keys) == ["experiments"] else value
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())


def _by_variant(entries: Sequence[Entry]) -> Iterator[Entry]:
    for variant in dict.fromkeys(e.variant for e in entries):
        yield from sorted((e for e in entries if e.variant == variant), key=lambda e: (len(e.seed), e.seed))


def status_line(comparison: Comparison) -> str:
    """How many runs finished, and which did not, in words."""
    entries = comparison.entries
    count = sum(e.status == FINISHED for e in entries)
    text = f"{count} of {len(entries)} runs finished."
    for e in entries:
        if e.status != FINISHED:
            text += f" {e.variant}, seed {e.seed}: {e.status}"
            text += f" ({e.error})." if e.status == FAILED and e.error else "."
    return text
