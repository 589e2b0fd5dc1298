"""The benchmark itself: its arithmetic, its counters against numbers by hand, and that every way does the same work."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from experiments.efficiency.bench.counting import count
from experiments.efficiency.bench.first_hour import Finding, Place, numerics, seven
from experiments.efficiency.bench.gpu import Load, cells, measure_gpu
from experiments.efficiency.bench.gpu import measure as measure_phase
from experiments.efficiency.bench.memory import measure
from experiments.efficiency.bench.phases import PHASES, measure_phases, phase_table, write_video
from experiments.efficiency.bench.questions import Bench
from experiments.efficiency.bench.ratios import Timing, in_turns, own_share, table, token_ratio
from experiments.efficiency.bench.shapes import BASES, Shape, make_prompt, make_tokens
from experiments.efficiency.bench.ways import (
    NAIVE,
    SAVING,
    SHARED,
    VISION_ONCE,
    Group,
    accumulate,
    gradient,
    learn,
    one_row,
    reference,
    rollouts,
    see,
    spread_advantages,
    update,
)

TOY = Shape(hidden=64, layers=2, intermediate=96, heads=4, kv_heads=2)
P, C, G = 80, 6, 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"), repeats=1, shape=TOY)


@pytest.fixture(scope="module")
def policy(bench):
    return bench.policy()


@pytest.fixture
def group(bench, policy):
    return bench.group(policy, P, C, G)


def test_the_token_ratio_by_hand():
    assert token_ratio(1024, 64, 8) == pytest.approx(8704 / 1536)
    assert token_ratio(100, 50, 1) == 1
    assert own_share(96, 4) == 0.04


def test_turns_alternate_and_the_first_is_not_measured():
    order = []
    waits = []
    times = in_turns({"a": partial(order.append, "a"), "b": partial(order.append, "b")}, 2, lambda: waits.append(1))
    assert order == ["a", "b"] * 3 and len(waits) == 6
    assert len(times["a"].wall) == len(times["b"].cpu) == 2
    assert Timing((1.0, 9.0, 4.0), (1.0, 1.0, 2.0)).over(Timing((2.0,), (0.5,))) == (2.0, 2.0)


def test_a_table():
    assert table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


@pytest.mark.parametrize(("length", "steps"), [(80, 1), (81, 4), (97, 7), (1024, 1)])
def test_prompts_have_exactly_their_length(policy, length, steps):
    item, clip = make_prompt(policy, length, steps)
    assert item.inputs.length == length == item.inputs.positions.shape[1]
    assert int(item.inputs.is_video.sum()) == item.video.num_tokens == len(item.video.embeddings) > length // 3
    assert clip.grid_thw[0] == steps
    with pytest.raises(ValueError, match="no room"):
        make_prompt(policy, 40, 20)


def test_every_way_computes_the_same(policy, group):
    found = {}
    for way in (NAIVE, VISION_ONCE, SHARED, SAVING):
        found[way] = learn(policy, group, way, reference(policy, group, way)), gradient(policy)
    for logps, grads in found.values():
        assert (logps - found[NAIVE][0]).abs().max() <= 1e-5
        assert (grads - found[NAIVE][1]).norm() <= 1e-5 * grads.norm()
    assert grads.norm() > 0


def test_the_second_family_is_measured_in_the_same_ways(tmp_path):
    """Prompts of exactly their length, stamps included; all ways agree; the library draws its rollouts."""
    policy = Bench(tmp_path, repeats=1, shape=replace(TOY, config_of=BASES["tiny3"])).policy()
    for length, steps in ((80, 1), (160, 7)):
        item, clip = make_prompt(policy, length, steps)
        assert item.inputs.length == length and clip.grid_thw[0] == steps
        assert len(item.video.deepstack) == 2 and len(item.video.deepstack[1]) == int(item.inputs.is_video.sum())
    tokens = make_tokens(policy, item, G, C)
    group = Group(item, clip, tokens, spread_advantages(G, policy.device))
    found = {
        w: (learn(policy, group, w, reference(policy, group, w)), gradient(policy)) for w in (NAIVE, SHARED, SAVING)
    }
    for logps, grads in found.values():
        assert (logps - found[NAIVE][0]).abs().max() <= 1e-5
        assert (grads - found[NAIVE][1]).norm() <= 1e-5 * grads.norm()
    for call in rollouts(policy, item, clip, 2, 3).values():
        call()


def test_rows_add_up_to_their_group(policy, group):
    """One row at a time, as on a GPU: the sequence mean of G rows is G times too large."""
    learn(policy, group, SHARED, reference(policy, group, SHARED))
    together = gradient(policy)
    policy.zero_grad()
    for row in range(G):
        part = one_row(group, row)
        accumulate(policy, part, SHARED, reference(policy, part, SHARED))
    assert (gradient(policy) / G - together).norm() <= 1e-5 * together.norm()


def test_tokens_and_videos_are_counted(policy, group):
    """Reference and policy pass; the last completion token is never fed. Saving repeats its pass in backward."""
    naive, once = (count(policy, partial(update, policy, group, way)) for way in (NAIVE, VISION_ONCE))
    shared, saving = (count(policy, partial(update, policy, group, way)) for way in (SHARED, SAVING))
    assert naive.tokens == once.tokens == 2 * G * (P + C - 1)
    assert shared.tokens == 2 * (P + G * (C - 1))
    assert saving.tokens == 3 * (P + G * (C - 1))
    assert (naive.videos, once.videos, shared.videos, saving.videos) == (2 * G, 0, 0, 0)
    assert naive.flops > once.flops > shared.flops


def test_operations_are_counted(policy):
    """A linear layer by hand, and attention on the CPU, which torch's own counter leaves out."""
    x, linear = torch.randn(5, 64), torch.nn.Linear(64, 32)
    assert count(policy, lambda: linear(x)).flops == 2 * 5 * 64 * 32
    q = torch.randn(1, 4, 10, 16)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    assert count(policy, attend).flops == 2 * (2 * 4 * 10 * 10 * 16)


