import random
from itertools import pairwise
from pathlib import Path

import pytest

from tartvg.config import (
    AnchorsConfig,
    CountPenalty,
    FilterConfig,
    FormatKind,
    IouKind,
    RewardConfig,
    SettingError,
    Truth,
)
from tartvg.response import parse_response
from tartvg.rewards import Rubric, ScoredResponse
from tartvg.rewards.format import format_reward
from tartvg.rewards.rubric import TERMS
from tartvg.rewards.tar1 import tar1_rewards
from tartvg.rewards.tar2 import tar2_cost
from tartvg.rewards.tar3 import tar3_rewards
from tartvg.spans import iou as hard_iou
from tartvg.spans import soft_iou
from tartvg.types import Fault, GroundingSample, Response, RewardBreakdown, Span

TRUTH = Span(0.0, 100.0)


def sample(*windows: Span) -> GroundingSample:
    return GroundingSample("q0", Path("v.mp4"), "a person opens a door", windows or (TRUTH,), 200.0, "train")


def completion(*anchors: Span, answer: Span | None = None) -> str:
    stamps = " then ".join(f"<timestamp>{a.start:.9f} to {a.end:.9f}</timestamp>" for a in anchors)
    answer = answer or anchors[-1]
    return f"<think>I see {stamps}</think><answer>{answer.start:.9f} to {answer.end:.9f}</answer>"


def judge(text: str, reward: RewardConfig | None = None, *, target: int = 2, cap: int = 3) -> RewardBreakdown:
    rubric = Rubric(reward or RewardConfig(), AnchorsConfig(count=target, max_count=cap))
    return rubric.score(parse_response(text), sample())


def near_perfect(count: int) -> str:
    """`count` anchors, each closer than the one before; the last one is exact."""
    return completion(*(Span(0, 100 - 1e-6 * (count - i)) for i in range(1, count + 1)))


def with_ious(*ious: float) -> str:
    return completion(*(Span(0, 100 * iou) for iou in ious))


def scored(*ious: float, faults: tuple[Fault, ...] = (), **reward: object) -> ScoredResponse:
    """A response with anchors of these IoUs."""
    response = Response((Span(1, 2),) * len(ious), Span(1, 2), faults)
    return ScoredResponse(response, sample(), (TRUTH,), ious, RewardConfig(**reward), AnchorsConfig())  # type: ignore[arg-type]


def published(reward: RewardBreakdown) -> dict[str, float]:
    """The paper's terms: a row of `TERMS` that is added later, with a weight of 0, fails no test here."""
    return {name: reward.terms[name] for name in ("format", "iou", "tar1", "tar2", "tar3")}


WITHOUT_CAP = {1: 0, 2: 8, 3: 7, 4: 7, 5: 8, 6: 10, 7: 13, 8: 17, 9: 22, 10: 28}
# three anchors are paid: 1 (answer) + 6 (TAR1) + 2 (TAR3) - 5 |N - 2|, and no format
WITH_CAP = {1: 0, 2: 8, 3: 7, 4: -1, 5: -6, 6: -11, 7: -16, 8: -21, 9: -26, 10: -31}


@pytest.mark.parametrize(("count", "total"), WITHOUT_CAP.items())
def test_the_literal_formula_can_be_hacked(count: int, total: float):
    assert judge(near_perfect(count), cap=100).total == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize(("count", "total"), WITH_CAP.items())
def test_the_cap_makes_the_target_the_best(count: int, total: float):
    reward = judge(near_perfect(count))
    assert reward.total == pytest.approx(total, abs=1e-5)
    assert reward.terms["format"] == (1.0 if count <= 3 else 0.0)
    assert len(reward.anchor_ious) == count


@pytest.mark.parametrize("target", [1, 2, 3])
@pytest.mark.parametrize("form", CountPenalty)
def test_with_the_default_cap_no_surplus_pays(target: int, form: CountPenalty):
    totals = {n: judge(near_perfect(n), RewardConfig(tar2_form=form), target=target, cap=target + 1).total
              for n in range(1, 12)}  # fmt: skip
    assert max(totals, key=lambda n: totals[n]) == target


