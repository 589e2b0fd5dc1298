"""What a model said about a query -> Prediction, the record that is scored. No torch."""

from __future__ import annotations

from tartvg.response import parse_response
from tartvg.types import Completion, GroundingSample, Prediction


def prediction(
    sample: GroundingSample, completion: Completion, index: int, seconds: float = 0.0, *, is_direct: bool = False
) -> Prediction:
    """A completion, read, with everything that scoring and reading it needs. `index` 0 is the greedy one.

    `is_direct`: see `parse_response`.
    """
    response = parse_response(completion.text, is_direct=is_direct)
    return Prediction(
        sample_id=sample.sample_id,
        sample_index=index,
        query=sample.query,
        video=sample.video.as_posix(),
        windows=sample.windows,
        duration=sample.duration,
        text=completion.text,
        anchors=response.anchors,
        answer=response.answer,
        faults=tuple(f.value for f in response.faults),
        is_finished=completion.is_finished,
        seconds=round(seconds, 4),
    )
