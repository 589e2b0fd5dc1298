"""What a stage's result depends on: the settings that enter its computation, by name, and the content of its inputs.

Where something lies, how a path is spelled, and how much memory or time a computation takes are no part of it: see
`tartvg.config.fields.Effect`. So the same data in another folder continue the same run.
"""

from __future__ import annotations

import hashlib
import json
import stat
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tartvg.config import Config
from tartvg.config.fields import Effect, flattened
from tartvg.records import to_json
from tartvg.training import distributed
from tartvg.types import GroundingSample

BLOCK = 1 << 16
"""Bytes that are read at the start, in the middle and at the end of a video to tell it from another one."""
READERS = 16
"""Threads that read them: a network file system takes its time for each file."""
INPUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("the videos or their annotations", ("dataset.",)),
    "validation_data": ("the videos of the validation split or their annotations", ("dataset.",)),
    "base": ("the base model", ("policy.path", "policy.revision")),
    "adapter": ("the adapter", ("init_adapter",)),
    "traces": ("the traces that it learns from", ()),
    "rollouts": ("the rollouts that it reads", ()),
    "difficulties": ("the measured difficulties", ("difficulty.file",)),
    "scores": ("the scores that it quotes", ()),
    "predictions": ("the answers that it compares with", ()),
}
"""Parts of a key that are hashes: what each is, and the settings that name it (a group ends in a dot)."""
UNKNOWN = "unknown"
STEPS = ("grpo.max_steps", "grpo.max_steps_grpo2")
FORMER = {
    "prompt": "anchors.prompt", "target": "anchors.count", "cap": "anchors.max_count",
    "threads": "trainer.num_threads", "asked_at_once": "evaluate.batch_size", "at_once": "grpo.sampling_batch_size",
    "group_size": "grpo.group_size", "prompts_per_step": "grpo.prompts_per_step",
    "max_new_tokens": "grpo.sampling.max_new_tokens", "sampling": "grpo.sampling", "rule": "filter",
    "controls": "faithfulness",
}  # fmt: skip
"""How manifests of 0.1 call what has the name of its setting today."""

COARSEST_CLOCK_S = 2.0
"""How long two changes of a file may bear the same time: on FAT."""
_hashes: dict[tuple[tuple[str, int, int], ...], str] = {}
"""What `fingerprint` has found in this process, by path, size and time of change of all files."""


def fingerprint(path: Path) -> str:
    """Hash of a file's content, or of all files below a folder. Empty on ranks other than 0, which compare nothing.

    What is hidden belongs to the tool that made the folder: a download leaves times and locks there. A process hashes
    the same files once: the same by path, size and time of change. A file that has just changed is not remembered, as
    it may change again within one tick of its file system's clock.
    """
    if not distributed.is_rank_zero():
        return ""
    files = [path]
    if path.is_dir():
        visible = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in visible if p.is_file())
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


def settings_of(config: Config, *wanted: str) -> dict[str, Any]:
    """The settings of some groups (`grpo`), and single ones (`seed`), whose value changes a result; by name.

    A map (`dataset.parts`) gives an entry for each of its items, and none where it is empty.
    """
    found: dict[str, Any] = {}
    for name, value, effect in flattened(config):
        if effect is Effect.value and any(name == w or name.startswith(f"{w}.") for w in wanted):
            items = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
            found |= {key: to_json(item) for key, item in items.items()}
    return found


def data_identity(samples: Iterable[GroundingSample]) -> str:
    """What tells these questions and their videos from others, whatever the videos are called and wherever they lie."""
    samples = list(samples)
    videos = list(dict.fromkeys(s.video for s in samples))
    with ThreadPoolExecutor(READERS) as pool:
        known = dict(zip(videos, pool.map(video_identity, videos), strict=True))
    digest = hashlib.sha256()
    for s in samples:
        row = [s.sample_id, s.query, to_json(s.windows), s.duration, s.split, s.tags, known[s.video]]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]


def video_identity(path: Path) -> str | None:
    """Hash of a video's size and of three of its blocks; None for what is no file or cannot be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return None
        return _sampled(path.as_posix(), status.st_size, status.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=1 << 17)
def _sampled(path: str, size: int, changed_ns: int) -> str:
    """`changed_ns` makes a file that was replaced another one."""
    digest = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as file:
        for start in sorted({0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)}):
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], config: Config, folder: Path) -> list[str]:
    """What differs between the inputs in the manifest of `folder` and those of today, a few words for each."""
    old = comparable(old, new, config)
    names = [name for name in {**new, **old} if old.get(name, "unset") != new.get(name, "unset")]
    if not names:
        return []
    before, now = _settings_in(folder), {name: to_json(value) for name, value, _ in flattened(config)}
    found = []
    for name in names:
        if name not in INPUTS:
            found.append(_change(name, old.get(name, "unset"), new.get(name, "unset")))
            continue
        what, owners = INPUTS[name]
        moved = [
            _change(n, before[n], value)
            for n, value in now.items()
            if any(n == o or (o.endswith(".") and n.startswith(o)) for o in owners) and before.get(n, value) != value
        ]
        if old.get(name) == UNKNOWN:
            moved.append("not recorded by the version that began it")
        found.append(f"{what} ({', '.join(moved) or 'other content'})")
    return found


def _change(name: str, old: Any, new: Any) -> str:
    return f"{name} {_word(old)} -> {_word(new)}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _settings_in(folder: Path) -> dict[str, Any]:
    """The settings that a stage was begun with; empty where they cannot be read."""
    try:
        value = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}
    return dict(_flat({str(k): v for k, v in value.items()})) if isinstance(value, dict) else {}


def _flat(value: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{path}{key}.")
        else:
            yield f"{path}{key}", item


def comparable(old: Mapping[str, Any], new: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The inputs of a manifest under the names of today.

    Those of 0.1 hold groups of settings, paths among them, and of a training's data nothing else: there the same
    settings in the same folder stand for the same data.
    """
    if not any(isinstance(value, dict) for value in old.values()):
        return dict(old)
    renamed = ((FORMER.get(name.split(".")[0]), name) for name, _ in _flat(old))
    flat = {
        name if group is None else ".".join([group, *name.split(".")[1:]]): value
        for (group, name), (_, value) in zip(renamed, _flat(old), strict=True)
    }
    if "max_steps" in flat:  # of this stage; beside it stood a constant
        steps = flat.pop("max_steps")
        flat = {n: v for n, v in flat.items() if n not in STEPS} | {n: steps for n in STEPS if n in new}
    # that of an evaluation is a hash, but of other things; drawn data follow from their settings
    is_known = flat.get("data", "drawn") == "drawn" and all(
        _is_same(name, flat[name], value) for name, value, _ in flattened(config) if name in flat and _is_of_data(name)
    )
    flat |= {name: new[name] if is_known else UNKNOWN for name in ("data", "validation_data") if name in new}
    gone = {name for name, _, effect in flattened(config) if effect is not Effect.value or _is_of_data(name)}
    return {name: value for name, value in flat.items() if name in new or name not in gone}


def _is_of_data(name: str) -> bool:
    return name.startswith("dataset.")


def _is_same(name: str, old: Any, now: Any) -> bool:
    """Return whether a setting of the data is what it was; folders may be spelled in another way."""
    if name in ("dataset.root", "dataset.videos") and old is not None and now is not None:
        return Path(old).resolve() == Path(now).resolve()
    return bool(old == to_json(now))
