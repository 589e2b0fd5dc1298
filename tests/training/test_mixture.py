"""Which prompts a training on several data sets draws, by hand and within binomial bounds."""

from collections import Counter
from math import sqrt
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartvg.training.batches import Mixture, StepDataset, step_indices
from tartvg.types import GroundingSample, Prompt, Span

WEIGHTS = {"a": 1.0, "b": 2.0}
SOURCES = ["a"] * 5 + ["b"] * 7
PLACES = 9000


def mixture(num_positions=PLACES, seed=0, weights=WEIGHTS, sources=SOURCES):
    return Mixture(sources, weights, seed, num_positions)


def prompts():
    windows = (Span(0, 1),)
    samples = (
        GroundingSample(f"{s}/{i}", Path("v.mp4"), "q", windows, 2.0, "train", source=s) for i, s in enumerate(SOURCES)
    )
    return [Prompt(sample, "") for sample in samples]


@pytest.mark.parametrize("seed", range(5))
def test_sources_are_drawn_with_their_weights(seed):
    counts = Counter(SOURCES[i] for i in map(mixture(seed=seed).index, range(PLACES)))
    for source, share in (("a", 1 / 3), ("b", 2 / 3)):
        # 4 standard deviations of the binomial distribution: one in 16,000 leaves them
        assert abs(counts[source] - share * PLACES) < 4 * sqrt(PLACES * share * (1 - share))
    # nor do neighbours depend on each other: a pair of the same source has the chance 1/9 + 4/9
    drawn = mixture(seed=seed).drawn
    pairs = int((drawn[1::2] == drawn[::2]).sum())
    assert abs(pairs - PLACES / 2 * 5 / 9) < 4 * sqrt(PLACES / 2 * 5 / 9 * 4 / 9)


def test_each_source_goes_through_epochs_of_its_own():
    of = mixture()
    for source in WEIGHTS:
        seen = [i for i in map(of.index, range(300)) if SOURCES[i] == source]
        own = [i for i, name in enumerate(SOURCES) if name == source]
        for start in range(0, len(seen) - len(own), len(own)):
            assert sorted(seen[start : start + len(own)]) == own


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 60))
def test_a_place_does_not_depend_on_where_the_training_ends(seed, few, more):
    short, long = mixture(few, seed), mixture(few + more, seed)
    assert [*map(short.index, range(few))] == [*map(long.index, range(few))]


def test_one_part_is_drawn_like_the_data_set_alone():
    alone = [i for step in range(9) for i in step_indices(3, step, 4, 5)]
    assert [mixture(36, 3, {"a": 1.0}, ["a"] * 5).index(place) for place in range(36)] == alone


def test_ranks_share_a_step_and_a_restart_continues_it():
    whole = StepDataset(prompts(), 4, 1, 0, 6, weights=WEIGHTS)
    halves = [StepDataset(prompts(), 4, 1, 0, 6, (rank, 2), WEIGHTS) for rank in range(2)]
    rest = StepDataset(prompts(), 4, 1, 4, 6, weights=WEIGHTS)
    for step, batch in enumerate(whole):
        assert {*halves[0][step].prompts} | {*halves[1][step].prompts} == {*batch.prompts}
    assert [rest[0].prompts, rest[1].prompts] == [whole[4].prompts, whole[5].prompts]
