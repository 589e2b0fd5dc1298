"""Qwen3-VL on an untrained base: its numbers beside the library's, and ours in every way that we compute them.

The base has what the released ones have and the tiny one hides: heads that are wider than hidden / heads, and three
DeepStack features.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bases import untrained_qwen3
from helpers.policies import with_moved_adapter
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from tartvg.config import FramesConfig, LoraConfig, PolicyConfig, SamplingConfig, SettingError, VideoWrapper
from tartvg.data.video import Clip, target_size
from tartvg.policy.controls import in_order, with_shifted_stamps
from tartvg.policy.disk_cache import DiskCache
from tartvg.policy.families.qwen3_vl import PATCH_FORM, encode_prompt, prompt_text
from tartvg.policy.features import FeatureCache, VideoFeatures
from tartvg.policy.inputs import clip_patches
from tartvg.policy.policy import Policy, token_batch
from tartvg.types import GroundingSample, Prompt, Span

QUESTION = "When does the red circle appear?"
FRAMES = FramesConfig(min_frames=4, max_frames=96, min_pixels=4096, max_pixels=8192)
WAYS = {"shared": dict(), "packed": dict(activation_checkpointing=True), "naive": dict(shared_prefix=False)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return untrained_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def settings(base):
    return PolicyConfig(name="t", path=str(base), frames=FRAMES, lora=LoraConfig(rank=4), logit_chunk=7)


@pytest.fixture(scope="module")
def policy(settings):
    """With an adapter that is not the identity."""
    return with_moved_adapter(Policy(settings, seed=1))


def clip_of(num_frames, height=64, width=96, step=0.5):
    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, height, width, 3)).astype(np.uint8)
    return Clip(frames, tuple(step * i for i in range(num_frames)), step * num_frames)


def prepared(policy, clip, text=QUESTION):
    return policy.prepare(
        Prompt(GroundingSample("a", Path("absent.mp4"), text, (Span(0, 1),), 2.0, "train"), text), clip
    )


@pytest.fixture(scope="module")
def item(policy):
    return prepared(policy, clip_of(10))


@pytest.fixture(scope="module")
def rollouts(policy, item):
    """Four completions, cut to different lengths."""
    group = policy.sample([item], 4, SamplingConfig(max_new_tokens=14), [3])[0]
    return [dataclasses.replace(c, token_ids=c.token_ids[: 3 * i + 2], logps=c.logps[: 3 * i + 2])
            for i, c in enumerate(group)]  # fmt: skip


# --- ids, positions, patches


@pytest.fixture(scope="module")
def facts_of():
    def facts(steps, rows, columns, step=1.37):
        stamps = tuple(0.25 + step * i for i in range(steps))
        return VideoFeatures(torch.empty(0), (steps, rows, columns), 1.0, step * steps, stamps=stamps)

    return facts


@pytest.mark.parametrize("wrapper", VideoWrapper)
@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 2, 2), (5, 2, 6), (7, 12, 4), (384, 4, 4)])
def test_positions_are_the_librarys(policy, facts_of, wrapper, grid):
    video = facts_of(*grid)
    settings, config = dataclasses.replace(policy.settings, video_wrapper=wrapper), policy.core.config
    inputs = encode_prompt(policy.tokenizer, QUESTION, video, config, settings)
    types = 2 * (inputs.ids == config.video_token_id).int()
    theirs, shift = policy.core.model.get_rope_index(
        inputs.ids[None], types[None], video_grid_thw=torch.tensor([grid])
    )  # fmt: skip
    assert torch.equal(inputs.positions, theirs[:, 0])
    assert inputs.next_position == inputs.length + int(shift)
    assert int(inputs.is_video.sum()) == grid[0] * grid[1] * grid[2] // 4


def librarys_text(tokenizer, num_frames, fps, grid, wrapper):
    """What Qwen3VLProcessor puts in place of the chat template's video, from its own methods."""
    from types import SimpleNamespace

    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=num_frames, fps=fps, frames_indices=list(range(num_frames)))
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>", video_token="<|video_pad|>",
        _calculate_timestamps=lambda *inputs: Qwen3VLProcessor._calculate_timestamps(None, *inputs),
    )  # fmt: skip
    inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
    written = Qwen3VLProcessor.replace_video_token(processor, inputs, 0)
    message = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "video"}]}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    place = "<|video_pad|>" if wrapper is VideoWrapper.outer else "<|vision_start|><|video_pad|><|vision_end|>"
    return text.replace(place, written)


