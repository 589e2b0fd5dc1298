"""Every scheme by numbers worked out by hand, for a group of four with 0, 1, 2 and 3 anchors; and what must hold."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tartvg.config import AdvantageScale, Credit, Normalise
from tartvg.grpo import SCHEMES, Comparison, Earned, group_advantages, per_token

WEIGHTS = {"format": 3.0, "iou": 1.0, "tar1": 1.0, "tar2": -5.0, "tar3": 1.0}
CENTRED = Comparison(WEIGHTS, Normalise.total, AdvantageScale.none)
SCALED = Comparison(WEIGHTS, Normalise.total, AdvantageScale.sample_std)


def earned(ious: list[list[float]], formats: list[float], answers: list[float]) -> Earned:
    """A group by the paper's reward with K = 2: r_1 = s_1, r_k = k s_k + delta_k."""
    most = max(map(len, ious))

    def padded(rows: list[list[float]]) -> Tensor:
        return torch.tensor([[*row, *[0.0] * (most - len(row))] for row in rows]).reshape(len(rows), most)

    zeros = torch.zeros(len(ious))
    terms = {"format": torch.tensor(formats), "iou": torch.tensor(answers), "tar1": zeros,
             "tar2": torch.tensor([abs(len(row) - 2.0) for row in ious]), "tar3": zeros}  # fmt: skip
    shares = {
        "tar1": padded([[(k + 1) * s for k, s in enumerate(row)] for row in ious]),
        "tar3": padded([[0.0, *(1.0 if b > a else -1.0 for a, b in pairwise(row))][: len(row)] for row in ious]),
    }  # fmt: skip
    found = Earned(zeros, terms, shares, padded(ious), torch.tensor([len(row) for row in ious]))
    return replace(found, totals_G=sum((WEIGHTS[n] * v for n, v in found.since(0).items()), zeros))


IOUS = [[], [0.5], [0.2, 0.6], [0.4, 0.3, 0.9]]
GROUP = earned(IOUS, [0.0, 1.0, 1.0, 1.0], [0.4, 0.5, 0.6, 0.9])
# R = -9.6, -1, 6, 2.6, of which the anchors earned 0, .5, .2 + 2.2 and .4 + (.6 - 1) + (2.7 + 1); o is the rest.
OUTCOMES = torch.tensor([-7.45, 0.65, 5.75, 1.05])  # -9.6, -1.5, 3.6, -1.1, minus their mean
NOBODY = 0.0
BY_HAND = {
    Credit.outcome: [[-9.1], [-0.5], [6.5], [3.1]],
    # -1, 6, 2.6 from the first anchor on; 5.8, 2.2 from the second; o at the end
    Credit.return_to_go: [
        [NOBODY, NOBODY, NOBODY, -7.45],
        [-3.53333, NOBODY, NOBODY, 0.65],
        [3.46667, 1.8, NOBODY, 5.75],
        [0.06667, -1.8, 0.0, 1.05],
    ],
    # o, and .5, .2, .4 for the first anchor; 2.2, -.4 for the second
    Credit.own_term: [
        [-7.45, -7.45, -7.45, -7.45],
        [0.65 + 0.13333, 0.65, 0.65, 0.65],
        [5.75 - 0.16667, 5.75 + 1.3, 5.75, 5.75],
        [1.05 + 0.03333, 1.05 - 1.3, 1.05, 1.05],
    ],
    # -10, -2, 3, -2 for format and count; the anchors as before; the answer .4, .5, .6, .9
    Credit.own_part: [
        [-7.25, -7.25, -7.25, -7.25 - 0.2],
        [0.75 + 0.13333, 0.75, 0.75, 0.75 - 0.1],
        [5.75 - 0.16667, 5.75 + 1.3, 5.75, 5.75],
        [0.75 + 0.03333, 0.75 - 1.3, 0.75, 0.75 + 0.3],
    ],
    # as own_term with 1.2, .6 for the second
    Credit.turn: [
        [-7.45, -7.45, -7.45, -7.45],
        [0.65 + 0.13333, 0.65, 0.65, 0.65],
        [5.75 - 0.16667, 5.75 + 0.3, 5.75, 5.75],
        [1.05 + 0.03333, 1.05 - 0.3, 1.05, 1.05],
    ],
    # as own_part, but the last anchor .5, .6, .9 for the first, and minus that .4, .5 for the second
    Credit.potential: [
        [-7.25, -7.25, -7.25, -7.25 - 0.2],
        [0.75 - 0.16667, 0.75, 0.75, 0.75 - 0.1],
        [5.75 - 0.06667, 5.75 - 0.05, 5.75, 5.75],
        [0.75 + 0.23333, 0.75 + 0.05, 0.75, 0.75 + 0.3],
    ],
}


@pytest.mark.parametrize("credit", Credit)
def test_four_completions_by_hand(credit: Credit):
    assert torch.allclose(SCHEMES[credit](GROUP, CENTRED), torch.tensor(BY_HAND[credit]), atol=2e-5)


def test_the_table_has_every_scheme():
    assert list(SCHEMES) == list(Credit)


@pytest.mark.parametrize("scale", AdvantageScale)
def test_outcome_is_the_advantage_of_the_totals_bit_for_bit(scale: AdvantageScale):
    found = SCHEMES[Credit.outcome](GROUP, replace(CENTRED, scale=scale))
    assert torch.equal(found, group_advantages(GROUP.totals_G, scale)[:, None])


