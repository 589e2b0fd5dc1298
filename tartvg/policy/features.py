"""Vision features, once per video: with a frozen tower they are a function of the file and the settings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from tartvg.config import FramesConfig
from tartvg.policy.patches import MERGE


@dataclass(frozen=True)
class VideoFeatures:
    """What the language model needs of one video."""

    embeddings: Tensor
    """(video tokens, hidden size), in the tower's own order; without rows where `patches` is set."""
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float
    duration: float
    """Seconds, measured on the file."""
    patches: Tensor | None = None
    """float32 (N, width), only for a trainable tower: every pass encodes them anew, as the weights have moved."""
    deepstack: tuple[Tensor, ...] = ()
    """Further features of the same shape, see `tartvg.policy.deepstack`; empty for a family without."""
    stamps: tuple[float, ...] = ()
    """Seconds of each temporal step: the mean of its first and its last frame's."""

    @property
    def num_tokens(self) -> int:
        """Video tokens in the prompt."""
        return self.grid_thw[0] * self.grid_thw[1] * self.grid_thw[2] // MERGE**2

    @property
    def size(self) -> int:
        """Bytes of all features."""
        return sum(x.numel() * x.element_size() for x in (self.embeddings, *self.deepstack))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> VideoFeatures:
        """Replace every tensor of features by a function of it."""
        return replace(self, embeddings=function(self.embeddings), deepstack=tuple(map(function, self.deepstack)))


def video_key(path: Path, settings: FramesConfig, device: str) -> Hashable:
    """Identity of a file (path, size, time of change) and of every setting that changes its features.

    The device is one of them: kernels round differently.
    """
    stat = path.stat()
    frames = tuple((name, value) for name, value in asdict(settings).items() if name != "timeout_s")
    return (str(path.resolve()), stat.st_size, stat.st_mtime_ns, frames, device)


class FeatureCache:
    """Least-recently-used features in main memory, whatever device they were made on; bounded in bytes."""

    def __init__(self, limit_gib: float) -> None:
        self.limit = int(limit_gib * 2**30)
        self.size = 0
        self.entries: OrderedDict[Hashable, VideoFeatures] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.entries

    def get(self, key: Hashable) -> VideoFeatures | None:
        """Return the entry, now the most recently used one."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: Hashable, features: VideoFeatures) -> None:
        """Add an entry and drop the oldest ones that no longer fit; one that never fits is not kept."""
        if features.size > self.limit or key in self.entries:
            return
        self.entries[key] = features.mapped(Tensor.cpu)
        self.size += features.size
        while self.size > self.limit:
            _, oldest = self.entries.popitem(last=False)
            self.size -= oldest.size