@pytest.mark.parametrize("wrapper", VideoWrapper)
@pytest.mark.parametrize(("num_frames", "fps"), [(1, 2.0), (2, 2.0), (5, 1.3), (8, 23.976), (61, 1.7), (768, 2.0)])
def test_ids_are_those_of_the_librarys_processor(policy, wrapper, num_frames, fps):
    """An odd number of frames too: then the last one counts twice, in the stamp as well."""
    clip = dataclasses.replace(clip_of(num_frames, 32, 64), times=tuple(i / fps for i in range(num_frames)))
    facts = clip_patches(clip, PATCH_FORM)
    assert facts.grid_thw == ((num_frames + 1) // 2, 2, 4)
    video = VideoFeatures(torch.empty(0), facts.grid_thw, 1.0, clip.duration, stamps=facts.stamps)
    settings = dataclasses.replace(policy.settings, video_wrapper=wrapper)
    inputs = encode_prompt(policy.tokenizer, QUESTION, video, policy.core.config, settings)
    expected = librarys_text(policy.tokenizer, num_frames, fps, facts.grid_thw, wrapper)
    assert inputs.ids.tolist() == policy.tokenizer.encode(expected, add_special_tokens=False)


def test_the_outer_wrapper_is_two_tokens_and_two_positions_more(policy, facts_of):
    video = facts_of(3, 4, 4)
    lengths = []
    for wrapper in VideoWrapper:
        settings = dataclasses.replace(policy.settings, video_wrapper=wrapper)
        inputs = encode_prompt(policy.tokenizer, QUESTION, video, policy.core.config, settings)
        lengths.append((inputs.length, inputs.next_position))
    assert lengths[1] == (lengths[0][0] + 2, lengths[0][1] + 2)


def test_a_stamp_is_the_mean_of_a_steps_first_and_last_frame():
    clip = dataclasses.replace(clip_of(4), times=(0.0, 0.6, 12.04, 12.0599))
    assert clip_patches(clip, PATCH_FORM).stamps == pytest.approx((0.3, 12.04995))


def test_patches_equal_the_librarys_video_processor():
    """Where torchvision exists, which the library's video processor needs; we do not."""
    pytest.importorskip("torchvision")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    clip = clip_of(5)
    processor = Qwen3VLVideoProcessor(do_sample_frames=False, do_resize=False, cap_pixels_per_frame=False)
    theirs = processor(torch.from_numpy(clip.frames.transpose(0, 3, 1, 2).copy()), return_tensors="pt")
    ours = clip_patches(clip, PATCH_FORM)
    assert theirs["video_grid_thw"].tolist() == [list(ours.grid_thw)] == [[3, 4, 6]]
    assert torch.equal(ours.patches, theirs["pixel_values_videos"])


def test_patches_are_those_that_its_processor_made():
    """A hash of what Qwen3VLVideoProcessor (transformers 5.23, torchvision 0.28) gave for five frames of a pattern."""
    frames = (np.arange(6 * 64 * 96 * 3) * 7919 % 256).astype(np.uint8).reshape(6, 64, 96, 3)[:5]
    patches = clip_patches(Clip(frames, tuple(i / 2 for i in range(5)), 2.5), PATCH_FORM).patches
    assert patches.shape == (72, 1536)
    found = hashlib.sha256(patches.numpy().tobytes()).hexdigest()
    assert found == "a453fd6e40ce8b7cbbf329010f9a9b8314d8965222bb78cb2be83a46f520397a"


def test_sides_are_multiples_of_32_within_the_budget():
    frames = FramesConfig(min_pixels=16 * 1024, max_pixels=768 * 1024, total_pixels=3584 * 1024)
    for height, width, count in ((480, 640, 8), (1080, 1920, 60), (240, 320, 400), (50, 60, 16)):
        high, wide = target_size(height, width, count, frames, PATCH_FORM.side)
        assert high % 32 == wide % 32 == 0
        assert high * wide <= max(min(frames.max_pixels, frames.total_pixels * 2 // count), frames.min_pixels * 1.05)


# --- log-probabilities


def test_logps_are_those_of_the_librarys_own_pass(policy, item, rollouts):
    """It gets the features and finds positions, DeepStack places and masks by itself."""
    config, video = policy.core.config, item.video
    outputs = BaseModelOutputWithDeepstackFeatures(
        pooler_output=[video.embeddings], deepstack_features=[[level] for level in video.deepstack]
    )
    assert len(video.deepstack) == 3
    for completion in rollouts:
        ids = torch.cat([item.inputs.ids, torch.tensor(completion.token_ids)])[None]
        with torch.no_grad():
            logits = policy.core(
                input_ids=ids, mm_encoder_outputs={"video": outputs}, video_grid_thw=torch.tensor([video.grid_thw]),
                mm_token_type_ids=2 * (ids == config.video_token_id).int(), use_cache=False,
            ).logits[0, item.inputs.length - 1 : -1]  # fmt: skip
            logits[:, policy.banned] = -torch.inf
            theirs = logits.log_softmax(-1).gather(-1, ids[0, item.inputs.length :, None])[:, 0]
            ours = policy.logps(item, token_batch([completion], policy.device))[0]
        assert (ours - theirs).abs().max() <= 1e-5
        assert (torch.tensor(completion.logps) - theirs).abs().max() <= 1e-5, "as recorded while sampling"


def step(settings, policy, item, rollouts, way):
    """Log-probabilities and gradient of a group of unequal lengths."""
    policy.settings = dataclasses.replace(settings, **WAYS[way])
    policy.zero_grad()
    tokens = token_batch(rollouts, policy.device)
    logps = policy.logps(item, tokens)
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    (logps * weights).sum().backward()
    policy.settings = settings
    return logps.detach(), torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad])


def test_all_ways_agree_in_logps_and_gradients(settings, policy, item, rollouts):
    logps, grads = step(settings, policy, item, rollouts, "naive")
    assert grads.norm() > 0
    for way in ("shared", "packed"):
        ours, gradient = step(settings, policy, item, rollouts, way)
        assert (ours - logps).abs().max() <= 1e-5, way
        assert (gradient - grads).norm() <= 1e-5 * grads.norm(), way


def test_every_deepstack_feature_counts_in_every_way(settings, policy, item, rollouts):
    """Without one of them the numbers are others: none of the ways leaves it out."""
    for way in WAYS:
        policy.settings = dataclasses.replace(settings, **WAYS[way])
        with torch.no_grad():
            whole = policy.logps(item, token_batch(rollouts, policy.device))
            for level in range(3):
                deepstack = tuple(x * (i != level) for i, x in enumerate(item.video.deepstack))
                changed = dataclasses.replace(item, video=dataclasses.replace(item.video, deepstack=deepstack))
                other = policy.logps(changed, token_batch(rollouts, policy.device))
                assert (other - whole).abs().max() > 1e-4, (way, level)
    policy.settings = settings


def test_prompts_of_unequal_length_are_sampled_together_as_alone(policy):
    items = [prepared(policy, clip_of(n), text) for n, text in ((4, "a"), (9, QUESTION), (2, "where"))]
    limits = SamplingConfig(max_new_tokens=10)
    together = policy.sample(items, 2, limits, [1, 2, 3])
    for seed, (item, group) in enumerate(zip(items, together, strict=True), start=1):
        (alone,) = policy.sample([item], 2, limits, [seed])
        assert [c.token_ids for c in alone] == [c.token_ids for c in group]
        tokens = token_batch(group, policy.device)
        assert (policy.logps(item, tokens) - tokens.logps)[tokens.mask].abs().max() <= 1e-5


def test_a_trained_tower_gets_gradient_through_all_features(base, rollouts):
    settings = PolicyConfig(name="t", path=str(base), frames=FRAMES, lora=LoraConfig(rank=4, vision=True))
    policy = Policy(settings, seed=1)
    item = prepared(policy, clip_of(4))
    assert item.video.patches is not None
    tower = [n for n, p in policy.model.named_parameters() if p.requires_grad and "visual" in n]
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in tower} == {"qkv", "proj", "linear_fc1", "linear_fc2"}
    policy.logps(item, token_batch(rollouts, policy.device)).sum().backward()
    grads = {n: p.grad for n, p in policy.model.named_parameters() if "visual" in n and "lora_B" in n}
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())


