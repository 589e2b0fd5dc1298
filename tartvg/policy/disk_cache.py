"""Vision features on disk, shared by runs, ranks and restarts: one safetensors file per video and setting.

Nothing here locks. An entry is written beside its place and renamed, so a reader finds it whole or not at all; two
writers of one entry write the same thing; whatever cannot be read is encoded again. An entry carries its whole key and
a checksum: neither a damaged file nor one that was renamed is ever believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tartvg.config import PolicyConfig
from tartvg.policy.features import VideoFeatures

FORMAT = 2
"""Part of every key; raise it when frames, patches or the meaning of an entry change."""
SUFFIX = ".safetensors"
_ABANDONED_S = 3600.0
"""A half-written file of this age belongs to a process that is gone."""
_SCANS_PER_LIMIT = 64
"""The folder is measured again each time this process has written that fraction of the limit."""


class DiskCache:
    """Least-recently-used features in a folder, bounded in bytes.

    `tower` names the weights that made the features (`tower_identity`). With several processes the folder can exceed
    its limit by 1/64 per process until one of them measures it again.
    """

    def __init__(self, folder: Path, limit_gib: float, tower: str) -> None:
        self.folder = folder
        self.limit = int(limit_gib * 2**30)
        self.tower = tower
        self._unmeasured = self.limit  # the first entry measures what is there
        self._has_failed = False

    def __contains__(self, key: Hashable) -> bool:
        return self.path_of(key).is_file()

    def get(self, key: Hashable) -> VideoFeatures | None:
        """Return the entry, now the most recently used one; None where there is none that can be trusted."""
        path = self.path_of(key)
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            print(f"{path}: {error}; encoding the video again")
            return None
        try:
            features = _unpack(content, self._text(key))
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            print(f"{path}: a damaged entry of the feature cache ({error}); encoding the video again")
            with suppress(OSError):  # the folder may be read-only
                path.unlink()
            return None
        with suppress(OSError):  # another process may have dropped it meanwhile
            os.utime(path)
        return features

    def put(self, key: Hashable, features: VideoFeatures) -> None:
        """Write an entry and drop the oldest ones that no longer fit. A folder that cannot be written costs nothing."""
        content = _pack(self._text(key), features)
        if len(content) > self.limit:
            return
        path = self.path_of(key)
        side = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            side.write_bytes(content)
            side.replace(path)
            self._unmeasured += len(content)
            if self._unmeasured * _SCANS_PER_LIMIT >= self.limit:
                self._evict(newest=path)
        except OSError as error:
            with suppress(OSError):
                side.unlink()
            if not self._has_failed:
                print(f"policy.feature_cache_dir={self.folder}: {error}; going on without writing there")
            self._has_failed = True

    def path_of(self, key: Hashable) -> Path:
        """Return the file of `key`: its name is a hash, so nothing of a video's name reaches the file system."""
        return self.folder / (hashlib.sha256(self._text(key).encode()).hexdigest()[:32] + SUFFIX)

    def _text(self, key: Hashable) -> str:
        return json.dumps([FORMAT, self.tower, key])

    def _evict(self, newest: Path) -> None:
        entries = []
        for item in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process evicts too
                stat = item.stat()
                if item.name.endswith(SUFFIX):
                    entries.append((stat.st_mtime_ns, stat.st_size, Path(item.path)))
                elif item.name.startswith(".") and time.time() - stat.st_mtime > _ABANDONED_S:
                    Path(item.path).unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size
        self._unmeasured = 0


def tower_identity(tower: torch.nn.Module, *settings: object) -> str:
    """Hash of a vision tower's weights, its configuration, and of whatever else decides how it computes."""
    config: Any = tower.config
    digest = hashlib.sha256(json.dumps([config.to_dict(), *map(str, settings)], sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """View the content as a buffer; numpy has no bf16."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _facts(features: VideoFeatures) -> str:
    return json.dumps([features.grid_thw, features.seconds_per_grid, features.duration, features.stamps])


def _checksum(text: str, facts: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{text}\n{facts}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _pack(text: str, features: VideoFeatures) -> bytes:
    tensors = {"embeddings": features.embeddings}
    tensors |= {f"deepstack.{level:02}": tensor for level, tensor in enumerate(features.deepstack)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = _facts(features)
    return safetensors.torch.save(tensors, {"key": text, "facts": facts, "sha256": _checksum(text, facts, tensors)})


def _unpack(content: bytes, text: str) -> VideoFeatures:
    tensors = safetensors.torch.load(content)  # checks the header and all offsets
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    if metadata["key"] != text:
        raise ValueError("it belongs to another video or setting")
    if metadata["sha256"] != _checksum(text, metadata["facts"], tensors):
        raise ValueError("its checksum is wrong")
    grid_thw, seconds_per_grid, duration, stamps = json.loads(metadata["facts"])
    deepstack = tuple(tensor for name, tensor in sorted(tensors.items()) if name != "embeddings")
    return VideoFeatures(
        tensors["embeddings"], tuple(grid_thw), seconds_per_grid, duration, deepstack=deepstack, stamps=tuple(stamps)
    )


def disk_cache(settings: PolicyConfig, tower: torch.nn.Module) -> DiskCache | None:
    """Open the cache in `policy.feature_cache_dir`; None where none is set."""
    if settings.feature_cache_dir is None:
        return None
    identity = tower_identity(tower, settings.attention)
    return DiskCache(Path(settings.feature_cache_dir), settings.feature_cache_dir_gib, identity)