def test_every_rollout_has_its_full_length(policy, group):
    """Prompt once or G times, then C - 1 single tokens of G rows."""
    calls = rollouts(policy, group.item, group.clip, G, C)
    counted = {way: count(policy, call) for way, call in calls.items()}
    assert counted[SHARED].tokens == P + G * (C - 1)
    assert counted[VISION_ONCE].tokens == counted[NAIVE].tokens == G * (P + C - 1)
    assert [counted[way].videos for way in (NAIVE, VISION_ONCE, SHARED)] == [G, 1, 0]
    assert policy.training and policy.end_ids


def test_seeing_copies(policy, group):
    assert count(policy, partial(see, policy, group.clip, 5)).videos == 5


def test_phases_of_a_real_video(bench, policy, tmp_path):
    write_video(tmp_path / "v.mp4", seconds=4)
    length, found = measure_phases(policy, tmp_path / "v.mp4", G, C, 1, lambda: None)
    assert length > 4 * 16
    for way, phases in found.items():
        assert list(phases) == list(PHASES)
        assert phases["vision"].counts.videos == (3 * G if way == NAIVE else 1)
    assert found[SHARED]["prefill"].counts.tokens == length
    assert found[SHARED]["decode tokens"].counts.tokens == G * (C - 1)
    assert found[NAIVE]["update"].counts.tokens == G * (length + C - 1)
    text = phase_table(found)
    assert text.count("\n") == 2 + 3 * (len(PHASES) + 1)


@pytest.fixture
def own_flags():
    """What a run sets in torch is set back."""
    yield
    torch.use_deterministic_algorithms(False)


def test_the_gpu_question_on_any_device(tmp_path, capsys, own_flags):
    """Its own repeats, device and shapes; what does not fit is a line of the table."""
    found = measure_gpu(tmp_path, "cpu", 1, {"toy": TOY}, Load(80, 6, 3, 4))
    phases = found["shapes"]["toy"]
    assert list(phases)[:2] == ["vision", f"{VISION_ONCE}: rollout"] and len(phases) == 9
    assert all(len(phase["seconds"]) == 1 and phase["tflops"] > 0 for phase in phases.values())
    table = capsys.readouterr().out
    assert "### CPU: toy shape" in table and table.count("\n| ") == 11


def test_a_phase_that_does_not_fit_is_said_and_the_next_one_runs(policy):
    def too_much():
        return torch.empty(1 << 50, dtype=torch.uint8)

    for prepare in (too_much, lambda: too_much):  # what the phase needs, and the phase itself
        assert measure_phase(policy, prepare, 1, Load()) is None
    assert cells(None, 1e12)[0] == "out of memory"
    with pytest.raises(ZeroDivisionError):
        measure_phase(policy, lambda: lambda: 1 / 0, 1, Load())


@pytest.mark.slow
def test_the_first_hours_numerics_and_phases_run_without_a_gpu(tmp_path, own_flags):
    """Expectations of speed and memory are shown there and not judged; numbers are."""
    place = Place(tmp_path, "cpu")
    findings = [*numerics(place), *seven(place)]
    assert len(findings) == 14 and all(f.expected and f.found for f in findings)
    assert not any(f.is_met is False for f in findings if "recorded" not in f.what and "patches" not in f.what)
    said = {f.what: f.found for f in findings}
    assert said["pytest -m gpu"] == "needs a CUDA device"
    assert Finding("a", "b", "c", False).verdict == "NO"


@pytest.mark.slow
def test_memory_grows_with_the_completions_own_tokens_only(bench, tmp_path):
    """From G = 2 to G = 16 in processes of their own: each further rollout costs at most its tokens' share."""
    from experiments.efficiency.bench.shapes import SMALLER, build_policy

    build_policy(SMALLER, tmp_path)
    prompt, completion, low, high = 512, 32, 2, 16
    per_rollout = {}
    for way in (VISION_ONCE, SAVING):
        few, many = (measure(way, tmp_path, prompt, completion, size) for size in (low, high))
        assert many > few > 0
        per_rollout[way] = (many - few) / (high - low)
    assert per_rollout[SAVING] <= per_rollout[VISION_ONCE] * own_share(prompt, completion)


@pytest.mark.slow
def test_memory_is_that_of_the_update(bench, tmp_path):
    """A few MiB at least: the saved activations of a toy; a number, not a guess at zero."""
    from experiments.efficiency.bench.shapes import SMALLER, build_policy

    build_policy(SMALLER, tmp_path)
    small, large = (measure(VISION_ONCE, tmp_path, prompt, 8, 2) for prompt in (64, 256))
    assert 1 < small < large < 500 and not math.isnan(small)