def test_only_the_squared_form_needs_no_cap():
    for form, is_safe in [(CountPenalty.abs, False), (CountPenalty.squared, True), (CountPenalty.indicator, False)]:
        totals = [judge(near_perfect(n), RewardConfig(tar2_form=form), cap=99).total for n in range(1, 31)]
        assert (max(totals) == totals[1]) is is_safe
    indicator = [
        judge(near_perfect(n), RewardConfig(tar2_form=CountPenalty.indicator), cap=99).total for n in (2, 3, 4)
    ]
    assert indicator[2] > indicator[0] > indicator[1]


def test_two_anchor_completion():
    reward = judge(with_ious(0.9, 1.0))
    assert reward.total == pytest.approx(7.9)
    assert published(reward) == pytest.approx({"format": 1.0, "iou": 1.0, "tar1": 2.9, "tar2": 0.0, "tar3": 1.0})
    assert reward.anchor_ious == pytest.approx((0.9, 1.0))


def test_two_equal_anchors_are_not_refined():
    reward = judge(with_ious(1.0, 1.0))
    assert reward.terms["tar3"] == -1
    assert reward.total == pytest.approx(3 + 1 + 3 - 1)


def test_the_terms_on_their_own():
    assert tar1_rewards(scored()) == [] and tar1_rewards(scored(0.5, -0.25, 1.0)) == [0.5, -0.5, 3]
    assert tar3_rewards(scored(0.1, 0.2, 0.2, -0.5, 0.9)) == [0, 1, -1, -1, 1]
    assert (tar3_rewards(scored()), tar3_rewards(scored(0.7))) == ([], [0])


def test_terms_of_anchors_say_what_each_paid_anchor_earns():
    rubric = Rubric(RewardConfig(), AnchorsConfig())
    values = rubric.raw_terms(parse_response(with_ious(0.2, 0.4, 0.3, 0.5)), sample())
    assert values["tar1"] == pytest.approx([0.2, 0.8, 0.9]) and values["tar3"] == [0, 1, -1]  # the fourth is surplus
    assert (values["format"], values["iou"], values["tar2"]) == (0, pytest.approx(0.5), 2)


@pytest.mark.parametrize("iou", IouKind)
@pytest.mark.parametrize("form", CountPenalty)
def test_the_table_sums_to_the_published_formula_bit_for_bit(iou: IouKind, form: CountPenalty):
    """The formula written out, with its order of additions, on random responses and weights."""
    rng, overlap = random.Random(f"{iou} {form}"), {IouKind.soft: soft_iou, IouKind.hard: hard_iou}[iou]
    for _ in range(2000):
        names = ("format_weight", "iou_weight", "tar1_weight", "beta", "gamma")
        weights = {name: rng.choice((0.0, 1.0, 3.0, 5.0, rng.uniform(0, 9))) for name in names}
        excuses = {name: rng.random() < 0.5 for name in ("needs_anchors", "answer_is_last_anchor")}
        reward = RewardConfig(**weights, **excuses, iou=iou, tar2_form=form, unparsed_iou=-rng.random())
        target = rng.randrange(1, 4)
        anchors = AnchorsConfig(count=target, max_count=target + rng.randrange(3))
        spans = tuple(Span(rng.uniform(-5, 205), rng.uniform(-5, 205)) for _ in range(rng.randrange(7)))
        spans += spans[-1:] * rng.randrange(2)  # a tie
        answer = rng.choice((None, *spans, Span(rng.uniform(0, 100), rng.uniform(100, 200))))
        faults = tuple(rng.sample(list(Fault), rng.choice((0, 0, 1, 2))))
        found = Rubric(reward, anchors).score(Response(spans, answer, faults), sample())
        excused = {Fault.ANSWER_MISMATCH} if not (reward.answer_is_last_anchor and reward.needs_anchors) else set()
        excused |= set() if reward.needs_anchors else {Fault.NO_ANCHOR}
        paid = [overlap(a, TRUTH) for a in spans[: anchors.max_count]]
        form_value = 1.0 if not set(faults) - excused and len(spans) <= anchors.max_count else 0.0
        answer_iou = reward.unparsed_iou if answer is None else overlap(answer, TRUTH)
        tar1 = sum(i * value for i, value in enumerate(paid, start=1))
        gap = len(spans) - target
        tar2 = float({"abs": abs(gap), "squared": gap**2, "indicator": gap != 0}[form.value])
        tar3 = float(sum(1 if b > a else -1 for a, b in pairwise(paid)))
        total = (
            reward.format_weight * form_value
            + reward.iou_weight * answer_iou
            + reward.tar1_weight * tar1
            - reward.beta * tar2
            + reward.gamma * tar3
        )
        assert found.total.hex() == total.hex()
        terms = {"format": form_value, "iou": answer_iou, "tar1": tar1, "tar2": tar2, "tar3": tar3}
        assert published(found) == terms and found.anchor_ious == tuple(soft_iou(a, TRUTH) for a in spans)


