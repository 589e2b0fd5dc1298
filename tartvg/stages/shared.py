"""Finished stages that several runs have in common, done once: `<runs_dir>/.shared/` knows where each of them lies.

What makes two stages the same is everything that their numbers depend on: the kind of stage, its settings and inputs
(the manifest's key, which holds content hashes of the base, the data, the adapter and the traces), the settings that
move its rounding, the kind of device among them, this package's code and the versions of the libraries. A run's name,
its tracking and its report are no part of it.

An entry is a pointer with the hash of every file, not a second copy. Taking one copies the files and compares the
hashes on the way, so an entry whose run was removed, moved or edited is worth nothing and does no harm. A lock per
entry makes the second of two jobs that want the same stage wait for the first; the system frees it when a process
dies. Several machines need a file system that carries such locks (NFS 4 does).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from tartvg.config import Config
from tartvg.config.fields import Effect, flattened
from tartvg.records import side_folder, to_json, write_atomic
from tartvg.stages.locks import held

PLACE = ".shared"
OF_THE_RUN = ("manifest.json", "config.yaml", "wandb_id")
"""Files of a stage's folder that say whose it is."""
NOT_RESULTS = ("checkpoints", "wandb", "batches")
"""Folders that a finished stage does not need."""


@lru_cache(maxsize=1)
def code_identity() -> str:
    """Hash of the package's code; the report is left out, as no number depends on it."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith("report/"):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(kind: str, key: str, config: Config, libraries: Mapping[str, str]) -> str:
    """Name of the entry: equal for two stages only if their results are."""
    rounding = {name: to_json(value) for name, value, effect in flattened(config) if effect is Effect.rounding}
    parts = [kind, key, code_identity(), dict(libraries), rounding]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def result_files(folder: Path) -> list[Path]:
    """List the files of a finished stage, relative to its folder, in order; links and hidden files are none of them."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_other = relative.parts[0] in NOT_RESULTS or relative.as_posix() in OF_THE_RUN
        if path.is_file() and not path.is_symlink() and not is_other and not path.name.startswith("."):
            found.append(relative)
    return found


class SharedStage:
    """One entry. Use `take` and `put` inside `with claimed():`."""

    def __init__(self, runs_dir: Path, name: str) -> None:
        self.runs_dir = runs_dir
        self.entry = runs_dir / PLACE / f"{name}.json"

    @contextmanager
    def claimed(self, label: str) -> Iterator[None]:
        """Wait until no other job makes this stage; `label` is what to say meanwhile."""
        self.entry.parent.mkdir(parents=True, exist_ok=True)
        waits_for: set[str] = set()

        def wait(owner: str) -> None:
            if owner not in waits_for:
                print(f"{label}: {owner} makes the same stage; waiting for it", flush=True)
            waits_for.add(owner)
            time.sleep(0.2)

        with held(self.entry.with_suffix(".lock"), wait):
            yield

    def read(self) -> dict[str, Any] | None:
        """`{"folder": ..., "files": {...}}`, or None without a readable entry."""
        try:
            value = json.loads(self.entry.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_entry = isinstance(value, dict) and isinstance(value.get("folder"), str)
        return value if is_entry and isinstance(value.get("files"), dict) else None

    def put(self, folder: Path) -> None:
        """Make the finished stage in `folder` known; a run outside runs_dir cannot be pointed at and is left out."""
        resolved, top = folder.resolve(), self.runs_dir.resolve()
        if not resolved.is_relative_to(top):
            return
        files = {name.as_posix(): _hash(folder / name) for name in result_files(folder)}
        value = {"folder": resolved.relative_to(top).as_posix(), "files": files}
        write_atomic(self.entry, json.dumps(value, indent=1) + "\n")

    def take(self, folder: Path, make_room: Callable[[], None]) -> Path | None:
        """Put a copy in the place of `folder`; returns where it came from. None, and nothing changed, without one.

        The copy is made beside its place and renamed: it is there whole or not at all. `make_room` is called before
        that, and leaves `folder` empty or absent.
        """
        value = self.read()
        if value is None:
            return None
        source = self.runs_dir / value["folder"]
        side = side_folder(folder)
        if not self._copy(source, value["files"], side):
            shutil.rmtree(side, ignore_errors=True)
            self.entry.unlink(missing_ok=True)
            return None
        make_room()
        if folder.exists():
            folder.rmdir()
        side.rename(folder)
        return source

    def _copy(self, source: Path, files: Mapping[str, str], side: Path) -> bool:
        """Copy every file; return whether all are what the entry says."""
        top = self.runs_dir.resolve()
        if not source.resolve().is_relative_to(top) or not source.is_dir():
            return False
        for name, expected in files.items():
            target = side / name
            if not target.resolve().is_relative_to(side.resolve()):
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source / name, target, follow_symlinks=False)
            except OSError:
                return False
            if target.is_symlink() or _hash(target) != expected:
                return False
        return True


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
