"""Several runs as one comparison: a sweep, runs by name, or a W&B group -> variants, each with its seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tartvg.config import SettingError
from tartvg.launch.sweep_files import axes, cells
from tartvg.launch.sweeps import FINISHED, JOB, RUNNING, Job, differing, jobs_below, read_job, value_of
from tartvg.report.runs import ALL_STAGES, RunFolder, config_of, is_moved_aside, planned_targets, read_run

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
    choices: tuple[str, ...] = ()
    """The overrides that tell its variant from the others of its sweep."""
    path: Path | None = None
    """Its folder; None while there is none."""

    @property
    def expected(self) -> str | None:
        """The policy whose scores are the run's result: the last one that its own settings evaluate."""
        return next(reversed(planned_targets(self.run)), None) if self.run else None

    @property
    def final(self) -> str | None:
        """`expected` once it is scored; None before, whatever else is scored: an earlier policy is another result."""
        return self.expected if self.run and not self.lack and self.expected in self.run.scores else None

    @property
    def lack(self) -> str:
        """What keeps the run from counting, in words; empty for one that counts, and where nothing is to be scored."""
        if self.run is None or self.expected is None:
            return ""
        before = ALL_STAGES[: ALL_STAGES.index(self.expected) + 1] if self.expected in ALL_STAGES else ()
        for stage in (*before, f"evaluate/{self.expected}"):
            # Scores that lie there are those of the weights before.
            if not self.run.manifests.get(stage, {"finished": True}).get("finished"):
                return f"{stage} is not finished"
        return "" if self.expected in self.run.scores else f"{self.expected} is not scored"


@dataclass(frozen=True)
class Comparison:
    """Entries in the order of the table. Raises SettingError for two runs of one variant and seed."""

    title: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        seen: dict[tuple[str, str], Entry] = {}
        for e in self.entries:
            twin = seen.setdefault((e.variant, e.seed), e)
            if twin is not e:
                raise SettingError(
                    f"{twin.path} and {e.path} are both variant {e.variant}, seed {e.seed}, and would count as two "
                    "seeds: name one of them in report.runs, or move one away"
                )

    @property
    def variants(self) -> list[str]:
        """Names of the rows, in order."""
        return list(dict.fromkeys(e.variant for e in self.entries))

    @property
    def axes(self) -> tuple[str, ...]:
        """The keys in which the variants differ."""
        return tuple(dict.fromkeys(choice.partition("=")[0] for e in self.entries for choice in e.choices))

    @property
    def runs(self) -> list[RunFolder]:
        """Those that are there."""
        return [e.run for e in self.entries if e.run is not None]

    def of(self, variant: str) -> list[Entry]:
        """The entries of one row that have a run, by seed."""
        return [e for e in self.entries if e.variant == variant and e.run is not None]

    def choices(self, variant: str) -> tuple[str, ...]:
        """What tells a row from the others, as overrides."""
        return next(e.choices for e in self.entries if e.variant == variant)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder holds the jobs of a sweep. A single run may lie in the same folder."""
    return next(_jobs(folder), None) is not None


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: it holds stages, or what became of its job."""
    return _has_stages(folder) or (folder / JOB).is_file()


def read_sweep_folder(folder: Path) -> Comparison:
    """All jobs below `folder` and, of the last call, those that never began. Raises ValueError for a damaged file."""
    # The same overrides in another order are the same job.
    done = {frozenset(cell): (cell, folder, Job(list(cell), status=NOT_RUN)) for cell in _planned(folder)}
    for path, job in _jobs(folder):
        overrides = done.get(frozenset(job.overrides), (tuple(job.overrides),))[0]
        done[frozenset(overrides)] = (overrides, path, job)
    keys = differing([overrides for overrides, _, _ in done.values()])
    entries = []
    for overrides, path, job in done.values():
        run = read_run(path) if job.status != NOT_RUN and _has_stages(path) else None
        seed = value_of(overrides, "seed") or str(config_of(run, "seed", 0) if run else 0)
        choices = tuple(o for o in overrides if o.partition("=")[0] in keys)
        place = None if job.status == NOT_RUN else path
        entries.append(Entry(_label(overrides, keys), seed, job.status, job.error, run, choices, place))
    return Comparison(folder.name, tuple(_by_variant(entries)))