# --- caches


def test_the_tower_runs_once_per_video(policy, prompts, rollouts, tmp_path):
    calls = []
    hook = policy.core.model.visual.register_forward_hook(lambda *_: calls.append(1))
    items = [policy.prepare(prompt) for prompt in prompts]
    for item in [*items, *(policy.prepare(prompt) for prompt in prompts)]:
        policy.logps(item, token_batch(rollouts, policy.device))
        policy.logps(item, token_batch(rollouts, policy.device))
    hook.remove()
    assert len(calls) == len({prompt.sample.video for prompt in prompts})
    assert items[0].video.stamps == tuple(0.25 + i for i in range(items[0].video.grid_thw[0]))
    assert items[0].video.grid_thw[1:] == (4, 4), "the reader gave 64 x 64 pixels"


def test_caches_hold_all_features_and_count_them(policy, item, tmp_path):
    video = item.video
    assert video.size == 4 * video.embeddings.numel() * 4, "four tensors of float32"
    ram = FeatureCache(video.size / 2**30)
    ram.put("a", video)
    assert ram.size == video.size and torch.equal(ram.get("a").deepstack[2], video.deepstack[2])
    small = FeatureCache((video.size - 1) / 2**30)
    small.put("a", video)
    assert "a" not in small
    disk = DiskCache(tmp_path, 1.0, "tower")
    disk.put("a", video)
    known = disk.get("a")
    assert (known.stamps, known.grid_thw, known.duration) == (video.stamps, video.grid_thw, video.duration)
    assert all(torch.equal(a, b) for a, b in zip(known.deepstack, video.deepstack, strict=True))
    content = next(tmp_path.iterdir())
    content.write_bytes(content.read_bytes().replace(b"deepstack.00", b"deepstack.03"))
    assert disk.get("a") is None, "another order"


