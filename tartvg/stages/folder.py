"""A stage's folder: `<runs_dir>/<name>/<stage>/`, done once, continued when interrupted, never overwritten.

The manifest holds a key made of the settings and inputs that the stage's result depends on (`tartvg.stages.keys`). The
same command again finds the same key: a finished stage is skipped, an unfinished one continues. Another key means that
something changed: a training stage is refused then unless `overwrite` is set, as it may have taken days; otherwise the
old folder is moved aside and the stage starts anew. So it does where files of a finished stage are missing or cut.

With `reuse_stages` a stage that another run has finished is copied instead: see `tartvg.stages.shared`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tartvg.config import Config, SettingError
from tartvg.records import to_json, write_atomic
from tartvg.stages.keys import differences
from tartvg.stages.locks import held
from tartvg.stages.shared import SharedStage, identity, result_files
from tartvg.training import distributed

MANIFEST = "manifest.json"
PATIENCE_S = 60.0
"""How long a process waits for others that fill the same folder to leave it."""
LIBRARIES = ("torch", "transformers", "peft", "pytorch-lightning", "av")


def run_dir(config: Config) -> Path:
    """Return the folder of the whole run."""
    return Path(config.runs_dir) / config.name


def git_state() -> str:
    """Commit of the code, with `+changes` where the tree differs from it; `unknown` outside a checkout.

    A package that lies in the checkout of something else, as in a .venv there, is none of its files.
    """
    root = Path(__file__).resolve().parent
    is_ours = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        if subprocess.run(is_ours, cwd=root, capture_output=True, timeout=10).returncode:
            return "unknown"
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
    """Read the manifest; None where there is none that can be read."""
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class StageFolder:
    """One stage's place. Use `with StageFolder(...).work() as is_needed:`."""

    def __init__(
        self, folder: Path, config: Config, key: Callable[[], Mapping[str, Any]], *, is_training: bool = False
    ) -> None:
        """`key` reads what the result depends on: on rank 0 only, and once. A changed `is_training` stage is refused.

        Making a key may take minutes: it reads the base and parts of every video.
        """
        self.folder = folder
        self.config = config
        self.is_training = is_training
        self._make_key = key

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the stage's result depends on, as JSON values."""
        value: dict[str, Any] = json.loads(json.dumps(to_json(dict(self._make_key()))))
        return value

    @property
    def key(self) -> str:
        """Hash of the inputs."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:16]

    def changes(self, manifest: Mapping[str, Any]) -> list[str]:
        """Say what differs between a manifest's inputs and these; empty for the very same stage."""
        inputs = manifest.get("inputs")
        if not isinstance(inputs, dict):
            return [] if manifest.get("key") == self.key else ["its inputs are not recorded"]
        return differences(inputs, self.inputs, self.config, self.folder)

    @property
    def is_finished(self) -> bool:
        """Whether this very stage, with these settings and inputs, is done, and its files are as long as they were."""
        manifest = read_manifest(self.folder)
        if not manifest or not manifest.get("finished") or self.changes(manifest):
            return False
        files = manifest.get("files")
        return not isinstance(files, dict) or all(_size(self.folder / name) == size for name, size in files.items())

    def claim(self) -> bool:
        """Prepare the folder for one of several processes that fill it together, and say whether there is work.

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

        Of several ranks, rank 0 decides and writes, and all leave together. Raises SettingError when another process is
        in the folder and stays for `patience_s` seconds.
        """
        if not distributed.is_rank_zero():
            yield bool(distributed.receive())
            distributed.receive()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with distributed.failing_together():
                stack.enter_context(self._lock(patience_s))
                self._refuse_changed()
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
        """Lock this stage's entry among those that runs share, while no other job makes it; None if none is wanted."""
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

        def wait(owner: str) -> None:
            if time.monotonic() > deadline:
                raise SettingError(f"name={self.folder.parent.name}: {owner} is working in {self.folder}")
            time.sleep(0.2)

        with held(self.folder.parent / f".{self.folder.name}.lock", wait):
            yield

    def _refuse_changed(self) -> None:
        """Raise SettingError for a training stage that was begun with other settings or inputs."""
        manifest = read_manifest(self.folder)
        found = self.changes(manifest) if manifest and self.is_training and not self.config.overwrite else []
        if found:
            raise SettingError(
                f"{self.folder} was begun with other settings or inputs: {', '.join(found)}. Give another name=..., or "
                "overwrite=true to start it anew beside the old results"
            )

    def _enter(self) -> float:
        manifest = read_manifest(self.folder)
        changes = [] if manifest is None else self.changes(manifest)
        if manifest is None and any(self.folder.iterdir()):
            self._move_aside("its manifest is missing or damaged")
        elif changes:
            self._move_aside(f"its settings or inputs changed: {', '.join(changes)}")
            manifest = None
        elif manifest is not None and manifest.get("finished"):
            self._move_aside("files of it are missing or damaged")
            manifest = None
        seconds = 0.0 if manifest is None else float(manifest.get("seconds", 0.0))
        if manifest is not None:
            print(f"{self.folder}: continuing")
        self._write(finished=False, seconds=seconds)
        OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
        return seconds

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
