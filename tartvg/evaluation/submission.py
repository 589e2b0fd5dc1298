"""Predictions -> a submission file of QVHighlights, in the format of moment_detr. No torch.

One line per annotated query, `{qid, query, vid, pred_relevant_windows: [[start, end, score], ...]}`, as the evaluation
server wants it: every `qid` exactly once and no empty list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tartvg.data.qvhighlights import ID_PREFIX
from tartvg.types import GroundingSample, Prediction, Span

MAX_WINDOWS = 10
"""More are ignored by the official mAP."""
NO_ANSWER = [0.0, 0.0, 0.0]
"""Stands for a query without a readable answer: a window without length overlaps with nothing."""


def submission(samples: Sequence[GroundingSample], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """The lines of the file, in the order of the samples, whose ids are those of the QVHighlights reader.

    The greedy answer comes first with score 1, because the official R1 takes the first of the list. The sampled answers
    follow, scored by the share of the samples that gave them, below 1.
    """
    greedy: dict[str, Span] = {}
    sampled: dict[str, Counter[Span]] = {s.sample_id: Counter() for s in samples}
    for p in predictions:
        if p.answer is None:
            continue
        if p.sample_index == 0:
            greedy[p.sample_id] = p.answer
        else:
            sampled[p.sample_id][p.answer] += 1
    rows = []
    for sample in samples:
        first, others = greedy.get(sample.sample_id), sampled[sample.sample_id]
        total = others.total() + 1
        windows = [] if first is None else [[*first, 1.0]]
        windows += [[*span, round(count / total, 4)] for span, count in others.most_common() if span != first]
        rows.append(
            {
                "qid": int(sample.sample_id.removeprefix(ID_PREFIX)),
                "query": sample.query,
                "vid": sample.video.stem,
                "pred_relevant_windows": windows[:MAX_WINDOWS] or [NO_ANSWER],
            }
        )
    return rows
