"""Which questions a run has answered: the samples of its own data set, compared with what its records repeat.

The data set of the command that makes the report is not asked: a run knows its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tartvg.config import DatasetConfig, SettingError
from tartvg.data.datasets import load_samples
from tartvg.report.runs import RunFolder, settings_of, typed
from tartvg.types import GroundingSample, Prediction, Span

Samples = dict[str, GroundingSample]
Question = tuple[str, tuple[Span, ...], str]
UNTESTED = "These are shown without frames, and no test by video is made of them."


@dataclass(frozen=True)
class Questions:
    """What there is to compare the answers of some runs with."""

    samples_by_id: Samples
    """Without those that a record, or another run's data set, contradicts."""
    remarks: tuple[str, ...]
    """What does not fit, in sentences."""


def questions_of(runs: Iterable[RunFolder], here: DatasetConfig) -> Questions:
    """The samples that the runs' evaluations asked about, each from the data set and split of its own settings.

    `here` says where the files lie now, for a run whose own folder of the same data set is gone. A data set that cannot
    be read costs frames and tests by video, and is named.
    """
    loaded: dict[str, Samples] = {}
    found: Samples = {}
    refused: set[str] = set()
    remarks: list[str] = []
    odd: dict[str, list[str]] = {}
    for run, target in ((r, target) for r in runs for target in r.predictions):
        data = data_of(run, target, here)
        if str(data) not in loaded:
            loaded[str(data)], remark = _load(data, run)
            remarks += remark
        samples, predictions = loaded[str(data)], run.predictions[target]
        strangers = strangers_of(predictions, samples) if samples else []
        if strangers:
            share = f"{len(strangers)} of {len({p.sample_id for p in predictions})}"
            odd.setdefault(f"{share} recorded questions are not those of {data_label(run, target)}", []).append(
                f"{run.path.name} {target}"
            )
        clashes = [i for i in found.keys() & samples.keys() if not _is_same(found[i], samples[i])]
        remarks += ["Runs asked different questions under the same names. " + UNTESTED] if clashes else []
        refused |= {*strangers, *clashes}
        found |= samples
    remarks += [f"{text} as it is read here, in {_listed(places)}. {UNTESTED}" for text, places in odd.items()]
    kept = {i: sample for i, sample in found.items() if i not in refused}
    return Questions(kept, tuple(dict.fromkeys(remarks)))


def data_of(run: RunFolder, target: str, here: DatasetConfig) -> tuple[DatasetConfig, str] | None:
    """Data set and split of a policy's evaluation; None where its settings cannot be read."""
    settings = settings_of(run, f"evaluate/{target}")
    try:
        data = typed(DatasetConfig, settings.dataset)
    except (OmegaConfBaseException, SettingError, AttributeError):
        return None
    if data.name is here.name and not Path(data.root).is_dir():
        data = replace(data, root=here.root, videos=here.videos, sources=here.sources)
    return data, str(OmegaConf.select(settings, "evaluate.split"))


def data_label(run: RunFolder, target: str) -> str:
    """`planted test`: what a policy was evaluated on, in words."""
    settings = settings_of(run, f"evaluate/{target}")
    name, split = (OmegaConf.select(settings, key) for key in ("dataset.name", "evaluate.split"))
    return f"{name} {split}" if name else "unknown"


def strangers_of(predictions: Sequence[Prediction], samples_by_id: Mapping[str, GroundingSample]) -> list[str]:
    """Ids of answered questions that the samples do not hold, or hold with another query, window or video."""
    asked = {p.sample_id: question_of(p) for p in predictions}
    known = {i: (s.query, s.windows, s.video.name) for i, s in samples_by_id.items()}
    return [i for i, question in asked.items() if question != known.get(i)]


def question_of(prediction: Prediction) -> Question:
    """What a record says that it answers."""
    return prediction.query, prediction.windows, Path(prediction.video).name


def are_alike(first: Sequence[Prediction], second: Sequence[Prediction]) -> bool:
    """Return whether two policies answered the same questions: they share some, and none differs."""
    asked = {p.sample_id: question_of(p) for p in first}
    common = [p for p in second if p.sample_id in asked]
    return bool(common) and all(question_of(p) == asked[p.sample_id] for p in common)


def _load(data: tuple[DatasetConfig, str] | None, run: RunFolder) -> tuple[Samples, list[str]]:
    """The samples, and what to say where there are none."""
    if data is None:
        return {}, [f"{run.path.name}: its settings name no data set that can be read. {UNTESTED}"]
    try:
        samples = {s.sample_id: s for s in load_samples(*data)}
        problem = "it has no samples"
    except (ValueError, OSError) as error:
        samples, problem = {}, str(error)
    if samples:
        return samples, []
    return {}, [f"dataset={data[0].name.value}, {data[1]} cannot be read here ({problem}). {UNTESTED}"]


def _listed(places: Sequence[str], most: int = 4) -> str:
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more


def _is_same(a: GroundingSample, b: GroundingSample) -> bool:
    return (a.query, a.windows, a.video) == (b.query, b.windows, b.video)
