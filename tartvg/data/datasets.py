"""The one table from a data set's name to its reader and its files; `load_samples` is what stages call.

`dataset.root` holds the annotation files under the names of `SOURCES` (the first alternative that is there is read),
`dataset.videos` the videos, named as each reader documents. A data set that was published without a validation split
has one carved out of the training videos (`tartvg.data.splits`), unless its folder has a validation file. A mix is its
parts one after another, each sample with the part that it comes from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

from tartvg.config import DatasetConfig, DatasetName
from tartvg.data import activitynet, charades_sta, jsonl, qvhighlights, tacos, timelens, tvgbench
from tartvg.data.annotations import SPLITS, Annotations, LateWindows, Quirks, ReadOptions, ReversedWindows
from tartvg.data.splits import carve
from tartvg.launch.processes import is_follower
from tartvg.types import GroundingSample

Reader = Callable[[Sequence[Path], ReadOptions], Annotations]
Files = tuple[tuple[str, ...], ...]
DRAWN = (DatasetName.planted, DatasetName.planted_long)
"""Data sets without files of their own: they are drawn when they are first used."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """How a data set is read. Each split's files are alternatives; one alternative is read together."""

    read: Reader
    train: Files = ()
    val: Files = ()
    test: Files = ()
    is_carved: bool = False
    """No validation split was published: without a file of `val` it is a part of the training videos."""


SOURCES: dict[DatasetName, Source] = {
    DatasetName.charades_sta: Source(
        charades_sta.read,
        train=(("charades_sta_train.txt", "Charades_v1_train.csv"), ("charades_train.json",), ("train.json",)),
        val=(("charades_val.json",), ("val.json",)),
        test=(("charades_sta_test.txt", "Charades_v1_test.csv"), ("charades_test.json",), ("test.json",)),
        is_carved=True,
    ),
    DatasetName.qvhighlights: Source(
        qvhighlights.read,
        train=(("highlight_train_release.jsonl",),),
        val=(("highlight_val_release.jsonl",),),
        test=(("highlight_test_release.jsonl",),),
    ),
    DatasetName.activitynet: Source(
        activitynet.read,
        train=(("train.json",),),
        val=(("val_1.json",), ("val.json",)),
        test=(("val_2.json",), ("test.json",)),
    ),
    DatasetName.tacos: Source(tacos.read, train=(("train.json",),), val=(("val.json",),), test=(("test.json",),)),
    DatasetName.tvgbench: Source(
        tvgbench.read, train=(("train_2k5.json",),), test=(("tvgbench.json",),), is_carved=True
    ),
    DatasetName.charades_timelens: Source(timelens.read_bench, test=(("charades-timelens.json",),)),
    DatasetName.activitynet_timelens: Source(timelens.read_bench, test=(("activitynet-timelens.json",),)),
    DatasetName.qvhighlights_timelens: Source(timelens.read_bench, test=(("qvhighlights-timelens.json",),)),
    DatasetName.timelens_100k: Source(timelens.read, train=(("timelens-100k.jsonl",),), is_carved=True),
    DatasetName.timelens2_93k: Source(timelens.read, train=(("timelens2-93k.jsonl",),), is_carved=True),
    DatasetName.jsonl: Source(
        jsonl.read, train=(("train.jsonl",),), val=(("val.jsonl",),), test=(("test.jsonl",),), is_carved=True
    ),
    # `annotations.jsonl` of a drawn data set, for the stand-alone scorer; stages go through `load_planted`.
    DatasetName.planted: Source(jsonl.read),
    DatasetName.planted_long: Source(jsonl.read),
}


def load_samples(settings: DatasetConfig, split: str) -> list[GroundingSample]:
    """The samples of one split (`train`, `val` or `test`), in the order of the file, at most `settings.num_queries`.

    Raises ValueError naming the file and line of what is wrong, or the files that are missing.
    """
    if settings.sources:
        _refuse_missing(settings, split)
        parts = settings.sources.items()
        return [_from_part(sample, name) for name, part in parts for sample in load_samples(part, split)]
    return list(load_annotations(settings, split).samples)[: settings.num_queries]


