"""Base plus adapter as one folder: the sum rounded once, the base's own files and names, read by the plain library."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bases import untrained_qwen3
from helpers.videos import write_usual
from peft import PeftModel
from policy.test_real_models import original_weights, settings, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from tartvg.config import AnchorsConfig, FramesConfig, Precision, SamplingConfig, SettingError, VideoWrapper
from tartvg.data.video import read_clip, target_size
from tartvg.policy.families import qwen2_5_vl, qwen3_vl
from tartvg.policy.families.family import family_of
from tartvg.policy.inputs import clip_patches
from tartvg.policy.loading import load_base, new_adapter, save_adapter
from tartvg.policy.merging import merge, model_name, with_type, write_usage
from tartvg.policy.model_files import INDEX
from tartvg.policy.policy import Policy
from tartvg.prompts import build_prompt
from tartvg.types import GroundingSample


def trained_adapter(where: Path, policy, *, seed: int = 1) -> Path:
    """An adapter on that base whose update is no longer zero."""
    model, _ = load_base(policy)
    adapted = new_adapter(model, policy.lora, seed=0)
    torch.manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.05)
    save_adapter(adapted, where, "base")
    return where


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w for file in sorted(folder.glob("*.safetensors")) for name, w in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_released_base_keeps_its_files_and_names_and_is_rounded_once(tmp_path, tied):
    """Each weight by hand: W + alpha / r * B A in fp32, to bf16 at the end."""
    weights, config, tokenizer = original_weights(tied)
    policy = settings(write_checkpoint(tmp_path / "base", weights, config, tokenizer))
    adapter, target = trained_adapter(tmp_path / "adapter", policy), tmp_path / "merged"
    merge(policy, adapter, target)

    names = {p.name for p in (tmp_path / "base").glob("model*")}
    assert {p.name for p in target.glob("model*")} == names and len(names) == 4
    index = [json.loads((folder / INDEX).read_text()) for folder in (tmp_path / "base", target)]
    assert index[0] == index[1]
    merged, update = read(target), load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == weights.keys()
    changed = 0
    for name, weight in weights.items():
        stem = "base_model.model." + model_name(name).removesuffix(".weight")
        expected = weight.float()
        if f"{stem}.lora_A.weight" in update:
            expected = expected + 8 / 4 * update[f"{stem}.lora_B.weight"] @ update[f"{stem}.lora_A.weight"]
            changed += 1
        assert torch.equal(merged[name], expected.to(torch.bfloat16)), name
        assert merged[name].dtype == torch.bfloat16
    assert changed == 7 * 3

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    load_base(replace(policy, path=str(target)))  # our own checks of a base


def test_in_fp32_the_merged_model_says_what_base_and_adapter_say(tmp_path):
    policy = settings(write_checkpoint(tmp_path / "base", *original_weights(tied=True)), Precision.fp32)
    adapter = trained_adapter(tmp_path / "adapter", policy)
    merge(policy, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["torch_dtype"] == "float32"
    ids = torch.tensor([[3, 5, 8, 13, 21]])
    model, _ = load_base(policy)
    before = model(input_ids=ids).logits
    expected = PeftModel.from_pretrained(model, str(adapter))(input_ids=ids).logits
    said = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype="auto")(input_ids=ids).logits
    assert torch.allclose(said, expected, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2, "the adapter changes something"


def test_an_adapter_of_a_tied_head_is_refused(tmp_path):
    policy = settings(write_checkpoint(tmp_path / "base", *original_weights(tied=True)))
    adapter = trained_adapter(tmp_path / "adapter", policy)
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, file)
    with pytest.raises(SettingError, match=r"lm_head\.lora_A.*one matrix"):
        merge(policy, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_types_are_named_at_every_depth():
    config = {"torch_dtype": "bfloat16", "a": {"dtype": "bfloat16", "b": 1}, "dtypes": "x"}
    assert with_type(config, "float32") == {"torch_dtype": "float32", "a": {"dtype": "float32", "b": 1}, "dtypes": "x"}


def test_usage_is_greedy_and_keeps_what_training_forbids_and_what_the_base_says(tmp_path):
    weights, config, tokenizer = original_weights(tied=True)
    base = write_checkpoint(tmp_path / "base", weights, config | {"vocab_size": config["vocab_size"] + 3}, tokenizer)
    policy = settings(base)
    (base / "generation_config.json").write_text('{"repetition_penalty": 1.05, "do_sample": true}')
    (base / "preprocessor_config.json").write_text('{"min_pixels": 1, "of_the_base": 7}')
    target = tmp_path / "merged"
    target.mkdir()
    (target / "config.json").write_text((base / "config.json").read_text())
    prompt = write_usage(tokenizer, policy, target, AnchorsConfig(), 40)
    assert '"{query}"' in prompt and json.loads((target / "grounding.json").read_text())["prompt"] == prompt
    found = GenerationConfig.from_pretrained(target)
    assert (found.do_sample, found.max_new_tokens) == (False, 40) and found.repetition_penalty in (None, 1.0)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("im_end", "endoftext", "video_pad")}
    assert found.eos_token_id == [ids["im_end"], ids["endoftext"]]
    rows = range(len(tokenizer), len(tokenizer) + 3)
    assert ids["video_pad"] in found.suppress_tokens and set(rows) <= set(found.suppress_tokens)
    assert ids["im_end"] not in found.suppress_tokens
    images = json.loads((target / "preprocessor_config.json").read_text())
    assert (images["min_pixels"], images["of_the_base"]) == (3136, 7)
    videos = json.loads((target / "video_preprocessor_config.json").read_text())
    assert (videos["max_frames"], videos["max_video_tokens"]) == (8, round(2809856 / 784 / 0.9))


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "qwen3_vl outer"])
def exported(tmp_path, request):
    """A released base in fp32 with an adapter, its merged folder and the names of the folder's script."""
    family, *wrapper = request.param.split()
    if family == "qwen2_5_vl":
        base = write_checkpoint(tmp_path / "base", *original_weights(tied=True))
    else:
        base = untrained_qwen3(tmp_path / "base")
    policy = settings(base, Precision.fp32)
    policy.video_wrapper = VideoWrapper(*wrapper or ["inner"])
    side = family_of(family).patch_form.side
    policy.frames = FramesConfig(
        fps=3.0, min_frames=4, max_frames=10, min_pixels=4 * side**2, max_pixels=12 * side**2
    )  # fmt: skip
    adapter = trained_adapter(tmp_path / "adapter", policy)
    merge(policy, adapter, tmp_path / "merged")
    _, tokenizer = load_base(policy)
    write_usage(tokenizer, policy, tmp_path / "merged", AnchorsConfig(), 24)
    return policy, adapter, runpy.run_path(str(tmp_path / "merged/answer.py"), run_name="elsewhere")


