"""A validation split carved out of the training videos, for data sets that have none of their own.

By video, because queries about one video share frames and windows; by a hash of the video's name, so that the split is
the same on every machine, for every subset of the file and whatever else is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from tartvg.types import GroundingSample

VALIDATION_SHARE = 0.05
"""Of the training videos: 5 % of Charades-STA are about 270 videos and 620 queries."""


def is_validation_video(name: str, share: float = VALIDATION_SHARE) -> bool:
    """Return whether a training video (its name without the ending) belongs to the carved validation split."""
    number = int.from_bytes(hashlib.sha256(f"tartvg-validation/{name}".encode()).digest()[:8], "big")
    return number < share * 2**64


def carve(samples: Iterable[GroundingSample], split: str) -> list[GroundingSample]:
    """The part of a training file that is `train` or `val`, labelled so; no video is in both."""
    wanted = split == "val"
    return [replace(s, split=split) for s in samples if is_validation_video(s.video.stem) == wanted]
