"""What the tiny base is taught with: answers whose taught part is the only one that counts."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from experiments.tiny_base.lessons import LATE_SHARES, SHARES, Answer, exact, habit, habitual, late_habitual, repetition
from experiments.tiny_base.sight import answer_tokens
from tartvg.policy.loading import embedded_path
from tartvg.response import parse_response
from tartvg.types import Span


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_path())


def test_the_last_anchor_tells_the_answer_of_a_repetition(tokenizer):
    for seed in range(50):
        _, answer = repetition(np.random.default_rng(seed))
        response = parse_response(answer.given + answer.taught)
        assert not response.faults
        assert response.anchors[-1] == response.answer
        ids, labels = answer_tokens(tokenizer, answer)
        taught = [i for i, label in zip(ids, labels, strict=True) if label != -100]
        assert tokenizer.decode(taught) == answer.taught + "<|im_end|>"
        assert tokenizer.decode(ids) == answer.given + answer.taught + "<|im_end|>"


def test_a_border_inside_a_token_is_noticed(tokenizer):
    with pytest.raises(AssertionError, match="inside a token"):
        answer_tokens(tokenizer, Answer("<think>It is around <time", "stamp>1.00 to 2.00</timestamp>"))


def test_all_of_an_ordinary_answer_is_taught(tokenizer):
    for answer_of in (exact, habitual, late_habitual):
        ids, labels = answer_tokens(tokenizer, answer_of(Span(3.5, 6.0), 12.0, np.random.default_rng(0)))
        assert ids == labels


@pytest.mark.parametrize("shares", [SHARES, LATE_SHARES])
def test_habits_come_in_their_shares(shares):
    """Two or more anchors without a fault: `valid`, `three`, and contradictions that clipping undoes."""
    assert sum(shares) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    responses = [parse_response(habit(Span(7.0, 9.5), 20.0, rng, shares)) for _ in range(4000)]
    valid = np.mean([not r.faults and len(r.anchors) >= 2 for r in responses])
    assert valid == pytest.approx(shares[0] + shares[5], abs=0.02)
    unclosed = np.mean([any("unclosed" in f.value for f in r.faults) for r in responses])
    assert unclosed == pytest.approx(shares[3], abs=0.02)