def test_the_script_of_a_merged_folder_sees_and_says_what_the_policy_does(exported, tmp_path):
    settings, adapter, script = exported
    video = write_usual(tmp_path)
    policy = Policy(settings, adapter).eval()
    form = policy.family.patch_form
    clip = read_clip(video, settings.frames, form.side)
    frames, times, seconds = script["read"](video)
    assert np.array_equal(frames, clip.frames) and seconds == pytest.approx(clip.seconds_per_grid, abs=1e-12)
    ours = clip_patches(clip, form)
    theirs, same_grid = script["patches_of"](frames)
    assert torch.equal(ours.patches, theirs) and ours.grid_thw == same_grid
    assert times == pytest.approx(ours.stamps, abs=1e-9)

    query = "  the red <|im_end|> circle . "
    prompt = build_prompt(GroundingSample("a", video, query, (), clip.duration, "test"), AnchorsConfig())
    limits = SamplingConfig(temperature=0.0, max_new_tokens=24)
    said = policy.sample([policy.prepare(prompt, clip)], 1, limits, [0])[0][0].text
    assert script["answer"](*script["load"](), video, query) == said and len(said) > 10


def test_the_scripts_positions_are_those_of_training(exported):
    _, _, script = exported
    text, after = [False] * 7, [False] * 5
    for grid in ((1, 2, 2), (30, 4, 6), (2, 20, 8)):
        step = [True] * (grid[1] * grid[2] // 4)
        once = text + step * grid[0] + after
        expected = qwen2_5_vl.prompt_positions(7, 5, grid, 1.3, 2.0)
        assert torch.equal(script["positions_of"](once, grid, 2.6)[:, 0], expected)
        apart = text + [is_video for _ in range(grid[0]) for is_video in [False, *step]] + after
        expected = qwen3_vl.prompt_positions(torch.tensor(apart), grid)
        assert torch.equal(script["positions_of"](apart, grid, 0.0)[:, 0], expected)


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (28, 28), (30, 700), (480, 640), (700, 31)])
def test_the_script_resizes_as_training_does(exported, height, width):
    settings, _, script = exported
    for count in (2, 4, 10):
        expected = target_size(height, width, count, settings.frames, script["SIDE"])
        assert script["size_of"](height, width, count) == expected