def load_annotations(settings: DatasetConfig, split: str) -> Annotations:
    """All samples of one split, and the quirks of the file that they come from (not of the carved part alone)."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if settings.sources:
        return _mixed(settings, split)
    if settings.name in DRAWN:
        from tartvg.data.planted import load_planted  # PyAV comes with it, and the scorer needs none

        return Annotations(tuple(load_planted(Path(settings.root), settings.planted, split, settings.name.value)))
    root = Path(settings.root)
    source = SOURCES[settings.name]
    paths, is_carved = _files(settings, split)
    options = ReadOptions(
        split="train" if is_carved else split,
        videos=Path(settings.videos) if settings.videos else root / "videos",
        late_windows=cast(LateWindows, settings.late_windows),  # both checked by DatasetConfig
        reversed_windows=cast(ReversedWindows, settings.reversed_windows),
    )
    annotations = source.read(paths, options)
    _log_once(logging.INFO, f"{paths[0]}: {annotations.quirks.summary()}")
    if annotations.quirks.dropped:
        _log_once(logging.WARNING, f"{paths[0]}: {annotations.quirks.dropped} training queries dropped")
    return replace(annotations, samples=tuple(carve(annotations.samples, split))) if is_carved else annotations


@lru_cache(maxsize=4096)
def _log_once(level: int, text: str) -> None:
    """Log on rank 0; a stage reads its annotations several times."""
    if not is_follower():
        _LOG.log(level, text)


def _files(settings: DatasetConfig, split: str) -> tuple[tuple[Path, ...], bool]:
    """The files of a split, and whether it is a part of them. Raises ValueError naming what is missing."""
    root, source = Path(settings.root), SOURCES[settings.name]
    is_carved = _is_carved(source, root, split)
    wanted = source.train if is_carved else {"train": source.train, "val": source.val, "test": source.test}[split]
    paths = _present(root, wanted)
    if paths is None:
        raise ValueError(
            f"dataset={settings.name.value} has no {split} split in {root}: "
            + (f"it needs {' or '.join(' + '.join(names) for names in wanted)} there" if wanted else "there is none")
        )
    return paths, is_carved


def _refuse_missing(mix: DatasetConfig, split: str) -> None:
    """Raise ValueError where a part has no such split, before any part is read or drawn."""
    for part in mix.sources.values():
        if part.name not in DRAWN:
            _files(part, split)


def _mixed(mix: DatasetConfig, split: str) -> Annotations:
    """The annotations of all parts, one after another; their quirks added up."""
    _refuse_missing(mix, split)
    found = {name: load_annotations(part, split) for name, part in mix.sources.items()}
    samples = tuple(_from_part(sample, name) for name, part in found.items() for sample in part.samples)
    counts = {f.name: [getattr(part.quirks, f.name) for part in found.values()] for f in fields(Quirks)}
    return Annotations(samples, Quirks(**{k: max(v) if k == "max_overshoot" else sum(v) for k, v in counts.items()}))


def _from_part(sample: GroundingSample, name: str) -> GroundingSample:
    """The sample as one of a mix: two data sets may use the same ids."""
    return replace(sample, sample_id=f"{name}/{sample.sample_id}", source=name)


def read_files(
    name: DatasetName, paths: Sequence[Path], split: str, *, late_windows: LateWindows = "clip"
) -> Annotations:
    """Annotation files given by hand, for the stand-alone scorer: video paths are relative and no video is needed.

    Training files under the names of `SOURCES` are split as `load_annotations` splits them. Under another name a file
    is all of the split that it is said to be.
    """
    if name not in SOURCES:
        raise ValueError(f"dataset={name.value} has no files of its own: name the data set that the files belong to")
    source = SOURCES[name]
    is_training = any({path.name for path in paths} == set(names) for names in source.train)
    is_carved = is_training and _is_carved(source, paths[0].parent, split)
    options = ReadOptions("train" if is_carved else split, late_windows=late_windows)
    annotations = source.read(paths, options)
    return replace(annotations, samples=tuple(carve(annotations.samples, split))) if is_carved else annotations


def _is_carved(source: Source, root: Path, split: str) -> bool:
    """Return whether a split is a part of the training file in `root`."""
    return split != "test" and source.is_carved and _present(root, source.val) is None


def _present(root: Path, alternatives: Files) -> tuple[Path, ...] | None:
    """The first alternative whose files are all in `root`."""
    for names in alternatives:
        paths = tuple(root / name for name in names)
        if all(path.is_file() for path in paths):
            return paths
    return None
