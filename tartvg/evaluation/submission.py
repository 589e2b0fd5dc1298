"""Predictions -> a submission file of QVHighlights, in the format of moment_detr. No torch.

One line per annotated query, `{qid, query, vid, pred_relevant_windows: [[start, end, score], ...]}`, as the evaluation
server wants it: every `qid` exactly once and no empty list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tartvg.data.qvhighlights import ID_PREFIX
from tartvg.evaluation.detection import UNANSWERED, ranked_answers
from tartvg.types import GroundingSample, Prediction


def submission(samples: Sequence[GroundingSample], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """The lines of the file, in the order of the samples, whose ids are those of the QVHighlights reader.

    The windows are those of `ranked_answers`: the file scores what the predictions score.
    """
    ranking = ranked_answers(predictions)
    return [
        {
            "qid": int(sample.sample_id.removeprefix(ID_PREFIX)),
            "query": sample.query,
            "vid": sample.video.stem,
            "pred_relevant_windows": [[*span, score] for span, score in ranking.get(sample.sample_id, UNANSWERED)],
        }
        for sample in samples
    ]
