"""Which annotated query a record of a prediction file answers. No torch.

A record is taken for the first query that one of its clues leads to and that none of its other clues contradicts:

1. its name: the id of a sample, that id without words in front, or the number in it (`Index.named`);
2. beside a `target`, the number at the end of its name as a row of the annotations, which is what Time-R1 writes
   (`activitynet_17`); never in a training file, where dropped rows leave gaps;
3. its row, where the form counts rows and something else confirms it (lmms-eval, LLaMA-Factory);
4. its video and its query. Where a file asks that question several times, its records answer in the order of the file.

Two files that belong to different splits give numbers too, and nobody notices; hence every clue is compared.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tartvg.data.parsing import shorten
from tartvg.prompts import normalise_query
from tartvg.types import GroundingSample, Span

NAME_KEYS = ("sample_id", "qid", "id")
"""Where a record may say which query it answers."""
TOLERANCE = 0.01
"""Seconds between two forms of the same start."""
_ROW = re.compile(r"(?:(.*)_)?([0-9]{1,9})", re.DOTALL)


@dataclass(frozen=True)
class Clues:
    """What a record says about the query that it answers; None where it says nothing."""

    name: str | None = None
    row: int | None = None
    """Position among the annotated queries, from 0."""
    video: str | None = None
    query: str | None = None
    prompt: str | None = None
    """A text that contains the query, in a record without a name."""
    target: Span | None = None
    """The truth as the record has it, cut at the end of the video or not."""
    duration: float | None = None
    """Of the video, in seconds."""


class Index:
    """The annotated queries by everything that others call them."""

    def __init__(self, samples: Sequence[GroundingSample]) -> None:
        self.samples = samples
        self.by_id = {s.sample_id: s for s in samples}
        self.prefix = _common_prefix(list(self.by_id))
        self._by_video: dict[str, list[GroundingSample]] = defaultdict(list)
        for sample in samples:
            for name in {sample.video.name, sample.video.stem}:
                self._by_video[name].append(sample)
        self._shared: Counter[tuple[GroundingSample, ...]] = Counter()

    def find(self, clues: Clues, where: str) -> GroundingSample:
        """The query that the clues mean. Raises ValueError naming `where` and the first contradiction."""
        complaint = None
        for sample in self._leads(clues, where):
            found = contradiction(sample, clues)
            if found is None:
                return sample
            complaint = complaint or found
        if complaint is None:
            complaint = f"nothing says which query it answers; {', '.join(NAME_KEYS)} would"
            if clues.name:
                complaint = f"{self._unknown(clues.name)}; understood are {self._understood()}"
            elif clues.row is not None:
                complaint = (
                    f"row {clues.row} is none of the {len(self.samples)} annotated queries, or nothing confirms it"
                )
            elif clues.video is not None:
                complaint = f"none of the {len(self.samples)} annotated queries asks this about {shorten(clues.video)}"
        raise ValueError(f"{where}: {complaint}")

    def exact(self, sample_id: str, where: str) -> GroundingSample:
        """The query with this id."""
        if sample_id not in self.by_id:
            raise ValueError(f"{where}: {self._unknown(sample_id)}")
        return self.by_id[sample_id]

    def named(self, name: str, where: str) -> GroundingSample | None:
        """The one query that `name` can mean: by its id, by its id without words in front, or by the number in its id.

        `activitynet_test_v_a_2` is `v_a_2` to others, and `charades_sta_test_17` is `17` or `Charades_17`. The number
        is never a position: rows that were dropped leave a gap, and where ids are no rows it counts something else.
        """
        found = [name] if name in self.by_id else sorted({i for i in self._ids(name) if i in self.by_id})
        if len(found) > 1:
            raise ValueError(f"{where}: {shorten(name)} may be any of {', '.join(found)}")
        return self.by_id[found[0]] if found else None

    def finish(self, path: Path) -> None:
        """Refuse a file that answers only some of the queries that it cannot tell apart."""
        for same, number in self._shared.items():
            if number < len(same) and len({s.windows for s in same}) > 1:
                raise ValueError(
                    f"{path}: {number} of the {len(same)} queries {shorten(same[0].query)} about {same[0].video} are "
                    f"answered, and nothing says which; {', '.join(NAME_KEYS)} would"
                )

    def _leads(self, clues: Clues, where: str) -> Iterator[GroundingSample]:
        if clues.name:
            named = self.named(clues.name, where)
            if named is not None:
                yield named
            number = _ROW.fullmatch(clues.name)
            if clues.target is not None and number is not None:
                yield from self._row(int(number[2]))
        if clues.row is not None and (clues.query, clues.prompt, clues.target) != (None, None, None):
            yield from self._row(clues.row)
        if clues.video is not None and (clues.query is not None or clues.prompt is not None):
            yield from self._asked(clues, where)

    def _row(self, row: int) -> Iterator[GroundingSample]:
        if 0 <= row < len(self.samples) and self.samples[0].split != "train":
            yield self.samples[row]

    def _asked(self, clues: Clues, where: str) -> Iterator[GroundingSample]:
        """The query about this video that is asked or, in a prompt, the longest that is quoted."""
        said = PurePosixPath(clues.video or "")
        about = self._by_video.get(said.name) or self._by_video.get(said.stem) or ()
        fitting = [sample for sample in about if contradiction(sample, clues) is None]
        longest = max((len(s.query) for s in fitting), default=0) if clues.query is None else None
        same = tuple(s for s in fitting if longest is None or len(s.query) == longest)
        if len(same) <= 1:
            yield from same
            return
        number = self._shared[same]
        if number == len(same):
            raise ValueError(f"{where}: {shorten(same[0].query)} is asked {number} times and answered more often")
        self._shared[same] += 1
        yield same[number]

    def _ids(self, name: str) -> Iterator[str]:
        yield from ("_".join((*self.prefix[:length], name)) for length in range(1, len(self.prefix) + 1))
        match = _ROW.fullmatch(name)
        if match is not None and (
            match[1] is None or set(match[1].lower().split("_")) <= {*map(str.lower, self.prefix)}
        ):
            yield "_".join((*self.prefix, str(int(match[2]))))

    def _unknown(self, name: str) -> str:
        return f"{shorten(name)} is not among the {len(self.by_id)} annotated queries"

    def _understood(self) -> str:
        first = shorten(next(iter(self.by_id), ""))
        return f"ids such as {first}, their numbers and, beside a target, the number of the row"


def contradiction(sample: GroundingSample, clues: Clues) -> str | None:
    """What a record says that is not so of this query; None when all agrees."""
    name, video, query, target = sample.sample_id[:60], clues.video, clues.query, clues.target
    if video is not None and not _is_same_file(PurePosixPath(video), sample.video):
        return f"video {shorten(video)}, but {name} is about {sample.video}"
    if query is not None and _plain(query) != _plain(sample.query):
        return f"query {shorten(query)}, but {name} asks {shorten(sample.query)}"
    if clues.prompt is not None and _plain(sample.query).casefold() not in " ".join(clues.prompt.split()).casefold():
        return f"its prompt does not ask {shorten(sample.query)}, as {name} does"
    # Only the start: the end may have been cut at the end of the video, here or there.
    if target is not None and sample.windows and all(abs(target.start - w.start) > TOLERANCE for w in sample.windows):
        return f"its target {list(target)} is not the truth of {name}"
    # Two seconds of a hundred are another video; less is another way to measure it.
    if clues.duration is not None and abs(clues.duration - sample.duration) > max(1.0, 0.02 * sample.duration):
        return f"a video of {clues.duration:g} s, but that of {name} lasts {sample.duration:g} s"
    return None


def _plain(query: str) -> str:
    """A query without the outer full stops that TimeLens takes away."""
    return normalise_query(query).strip(" .")


def _is_same_file(said: PurePosixPath, video: Path) -> bool:
    """Whatever the ending, as collections are re-encoded; folders are compared as far as both sides name them."""
    is_same_name = said.name in (video.name, video.stem) or said.stem == video.stem
    folders = zip(reversed(said.parent.parts), reversed(video.parent.parts), strict=False)
    return is_same_name and all(a == b for a, b in folders)


def _common_prefix(ids: Sequence[str]) -> tuple[str, ...]:
    """The words, separated by `_`, with which all ids begin; the last word of an id is none of them."""
    words = [sample_id.split("_")[:-1] for sample_id in ids]
    if not words:
        return ()
    first, last = min(words), max(words)
    common = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return tuple(first[: next(common, min(len(first), len(last)))])