def test_a_segment_is_scaled_by_those_that_have_it():
    # .5, .2, .4: mean .36667, sample std .15275
    own = SCHEMES[Credit.own_term](GROUP, SCALED) - group_advantages(torch.tensor([-9.6, -1.5, 3.6, -1.1]),
                                                                     AdvantageScale.sample_std)[:, None]  # fmt: skip
    assert own[:, 0].tolist() == pytest.approx([0.0, 0.8729, -1.0911, 0.2182], abs=2e-3)
    assert own[:, 1].tolist() == pytest.approx([0.0, 0.0, 0.7071, -0.7071], abs=2e-3)
    assert own[:, 2:].abs().max() < 1e-6, "one alone has nobody to compare with; the rest has the outcome only"


def test_terms_are_normalised_before_their_weight_and_the_sum_after():
    compare = Comparison({"a": 3.0, "b": 1.0}, Normalise.terms, AdvantageScale.sample_std)
    # a becomes -.577, -.577, 1.155 and b -1, 1, 0; weighted -2.732, -.732, 3.464 with std sqrt(10)
    found = compare({"a": torch.tensor([0.0, 0.0, 1.0]), "b": torch.tensor([0.1, 0.9, 0.5])})
    assert found.tolist() == pytest.approx([-0.8640, -0.2315, 1.0954], abs=2e-3)
    assert compare({"a": torch.ones(3), "b": torch.zeros(3)}).tolist() == [0.0, 0.0, 0.0]


def test_a_term_with_a_small_range_is_heard_only_by_itself():
    """The answer's IoU differs by a hundredth of what the format does."""
    terms = {"format": torch.tensor([0.0, 1.0, 0.0, 1.0]), "iou": torch.tensor([0.50, 0.50, 0.51, 0.51])}
    summed, apart = (replace(SCALED, normalise=n)(terms) for n in (Normalise.total, Normalise.terms))
    assert float(summed[3] - summed[1]) < 0.01 < 0.3 < float(apart[3] - apart[1])


@pytest.mark.parametrize("normalise", Normalise)
@pytest.mark.parametrize("credit", Credit)
def test_a_group_of_copies_teaches_nothing(credit: Credit, normalise: Normalise):
    same = earned([[0.1, 0.7]] * 4, [1.0] * 4, [0.7] * 4)
    assert not SCHEMES[credit](same, replace(SCALED, normalise=normalise)).any()


@pytest.mark.parametrize("credit", Credit)
def test_without_any_anchor_there_is_one_segment(credit: Credit):
    found = SCHEMES[credit](earned([[], [], []], [0.0, 0.0, 1.0], [0.1, 0.2, 0.3]), SCALED)
    assert found.shape == (3, 1) and torch.isfinite(found).all() and found[2] > 0 > found[0]


def test_the_first_anchor_alone_moves_nothing_of_its_own_segment_with_potential():
    """It does with the published credit: a poor first anchor turns -1 into +1."""
    before, after = (earned([[first, 0.8], [0.4, 0.5], [0.3, 0.7]], [1.0] * 3, [0.8, 0.5, 0.7]) for first in (0.9, 0.2))
    old, new = (SCHEMES[Credit.potential](e, SCALED) for e in (before, after))
    assert torch.equal(old[:, 0], new[:, 0]) and torch.equal(old[:, -1], new[:, -1])
    assert new[0, 1] > old[0, 1], "what follows it is paid for the repair"
    old, new = (SCHEMES[Credit.outcome](e, SCALED) for e in (before, after))
    assert new[0] > old[0]
    old, new = (SCHEMES[Credit.own_term](e, SCALED) for e in (before, after))
    assert new[0, 0] < old[0, 0], "here it is paid for itself"


GROUPS = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.floats(-1, 1, width=16), max_size=3), min_size=n, max_size=n),
        st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n),
        st.lists(st.floats(-1, 1, width=16), min_size=n, max_size=n),
    )
)


@given(GROUPS, st.sampled_from(Normalise), st.sampled_from(AdvantageScale))
def test_every_segment_has_a_mean_of_zero(drawn, normalise: Normalise, scale: AdvantageScale):
    group, compare = earned(*drawn), Comparison(WEIGHTS, normalise, scale)
    outcomes, form = compare(group.terms_G), compare({n: v for n, v in group.terms_G.items() if n != "iou"})
    whole = {
        Credit.own_term: outcomes, Credit.turn: outcomes, Credit.own_part: form, Credit.potential: form,
    }  # fmt: skip
    for credit, scheme in SCHEMES.items():
        found = scheme(group, compare)
        apart = found - whole.get(credit, torch.zeros(len(found)))[:, None]
        assert apart.sum(dim=0).abs().max() < 1e-3, credit
        if credit in whole:
            assert abs(float(whole[credit].sum())) < 1e-3
        has_none = ~group.has_anchor_GK
        assert not apart[:, :-1][has_none[:, : apart.shape[1] - 1]].any(), "a segment that is not there earns nothing"


def test_tokens_have_the_advantage_of_their_segment():
    segments = torch.tensor([[0, 0, 2, 2], [2, 2, 2, 2], [0, 1, 1, 2]])
    found = per_token(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0], [4.0, 5.0, 6.0]]), segments)
    assert found.tolist() == [[1, 1, 2, 2], [3, 3, 3, 3], [4, 5, 5, 6]]