# --- the control that only this family allows


def test_shifted_stamps_change_the_text_of_the_prompt_and_nothing_else(policy, item):
    shifted = with_shifted_stamps(policy, item, 5.0)
    before, after = (policy.tokenizer.decode(x.inputs.ids) for x in (item, shifted))
    assert "<0.2 seconds>" in before and "<4.2 seconds>" in before
    assert "<5.2 seconds>" in after and "<9.2 seconds>" in after and "<0.2 seconds>" not in after
    assert torch.equal(shifted.video.embeddings, item.video.embeddings) and shifted.prompt is item.prompt
    assert torch.equal(shifted.inputs.positions, item.inputs.positions), "all stamps have one digit before the point"


def test_shuffled_frames_take_all_their_features_along(item):
    order = torch.tensor([1, 0, 2, 4, 3])
    moved = in_order(item.video, order)
    for before, after in zip(
        (item.video.embeddings, *item.video.deepstack), (moved.embeddings, *moved.deepstack), strict=True
    ):
        assert torch.equal(after.unflatten(0, (5, -1)), before.unflatten(0, (5, -1))[order])
    assert moved.stamps == item.video.stamps


# --- refusals


def test_settings_and_templates_that_make_no_sense_are_refused(untrained_base, policy):
    with pytest.raises(SettingError, match=r"policy\.video_wrapper=outer: Qwen2\.5-VL"):
        Policy(PolicyConfig(name="t", path=str(untrained_base), video_wrapper=VideoWrapper.outer))
    bare = policy.tokenizer.__class__.from_pretrained(policy.settings.path)
    bare.chat_template = "<|video_pad|>"
    with pytest.raises(ValueError, match="vision_start"):
        prompt_text(bare, "x", (0.0,), VideoWrapper.inner)
