"""Our positions against transformers' own: equal inside the video, different after a long one, and why it matters."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLForConditionalGeneration

from experiments.tiny_base import model as tiny
from tartvg.config import FramesConfig, PolicyConfig, SamplingConfig
from tartvg.data.video import Clip, read_clip
from tartvg.policy.families.qwen2_5_vl import prompt_positions
from tartvg.policy.inputs import clip_patches, next_position
from tartvg.policy.policy import Policy
from tartvg.types import GroundingSample, Prompt, Span

SMALL = FramesConfig(min_frames=4, max_frames=768, min_pixels=3136, max_pixels=3136)
GRIDS = st.tuples(st.integers(1, 24), st.integers(1, 6).map(lambda n: 2 * n), st.integers(1, 6).map(lambda n: 2 * n))


@pytest.fixture(scope="module")
def library():
    """transformers' rule for a prompt of text, one video and text: (3, S), and its shift for decoded tokens."""
    tokenizer = tiny.build_tokenizer(["x"])
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(tiny.tiny_config(tokenizer)).model

    def rule(before, after, grid, seconds):
        num_video = grid[0] * grid[1] * grid[2] // 4
        types = torch.tensor([[0] * before + [2] * num_video + [0] * after])
        positions, shift = model.get_rope_index(
            torch.zeros_like(types), types, video_grid_thw=torch.tensor([grid]), second_per_grid_ts=[seconds]
        )
        return positions[:, 0], int(shift)

    return rule