def test_every_row_has_a_name_and_a_weight_of_its_own():
    assert len({term.name for term in TERMS}) == len({term.weight for term in TERMS}) == len(TERMS)
    for term in TERMS:
        with pytest.raises(SettingError, match=f"reward.{term.weight}"):
            RewardConfig(**{term.weight: -1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "costs"),
    [
        (CountPenalty.abs, [2, 1, 0, 1, 2, 3]),
        (CountPenalty.squared, [4, 1, 0, 1, 4, 9]),
        (CountPenalty.indicator, [1, 1, 0, 1, 1, 1]),
    ],
)
def test_tar2_forms(form: CountPenalty, costs: list[float]):
    assert [tar2_cost(scored(*[0.5] * n, tar2_form=form)) for n in range(6)] == costs


def test_weights_apply_as_written():
    reward = RewardConfig(format_weight=0.5, iou_weight=2, tar1_weight=0.25, beta=1.5, gamma=4)
    total = judge(with_ious(0.6, 0.5, 0.8), reward).total
    assert total == pytest.approx(0.5 * 1 + 2 * 0.8 + 0.25 * (0.6 + 1.0 + 2.4) - 1.5 * 1 + 4 * 0)


def test_an_unreadable_answer_never_beats_a_wrong_one():
    anchors = "<think><timestamp>0 to 50</timestamp><timestamp>0 to 60</timestamp></think>"
    wrong = judge(anchors + "<answer>199 to 200</answer>")
    for text in (anchors, anchors + "<answer>soon</answer>", anchors + "<answer>60 to 0</answer>"):
        reward = judge(text)
        assert reward.terms["iou"] == -1 < wrong.terms["iou"]
        assert reward.total < wrong.total
        assert (reward.terms["tar1"], reward.terms["tar3"]) == (pytest.approx(1.7), 1)  # what can be read is paid
    assert judge(anchors, RewardConfig(unparsed_iou=-0.5)).terms["iou"] == -0.5


def test_hard_iou_pays_nothing_for_disjoint_anchors_but_the_record_stays_soft():
    text = completion(Span(150, 200), Span(0, 50))
    soft, hard = judge(text), judge(text, RewardConfig(iou=IouKind.hard))
    assert soft.terms["tar1"] == pytest.approx(-50 / 200 + 2 * 0.5)
    assert hard.terms["tar1"] == pytest.approx(0 + 2 * 0.5)
    assert soft.anchor_ious == hard.anchor_ious == (-0.25, 0.5)
    away = completion(Span(180, 200), Span(150, 200))
    assert judge(away).terms["tar3"] == 1  # nearer
    assert judge(away, RewardConfig(iou=IouKind.hard)).terms["tar3"] == -1  # both 0


def test_format_excuses():
    plain = RewardConfig(needs_anchors=False, answer_is_last_anchor=False)
    no_anchor = "<think>hm</think><answer>1 to 2</answer>"
    mismatch = completion(Span(0, 10), answer=Span(0, 90))
    assert judge(no_anchor).terms["format"] == 0 and judge(no_anchor, plain).terms["format"] == 1
    assert judge(no_anchor, RewardConfig(answer_is_last_anchor=False)).terms["format"] == 0
    assert judge(mismatch).terms["format"] == 0
    assert judge(mismatch, RewardConfig(answer_is_last_anchor=False)).terms["format"] == 1
    assert judge(mismatch, RewardConfig(needs_anchors=False)).terms["format"] == 1


