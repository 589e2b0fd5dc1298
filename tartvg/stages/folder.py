"""A stage's folder: `<runs_dir>/<name>/<stage>/`, done once, continued when interrupted, never overwritten.

The manifest holds a key made of the settings and inputs that the stage's result depends on. The same command again
finds the same key: a finished stage is skipped, an unfinished one continues. Another key means that something changed:
the old folder is moved aside and the stage starts anew; so it does where files of a finished stage are missing or cut.

With `reuse_stages` a stage that another run has finished is copied instead: see `tartvg.stages.shared`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from tartvg.config import Config, SettingError
from tartvg.records import to_json, write_atomic
from tartvg.stages.shared import SharedStage, identity, result_files
from tartvg.training import distributed

MANIFEST = "manifest.json"
PATIENCE_S = 60.0
"""How long a process waits for others that fill the same folder to leave it."""
COARSEST_CLOCK_S = 2.0
"""How long two changes of a file may bear the same time: on FAT."""
_hashes: dict[tuple[tuple[str, int, int], ...], str] = {}
"""What `fingerprint` has found in this process, by path, size and time of change of all files."""
LIBRARIES = ("torch", "transformers", "peft", "pytorch-lightning", "av")


def run_dir(config: Config) -> Path:
    """The folder of the whole run."""
    return Path(config.runs_dir) / config.name


def fingerprint(path: Path) -> str:
    """Hash of a file's content, or of all files below a folder. Empty on ranks other than 0, which compare nothing.

    A process hashes the same files once: the same by path, size and time of change. A file that has just changed is
    not remembered, as it may change again within one tick of its file system's clock.
    """
    if not distributed.is_rank_zero():
        return ""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    states = [(str(file), file.stat()) for file in files]
    key = tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)
    if key in _hashes:
        return _hashes[key]
    is_settled = all(state.st_mtime < time.time() - COARSEST_CLOCK_S for _, state in states)
    value = _hash_of(files)
    if is_settled:
        _hashes[key] = value
    return value


def _hash_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def git_state() -> str:
    """Commit of the code, with `+changes` where the tree differs from it; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if commit.returncode:
        return "unknown"
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none that can be read."""
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class StageFolder:
    """One stage's place. Use `with StageFolder(...).work() as is_needed:`."""

    def __init__(self, folder: Path, config: Config, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.inputs = to_json(dict(key))
        text = json.dumps(self.inputs, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def is_finished(self) -> bool:
        """Whether this very stage, with these settings and inputs, is done, and its files are as long as they were."""
        manifest = read_manifest(self.folder)
        if not manifest or not manifest.get("finished") or manifest.get("key") != self.key:
            return False
        files = manifest.get("files")
        return not isinstance(files, dict) or all(_size(self.folder / name) == size for name, size in files.items())

    def claim(self) -> bool:
        """For one of several processes that fill the folder together: prepare it, and say whether there is work.

        Does not finish the stage; `work` does. The processes may start at the same moment: each waits for its turn.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(PATIENCE_S):
            if self.is_finished:
                return False
            self._enter()
            return True

    @contextmanager
    def work(self, patience_s: float = 0.0) -> Iterator[bool]:
        """Yields False when there is nothing to do; else the block does the stage, and leaving it marks it finished.

        Of several processes that train together the leader decides and writes, and all leave together. Raises
        SettingError when another process is in the folder and stays for `patience_s` seconds.
        """
        if not distributed.is_rank_zero():
            yield bool(distributed.receive())
            distributed.receive()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with distributed.failing_together():
                stack.enter_context(self._lock(patience_s))
                shared = stack.enter_context(self._claimed())
                is_needed = not self._is_there(shared)
                before = self._enter() if is_needed else 0.0
            distributed.broadcast(is_needed)
            if not is_needed:
                yield False
                distributed.broadcast(0)
                return
            start = time.monotonic()
            try:
                yield True
            except BaseException:
                with suppress(OSError):  # of a full disk, say: what happened first is what is told
                    self._write(finished=False, seconds=before + time.monotonic() - start)
                raise
            with distributed.failing_together():
                self._write(finished=True, seconds=before + time.monotonic() - start)
                if shared is not None:
                    shared.put(self.folder)
            distributed.broadcast(0)

    @contextmanager
    def _claimed(self) -> Iterator[SharedStage | None]:
        """The entry of this stage among those that runs share, while no other job makes it; None if none is wanted."""
        if self.is_finished or not self.config.reuse_stages:
            yield None
            return
        name = identity(self.folder.name, self.key, self.config, _versions())
        shared = SharedStage(Path(self.config.runs_dir), name)
        with shared.claimed(str(self.folder)):
            yield shared

    def _is_there(self, shared: SharedStage | None) -> bool:
        if self.is_finished:
            print(f"{self.folder}: finished before, nothing changed")
            return True
        source = shared.take(self.folder, self._make_room) if shared is not None else None
        if shared is None or source is None:
            return False
        name = source.relative_to(shared.runs_dir).as_posix()
        seconds = (read_manifest(source) or {}).get("seconds", 0.0)
        OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
        self._write(finished=True, seconds=float(seconds), source=name)
        print(f"{self.folder}: the same stage is finished in {name}; copied")
        return True

    def _make_room(self) -> None:
        if any(self.folder.iterdir()):
            self._move_aside("another run has finished this stage")

    @contextmanager
    def _lock(self, patience_s: float) -> Iterator[None]:
        deadline = time.monotonic() + patience_s
        with (self.folder.parent / f".{self.folder.name}.lock").open("w") as file:
            while not _is_locked(file):
                if time.monotonic() > deadline:
                    raise SettingError(f"name={self.folder.parent.name}: another process is working in {self.folder}")
                time.sleep(0.2)
            yield

    def _enter(self) -> float:
        manifest = read_manifest(self.folder)
        if manifest is None and any(self.folder.iterdir()):
            self._move_aside("its manifest is missing or damaged")
        elif manifest is not None and manifest.get("key") != self.key:
            self._move_aside("its settings or inputs changed")
            manifest = None
        elif manifest is not None and manifest.get("finished"):
            self._move_aside("files of it are missing or damaged")
            manifest = None
        if manifest is None:
            self._write(finished=False, seconds=0.0)
            OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
            return 0.0
        print(f"{self.folder}: continuing")
        return float(manifest.get("seconds", 0.0))

    def _move_aside(self, reason: str) -> None:
        number = 1
        while (old := self.folder.with_name(f"{self.folder.name}.old{number}")).exists():
            number += 1
        self.folder.rename(old)
        self.folder.mkdir()
        print(f"{self.folder}: {reason}; the old results are in {old.name}")

    def _write(self, *, finished: bool, seconds: float, source: str | None = None) -> None:
        manifest = {
            "stage": self.folder.name,
            "finished": finished,
            "seconds": round(seconds, 3),
            "key": self.key,
            "inputs": self.inputs,
            "command": " ".join(["python", *(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv))]),
            "git": git_state(),
            "python": platform.python_version(),
            "libraries": _versions(),
        }
        if finished:
            manifest["files"] = {n.as_posix(): (self.folder / n).stat().st_size for n in result_files(self.folder)}
        if source is not None:
            manifest["copied_from"] = source  # its seconds were spent there, once
        write_atomic(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_locked(file: IO[str]) -> bool:
    """Take the lock of one process per stage folder; the system frees it when the process dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