def read_runs(folders: Sequence[Path], title: str, top: Path) -> Comparison:
    """Several run folders, or folders of sweeps. Runs whose paths differ in their seed only are one variant."""
    entries: list[Entry] = []
    for folder in folders:
        found = [read_entry(folder, top)] if is_run(folder) or not is_sweep(folder) else []
        if is_sweep(folder):
            inner = read_sweep_folder(folder).entries
            name = _name(folder, top)
            is_alone = len(folders) == 1 and not found
            found += inner if is_alone else [replace(e, variant=f"{name}: {e.variant}") for e in inner]
        entries += found
    return Comparison(title, tuple(_by_variant(entries)))


def read_group(top: Path, group: str) -> Comparison:
    """The runs below `top` of one W&B group; no entries if there are none."""
    return Comparison(group, tuple(_by_variant([read_entry(folder, top) for folder in runs_of_group(top, group)])))


def read_entry(folder: Path, top: Path) -> Entry:
    """One run folder; the variant is its path below `top` without the seed. Its job, if it has one, says how it is."""
    name, run, job = _name(folder, top), read_run(folder), read_job(folder)
    seed = SEED.search(name)
    variant = SEED.sub("", name).strip("/,") or name
    is_done = bool(run.manifests) and all(m.get("finished") for m in run.manifests.values())
    is_done = is_done and all(target in run.predictions for target in planned_targets(run))
    status = job.status if job else FINISHED if is_done else RUNNING
    number = seed.group(2) if seed else str(config_of(run, "seed", 0))
    return Entry(variant, number, status, job.error if job else "", run, (), folder)


def runs_of_group(top: Path, group: str) -> list[Path]:
    """Run folders below `top` whose W&B group is `group`: as set, else the name of the run or of its sweep."""
    given: dict[Path, str | None] = {}
    for manifest in sorted(top.rglob("manifest.json")):
        stage = manifest.parent
        run = stage.parent.parent if stage.parent.name in ("evaluate", "controls") else stage.parent
        if not is_moved_aside(stage) and not any(part.startswith(".") for part in run.relative_to(top).parts):
            given[run] = given.get(run) or _of_config(stage / "config.yaml", "tracking.group")

    def is_of_group(run: Path) -> bool:
        name = run.relative_to(top).as_posix()
        return name == group or name.startswith(f"{group}/")

    return sorted(run for run, name in given.items() if name == group or (name is None and is_of_group(run)))


def _jobs(folder: Path) -> Iterator[tuple[Path, Job]]:
    """The jobs below a folder; not the one that the folder itself may be."""
    return ((path, job) for path, job in jobs_below(folder) if path != folder)


def _has_stages(folder: Path) -> bool:
    return any((folder / stage).is_dir() for stage in ALL_STAGES)


def _name(folder: Path, top: Path) -> str:
    return folder.relative_to(top).as_posix() if folder.is_relative_to(top) else folder.name


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
    begun = {(e.variant, e.seed) for e in entries if e.status != NOT_RUN}
    # A place that was planned and is taken by another job, whose other settings are the same, is not one more.
    entries = [e for e in entries if e.status != NOT_RUN or (e.variant, e.seed) not in begun]
    for variant in dict.fromkeys(e.variant for e in entries):
        yield from sorted((e for e in entries if e.variant == variant), key=lambda e: (len(e.seed), e.seed))


def status_line(comparison: Comparison) -> str:
    """How many runs finished, which did not, and which lack their result, in words."""
    entries = comparison.entries
    count = sum(e.status == FINISHED for e in entries)
    text = f"{count} of {len(entries)} runs finished."
    for e in entries:
        status = "" if e.status == FINISHED else f"{e.status} ({e.error})" if e.error else e.status
        said = [words for words in (status, e.lack) if words]
        text += f" {e.variant}, seed {e.seed}: {', '.join(said)}." if said else ""
    return text