def original_rule(before, after, grid, seconds, per_second):
    """The definition of the Qwen2.5-VL report token by token: absolute time, then the largest id plus one."""
    rows = [(i, i, i) for i in range(before)]
    for t in range(grid[0]):
        # float32, as the released code multiplies
        tick = int(np.float32(t) * np.float32(seconds * per_second))
        rows += [(before + tick, before + h, before + w) for h in range(grid[1] // 2) for w in range(grid[2] // 2)]
    start = max(map(max, rows)) + 1
    rows += [(start + i,) * 3 for i in range(after)]
    return torch.tensor(rows).T


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), GRIDS, st.floats(0.01, 12), st.sampled_from([1.0, 2.0, 4.0]))
def test_positions_follow_the_original_definition(before, after, grid, seconds, per_second):
    ours = prompt_positions(before, after, grid, seconds, per_second)
    assert torch.equal(ours, original_rule(before, after, grid, seconds, per_second))
    assert next_position(ours) == int(ours.max()) + 1


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), GRIDS, st.floats(0.01, 12))
def test_the_library_agrees_inside_the_video_and_after_it_only_if_it_is_wider_than_long(
    library, before, after, grid, seconds
):
    """transformers continues after the video from its height or width; the original rule from its last moment too."""
    ours, (theirs, shift) = prompt_positions(before, after, grid, seconds, 2.0), library(before, after, grid, seconds)
    assert torch.equal(ours[:, :-after], theirs[:, :-after])
    last_tick = int(ours[0, -after - 1]) - before
    extra = max(0, last_tick + 1 - max(grid[1], grid[2]) // 2)
    assert torch.equal(ours[:, -after:], theirs[:, -after:] + extra)
    # its decoding continues from the largest id of the prompt, which is the original rule only if the text is short
    assert ours.shape[1] + shift == max(next_position(theirs), before + last_tick + 1)


def test_the_librarys_prefill_and_decoding_contradict_each_other(library):
    """Its own whole pass puts the first completion token at 22; its decoding puts the same token at 348."""
    grid, before, after = (84, 4, 4), 15, 5
    prompt, shift = library(before, after, grid, 2.0)
    whole, _ = library(before, after + 1, grid, 2.0)
    assert whole[:, -1].tolist() == [22] * 3
    assert prompt.shape[1] + shift == 348
    ours = prompt_positions(before, after, grid, 2.0, 2.0)
    assert next_position(ours) == prompt_positions(before, after + 1, grid, 2.0, 2.0)[0, -1] == 353


@pytest.fixture(scope="module")
def long_clip():
    """40 grid steps of 2 s: temporal ids run over 156, height and width over 1."""
    frames = np.random.default_rng(0).integers(0, 256, (80, 56, 56, 3)).astype(np.uint8)
    return Clip(frames, tuple(float(i) for i in range(80)), 80.0)


def test_prefill_and_decoding_equal_one_full_pass_and_would_not_with_the_librarys_rule(untrained_base, long_clip):
    """The oracle is the library's own forward pass over pixels and tokens; only the positions are handed over."""
    policy = Policy(PolicyConfig(name="t", path=str(untrained_base)))
    core = policy.core
    sample = GroundingSample("a", Path("absent.mp4"), "where is it", (Span(1, 2),), 80.0, "train")
    item = policy.prepare(Prompt(sample, "where is it"), long_clip)
    group = policy.sample([item], 3, SamplingConfig(max_new_tokens=24), [0])[0]
    video, start = clip_patches(long_clip, policy.family.patch_form), item.inputs.length
    grid = torch.tensor([video.grid_thw])
    for completion in group:
        ids = torch.cat([item.inputs.ids, torch.tensor(completion.token_ids)])[None]
        steps = item.inputs.next_position + torch.arange(len(completion.token_ids))
        ours = torch.cat([item.inputs.positions, steps.expand(3, -1)], dim=1)
        theirs, _ = core.model.get_rope_index(
            ids, 2 * (ids == core.config.video_token_id).int(), video_grid_thw=grid,
            second_per_grid_ts=[video.seconds_per_grid],
        )  # fmt: skip
        assert not torch.equal(ours, theirs[:, 0])
        gaps = []
        for positions in (ours[:, None], theirs):
            with torch.no_grad():
                out = core(
                    input_ids=ids, pixel_values_videos=video.patches, video_grid_thw=grid, position_ids=positions,
                    use_cache=False,
                )  # fmt: skip
            logits = out.logits[0, start - 1 : -1]
            logits[:, policy.banned] = -math.inf
            full = logits.log_softmax(dim=-1).gather(-1, ids[0, start:, None])[:, 0]
            gaps.append(float((full - torch.tensor(completion.logps)).abs().max()))
        assert gaps[0] <= 1e-5
        assert gaps[1] > 1e-3


# --- seconds_per_grid


def write_video(path: Path, times: list[Fraction], clock: Fraction) -> None:
    """A video whose frames are shown at `times`, whatever rate its header names."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        stream.codec_context.time_base = stream.time_base = clock
        for number, moment in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((56, 56, 3), number % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(moment / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("rate", "num_frames", "max_frames", "seconds"),
    [
        (Fraction(24), 336, 768, 1.0),
        (Fraction(30), 420, 768, 1.0),
        (Fraction(30), 420, 8, 3.5),  # fewer frames than 2 a second: the nominal rate would say 1.0
        (Fraction(7), 70, 768, 1.0),
        (Fraction(1), 20, 768, 2.0),  # the file has only one frame a second
        (Fraction(30000, 1001), 419, 768, 2 * 13.9806 / 26),
    ],
)
def test_seconds_per_grid_come_from_the_frames_really_sampled(tmp_path, rate, num_frames, max_frames, seconds):
    times = [i / rate for i in range(num_frames)]
    write_video(tmp_path / "a.mp4", times, Fraction(1, 1) / (rate.numerator * 512))
    clip = read_clip(tmp_path / "a.mp4", FramesConfig(max_frames=max_frames, min_pixels=3136, max_pixels=3136))
    assert clip.times == pytest.approx([float(i / rate) for i in indices(num_frames, len(clip.times))])
    # rounding to whole frames may move the last one by one frame
    assert clip.seconds_per_grid == pytest.approx(seconds, abs=2 / float(rate) / (len(clip.times) - 1) + 1e-3)


def indices(num_frames: int, count: int) -> list[int]:
    return [i * num_frames // count for i in range(count)]


def test_a_variable_frame_rate_is_measured_not_assumed(tmp_path):
    """The first 60 frames at 30 a second, then 60 at 6 a second: 12 s, which a rate of 30 would call 4 s."""
    times = [Fraction(i, 30) for i in range(60)] + [2 + Fraction(i, 6) for i in range(60)]
    write_video(tmp_path / "v.mp4", times, Fraction(1, 15360))
    clip = read_clip(tmp_path / "v.mp4", SMALL)
    assert clip.duration == pytest.approx(12, abs=0.15)
    assert clip.seconds_per_grid == pytest.approx(2 * 12 / len(clip.times), rel=0.05)
    assert all(min(abs(t - float(u)) for u in times) < 1e-4 for t in clip.times)


@pytest.mark.parametrize("rate", [25, 15])
def test_the_ids_of_a_video_are_the_moments_of_its_frames(tmp_path, rate):
    """At 25 frames a second every 12.5th is wanted: grid step t begins at exactly t seconds, so its id is 2 t."""
    write_video(tmp_path / "a.mp4", [Fraction(i, rate) for i in range(14 * rate)], Fraction(1, 12800 * 3))
    clip = read_clip(tmp_path / "a.mp4", SMALL)
    assert clip.times[::2] == pytest.approx(range(14))
    ids = prompt_positions(0, 1, (14, 4, 4), clip.seconds_per_grid, 2.0)[0, :-1:4]
    assert ids.tolist() == [2 * t for t in range(14)]
