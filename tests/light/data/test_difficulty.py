"""Difficulty of queries by hand, and what each rule keeps."""

import json
from math import exp, sqrt
from pathlib import Path

import pytest

from tartvg.config import DifficultyConfig, DifficultyRule, SettingError
from tartvg.data.difficulty import Difficulty, difficulties, difficulty_from_json, select
from tartvg.records import dumps
from tartvg.types import (
    Completion,
    GroundingSample,
    Prompt,
    Response,
    RewardBreakdown,
    Rollout,
    RolloutGroup,
    Span,
)


def prompt(name: str, *windows: Span) -> Prompt:
    return Prompt(GroundingSample(name, Path("v.mp4"), "q", windows or (Span(0, 10),), 30.0, "train"), "")


def group(name: str, *answers: Span | None, step: int = 0) -> RolloutGroup:
    """Rewards are 0, 1, 2, ..."""
    rollouts = [
        Rollout(Completion("", (), (), True), Response((), answer, ()), RewardBreakdown(float(i), {}))
        for i, answer in enumerate(answers)
    ]
    return RolloutGroup(prompt(name, Span(0, 10), Span(20, 30)), tuple(rollouts), step)


def measured(**ious: tuple[float, ...]) -> dict[str, Difficulty]:
    return {name: Difficulty(name, (0.0,) * len(values), values) for name, values in ious.items()}


def kept(known: dict[str, Difficulty], *more: str, seed: int = 0, **rule: object) -> list[str]:
    config = DifficultyConfig(**rule)  # type: ignore[arg-type]
    chosen, selection = select([prompt(name) for name in (*known, *more)], known, config, seed)
    assert selection.num_kept == len(chosen) == sum(selection.kept)
    assert sum(selection.measured) == len(known) and selection.num_unmeasured == len(more)
    return [p.sample.sample_id for p in chosen]


def test_rollouts_of_a_query_are_put_together() -> None:
    groups = [group("a", Span(0, 5), Span(20, 30)), group("b", None), group("a", Span(12, 18), step=1)]
    a, b = difficulties(groups)
    assert (a.ious, a.rewards, b.ious) == ((0.5, 1.0, 0.0), (0.0, 1.0, 0.0), (0.0,))
    assert (a.mean("iou"), a.mean("reward")) == (0.5, pytest.approx(1 / 3))
    assert difficulty_from_json(json.loads(dumps(a))) == a


KNOWN = measured(never=(0.0, 0.1), low=(0.1, 0.3), split=(0.2, 0.6), high=(0.7, 0.9), always=(1.0, 1.0))


def test_rules_by_hand() -> None:
    assert kept(KNOWN) == list(KNOWN)
    assert kept(KNOWN, keep=DifficultyRule.band, low=0.2, high=0.8) == ["low", "split", "high"]  # both ends count
    assert kept(KNOWN, "new", keep=DifficultyRule.band) == list(KNOWN)  # what was not measured is left out
    assert kept(KNOWN, keep=DifficultyRule.undecided) == ["split"]
    assert kept(KNOWN, keep=DifficultyRule.undecided, right_iou=0.9) == ["high"]
    by_reward = {"a": Difficulty("a", (1.0, 3.0), (0.0, 0.0)), "b": Difficulty("b", (7.0,), (0.0,))}
    assert kept(by_reward, keep=DifficultyRule.band, measure="reward", low=1.5, high=2) == ["a"]


def test_the_histogram_by_hand() -> None:
    _, found = select([prompt(n) for n in KNOWN], KNOWN, DifficultyConfig(keep=DifficultyRule.band, low=0.2), 0)
    assert found.edges == pytest.approx([i / 10 for i in range(11)])
    assert found.measured == (1, 0, 1, 0, 1, 0, 0, 0, 1, 1)
    assert found.kept == (0, 0, 1, 0, 1, 0, 0, 0, 1, 1)


@pytest.mark.parametrize("mean", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_the_gaussian_keeps_its_share_within_binomial_bounds(mean: float) -> None:
    known = {str(i): Difficulty(str(i), (0.0,), (mean,)) for i in range(4000)}
    share = exp(-(((mean - 0.3) / 0.2) ** 2) / 2)
    found = kept(known, keep=DifficultyRule.gaussian, centre=0.3, width=0.2)
    assert abs(len(found) - 4000 * share) <= 4 * sqrt(4000 * share * (1 - share))
    half = {key: value for key, value in known.items() if int(key) % 2}
    rule = {"keep": DifficultyRule.gaussian, "centre": 0.3, "width": 0.2}
    assert kept(half, **rule) == [name for name in found if name in half]  # whatever else there is
    if 0 < share < 0.99:
        assert kept(known, seed=1, **rule) != found


def test_a_band_has_two_ends() -> None:
    with pytest.raises(SettingError, match=r"difficulty\.low must be <= difficulty\.high"):
        DifficultyConfig(low=0.5, high=0.4)