@pytest.mark.parametrize("fault", Fault)
def test_every_other_fault_fails_the_format(fault: Fault):
    is_excused = fault in (Fault.NO_ANCHOR, Fault.ANSWER_MISMATCH)
    assert format_reward(scored(0.5, faults=(fault,))) == 0
    excusing = scored(0.5, faults=(fault,), needs_anchors=False, answer_is_last_anchor=False)
    assert format_reward(excusing) == (1.0 if is_excused else 0.0)


GOOD = "<think><timestamp>0 to 1</timestamp></think><answer>0 to 1</answer>"


@pytest.mark.parametrize(
    ("text", "paid"),
    [
        (GOOD, 1.0),
        ("<think>hm</think><answer>0 to 1</answer>", 0.7),  # the whole flow, without an anchor
        (GOOD.replace("0 to 1</answer>", "0 to 9</answer>"), 0.7),
        (GOOD + " so", 0.4),  # the block is closed, but something follows the answer
        ("<think>hm</think>", 0.4),
        ("<answer>0 to 1</answer>", 0.0),
        ("", 0.0),
        ("<think>hm</think><think>hm</think><answer>0 to 1</answer>", 0.0),
        ("<think>hm <answer>0 to 1</answer>", -0.3),
    ],
)
def test_graded_format_by_hand(text: str, paid: float):
    graded = RewardConfig(format_kind=FormatKind.graded)
    assert judge(text, graded).terms["format"] == pytest.approx(paid)
    assert judge(text).terms["format"] == float(paid == 1)


def test_the_format_of_a_direct_answer_is_the_answer_alone():
    rubric = Rubric(RewardConfig(format_kind=FormatKind.graded), AnchorsConfig())
    for text, paid in (("<answer>0 to 1</answer>", 1.0), ("so <answer>0 to 1</answer>", 0.4), (GOOD, 0.0)):
        terms = rubric.score(parse_response(text, is_direct=True), sample()).terms
        assert terms["format"] == pytest.approx(paid), text


def test_timezero_rubric_is_format_plus_iou():
    reward = RewardConfig(
        format_weight=1, tar1_weight=0, beta=0, gamma=0, needs_anchors=False, answer_is_last_anchor=False,
        iou=IouKind.hard, unparsed_iou=0,
    )  # fmt: skip
    assert judge("<think>hm</think><answer>0 to 25</answer>", reward).total == pytest.approx(1.25)
    assert judge("hm", reward).total == 0


def test_the_first_window_is_the_truth_where_the_setting_says_so():
    rubric = Rubric(RewardConfig(truth=Truth.first), AnchorsConfig())
    response = parse_response(completion(Span(0, 9), Span(0, 10)))
    assert rubric.score(response, sample(Span(0, 10), Span(50, 60))).terms["iou"] == 1
    assert rubric.score(response, sample(Span(50, 60), Span(0, 10))).terms["iou"] < 0
    with pytest.raises(ValueError, match="q0"):
        rubric.score(response, GroundingSample("q0", Path("v.mp4"), "x", (), 10.0, "test"))


def test_why_tar1_is_not_normalised():
    best = judge(with_ious(1.0 - 1e-9, 1.0))
    normalised = best.total - best.terms["tar1"] + best.terms["tar1"] / 3
    threshold = FilterConfig().min_reward
    assert normalised == pytest.approx(6.0) and normalised < threshold
    assert best.total == pytest.approx(8.0)
    assert threshold == pytest.approx(0.8 * 8)


def test_what_the_reward_bound_of_the_filter_lets_through():
    threshold = FilterConfig().min_reward
    assert judge(with_ious(1.0, 1.0)).total < threshold  # not refined: at most 6
    assert judge(with_ious(1.0)).total < threshold  # one anchor: at most 0
    assert judge(with_ious(0.5001, 0.7001)).total == pytest.approx(6.6, abs=1e-3)
    assert judge(with_ious(0.5001, 0.7001)).total > threshold
    assert judge(with_ious(0.98, 0.99, 1.0)).total > threshold  # three good ones still pass
    assert judge(near_perfect(4)).total < threshold


def test_nothing_stays_between_calls():
    rubric = Rubric(RewardConfig(), AnchorsConfig())
    good, bad = parse_response(with_ious(0.9, 1.0)), parse_response("nonsense")
    first = rubric.score(good, sample())
    rubric.score(bad, sample())
    assert rubric.score(good, sample()) == first
