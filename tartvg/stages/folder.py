"""A stage's folder: `<runs_dir>/<name>/<stage>/`, done once, continued when interrupted, never overwritten.

The manifest holds a key made of the settings and inputs that the stage's result depends on. The same command again
finds the same key: a finished stage is skipped, an unfinished one continues. Another key means that something changed:
the old folder is moved aside and the stage starts anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tartvg.config import Config, SettingError
from tartvg.records import to_json, write_atomic

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "transformers", "peft", "pytorch-lightning", "av")


def run_dir(config: Config) -> Path:
    """The folder of the whole run."""
    return Path(config.runs_dir) / config.name


def fingerprint(path: Path) -> str:
    """Hash of a file's content, or of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
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
        """Whether this very stage, with these settings and inputs, is done."""
        manifest = read_manifest(self.folder)
        return bool(manifest and manifest.get("finished") and manifest.get("key") == self.key)

    @contextmanager
    def work(self) -> Iterator[bool]:
        """Yields False when there is nothing to do; else the block does the stage, and leaving it marks it finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self.folder.parent / f".{self.folder.name}.lock", self.folder):
            if self.is_finished:
                print(f"{self.folder}: finished before, nothing changed")
                yield False
                return
            before = self._enter()
            start = time.monotonic()
            try:
                yield True
            except BaseException:
                self._write(finished=False, seconds=before + time.monotonic() - start)
                raise
            self._write(finished=True, seconds=before + time.monotonic() - start)

    def _enter(self) -> float:
        manifest = read_manifest(self.folder)
        if manifest is not None and manifest.get("key") != self.key:
            self._move_aside()
            manifest = None
        if manifest is None:
            self._write(finished=False, seconds=0.0)
            OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
            return 0.0
        print(f"{self.folder}: continuing")
        return float(manifest.get("seconds", 0.0))

    def _move_aside(self) -> None:
        number = 1
        while (old := self.folder.with_name(f"{self.folder.name}.old{number}")).exists():
            number += 1
        self.folder.rename(old)
        self.folder.mkdir()
        print(f"{self.folder}: its settings or inputs changed; the old results are in {old.name}")

    def _write(self, *, finished: bool, seconds: float) -> None:
        manifest = {
            "stage": self.folder.name,
            "finished": finished,
            "seconds": round(seconds, 3),
            "key": self.key,
            "inputs": self.inputs,
            "command": " ".join(["python", *(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv))]),
            "git": git_state(),
            "python": platform.python_version(),
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        write_atomic(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


@contextmanager
def _lock(path: Path, folder: Path) -> Iterator[None]:
    """One process per stage folder; the system frees the lock when a process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingError(f"name={folder.parent.name}: another process is working in {folder}") from error
        yield
