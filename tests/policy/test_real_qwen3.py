"""The released Qwen3-VL models: their shapes without memory, and their checkpoint format on a shrunken one.

The 8B's parameter count is that of the released index (17,534,247,392 bytes of bf16); those of 2B and 4B are what
public repositories print for the loaded models.
"""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from helpers.released import QWEN3, TOKENIZER_3, add_tokenizer, released_qwen3_config
from test_real_models import composed, count, write_checkpoint
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from experiments.tiny_base import model as tiny
from tartvg.config import FramesConfig, LoraCompute, LoraConfig, PolicyConfig, Precision, VideoWrapper
from tartvg.memory.footprint import model_config
from tartvg.policy.families.qwen3_vl import FAMILY, PATCH_FORM, encode_prompt
from tartvg.policy.features import VideoFeatures
from tartvg.policy.loading import load_base, new_adapter
from tartvg.policy.patches import MERGE, TEMPORAL_PATCH

COUNTS = {
    "qwen3_vl_2b": dict(all=2_127_532_032, lora=17_432_576, cache=114_688),
    "qwen3_vl_4b": dict(all=4_437_815_808, lora=33_030_144, cache=147_456),
    "qwen3_vl_8b": dict(all=8_767_123_696, lora=43_646_976, cache=147_456),
}
TEXT = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, rope_scaling={"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
)  # fmt: skip
VISION = dict(
    depth=4, hidden_size=32, intermediate_size=48, num_heads=2, num_position_embeddings=16,
    deepstack_visual_indexes=[0, 1, 2],
)  # fmt: skip


@pytest.mark.parametrize("name", QWEN3)
def test_the_released_shapes_have_the_published_numbers_of_parameters(name):
    config = Qwen3VLConfig(**released_qwen3_config(*QWEN3[name]))
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    assert count(model.parameters()) == COUNTS[name]["all"]
    text, vision = model.config.text_config, model.config.vision_config
    assert text.rope_parameters["mrope_section"] == [24, 20, 20] and text.rope_parameters["rope_theta"] == 5e6
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (16, MERGE, TEMPORAL_PATCH)
    assert text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * 2 == COUNTS[name]["cache"]
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == QWEN3[name][2]
    with torch.device("meta"):
        adapted = new_adapter(model.requires_grad_(False), composed(name).policy.lora, seed=0)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert count(trained.values()) == COUNTS[name]["lora"]
    assert len({n.split(".lora_")[0] for n in trained}) == 7 * text.num_hidden_layers
    assert not any("visual" in n for n in trained)


@pytest.mark.parametrize("name", QWEN3)
def test_the_plan_knows_the_released_shapes(name):
    """Without the files: what the family says of them is what their config.json says."""
    ours, theirs = model_config(composed(name).policy), Qwen3VLConfig(**released_qwen3_config(*QWEN3[name]))
    for part in ("text_config", "vision_config"):
        a, b = (getattr(config, part).to_dict() for config in (ours, theirs))
        ignored = {"dtype", "bos_token_id", "eos_token_id", "transformers_version", "architectures"}
        assert {k: v for k, v in a.items() if k not in ignored} == {k: v for k, v in b.items() if k not in ignored}
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def shrunken(is_tied):
    """Random bf16 weights under the names of the released files, config.json as released, a tokenizer."""
    tokenizer = tiny.build_tokenizer(["find the red circle 0123456789 <1.0 seconds>"] * 3)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in tiny.SPECIAL_TOKENS}
    config = released_qwen3_config({**TEXT, "vocab_size": len(tokenizer)}, VISION, is_tied)
    config |= {f"vision_{end}_token_id": ids[f"<|vision_{end}|>"] for end in ("start", "end")}
    config |= {f"{kind}_token_id": ids[f"<|{kind}_pad|>"] for kind in ("image", "video")}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)).to(torch.bfloat16)
    weights = {n: w.clone() for n, w in model.state_dict().items() if not (is_tied and n == "lm_head.weight")}
    return weights, config, tokenizer


def settings(folder, precision=Precision.bf16):
    frames = FramesConfig(min_frames=4, max_frames=8, min_pixels=4096, max_pixels=4096)
    return PolicyConfig(name="s", path=str(folder), precision=precision, frames=frames, lora=LoraConfig(rank=4))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_sharded_checkpoint_in_the_released_layout_is_read_exactly(tmp_path, is_tied):
    weights, config, tokenizer = shrunken(is_tied)
    assert {
        "model.visual.patch_embed.proj.bias", "model.visual.pos_embed.weight",
        "model.visual.deepstack_merger_list.2.linear_fc1.weight", "model.visual.merger.norm.weight",
        "model.language_model.embed_tokens.weight", "model.language_model.layers.0.self_attn.q_norm.weight",
    } <= weights.keys()  # fmt: skip
    assert ("lm_head.weight" in weights) is not is_tied
    model, _ = load_base(settings(write_checkpoint(tmp_path / "c", weights, config, tokenizer)))
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == is_tied
    assert model.config.text_config.rope_parameters["rope_theta"] == 5e6


REFUSED = {
    "a missing DeepStack merger": (
        lambda w: w.pop("model.visual.deepstack_merger_list.1.norm.weight"), r"missing keys.*deepstack_merger_list\.1",
    ),
    "a missing norm of the queries": (
        lambda w: w.pop("model.language_model.layers.3.self_attn.q_norm.weight"), r"missing keys.*layers\.3.*q_norm",
    ),
    "a bias that the family has not": (
        lambda w: w.update({"model.language_model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        r"unexpected keys.*q_proj\.bias",
    ),
    "another position table": (
        lambda w: w.update({"model.visual.pos_embed.weight": torch.ones(4, 32)}), r"mismatched keys.*pos_embed.*4, 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, case):
    spoil, message = REFUSED[case]
    weights, config, tokenizer = shrunken(True)
    spoil(weights)
    folder = write_checkpoint(tmp_path / "c", weights, config, tokenizer)
    with pytest.raises(ValueError, match=message) as caught:
        load_base(settings(folder))
    assert f"policy.path={folder}" in str(caught.value)


def test_an_adapter_of_the_other_family_is_refused(tmp_path, untrained_base):
    from tartvg.policy.loading import check_adapter, save_adapter
    from tartvg.policy.policy import Policy

    save_adapter(Policy(settings(untrained_base, Precision.fp32)).model, tmp_path / "adapter", "base")
    folder = write_checkpoint(tmp_path / "c", *shrunken(True))
    with pytest.raises(ValueError, match="adapter_model"):
        check_adapter(settings(folder), tmp_path / "adapter", "init_adapter")


@pytest.mark.slow
def test_the_real_tokenizer_writes_a_stamp_together_with_what_stands_before_it(tmp_path):
    """`?<` is one token: a prompt that is encoded in parts would have two, and other positions after them."""
    from transformers import AutoTokenizer

    try:
        add_tokenizer(tmp_path, TOKENIZER_3)
    except OSError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    video = VideoFeatures(torch.empty(0), (2, 2, 4), 1.0, 2.0, stamps=(0.25, 1234.56))
    config = Qwen3VLConfig(**released_qwen3_config(*QWEN3["qwen3_vl_2b"]))
    found = {}
    for wrapper in VideoWrapper:
        settings = PolicyConfig(name="t", path="p", video_wrapper=wrapper)
        inputs = encode_prompt(tokenizer, "When is it?", video, config, settings)
        assert inputs.ids[inputs.is_video].tolist() == 4 * [config.video_token_id] == 4 * [151656]
        found[wrapper] = tokenizer.convert_ids_to_tokens(inputs.ids)
    start, end = ["<|vision_start|>"], ["<|video_pad|>", "<|video_pad|>", "<|vision_end|>"]
    second = ["<", *"1234", ".", "6", "Ġseconds", ">", *start, *end]
    inner = ["?<", "0", ".", "2", "Ġseconds", ">", *start, *end, *second]
    outer = ["?", *start, "<", *inner[1:], "<|vision_end|>"]
    for wrapper, expected in ((VideoWrapper.inner, inner), (VideoWrapper.outer, outer)):
        tokens = found[wrapper]
        begin = tokens.index(expected[0])
        assert tokens[begin : begin + len(expected)] == expected
        assert tokens[begin + len(expected)] == "<|im_end|>"
    assert len(second) - 2 <= FAMILY.step_tokens


def published_video_settings():
    """Class attributes of transformers' video processor, read from its source: importing needs torchvision."""
    source = Path(transformers.__file__).parent / "models/qwen3_vl/video_processing_qwen3_vl.py"
    body = next(n for n in ast.parse(source.read_text()).body if getattr(n, "name", None) == "Qwen3VLVideoProcessor")
    return {n.targets[0].id: ast.unparse(n.value) for n in body.body if isinstance(n, ast.Assign)}


def test_the_settings_are_those_of_the_published_preprocessing():
    published = published_video_settings()
    frames = composed("qwen3_vl_8b").policy.frames
    side = int(published["patch_size"]) * int(published["merge_size"])
    assert side == PATCH_FORM.side == 32 and int(published["temporal_patch_size"]) == TEMPORAL_PATCH
    assert (published["image_mean"], published["image_std"]) == ("IMAGENET_STANDARD_MEAN", "IMAGENET_STANDARD_STD")
    from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

    for ours, theirs in ((PATCH_FORM.mean, IMAGENET_STANDARD_MEAN), (PATCH_FORM.std, IMAGENET_STANDARD_STD)):
        assert ours == tuple(255 * value for value in theirs) and PATCH_FORM.white == 1
    assert (frames.min_frames, frames.max_frames) == (int(published["min_frames"]), int(published["max_frames"]))
    assert frames.fps == int(published["fps"]) == 2
    assert frames.max_pixels == int(published["max_video_tokens"]) * side**2
    # tighter than released (longest_edge 25,165,824 is twice total_pixels), as in the paper's relatives
    assert (frames.min_pixels, frames.total_pixels) == (16 * side**2, 3584 * side**2)
    for name in QWEN3:
        policy = composed(name).policy
        assert policy.frames == frames and policy.path == f"Qwen/Qwen3-VL-{name[-2:].upper()}-Instruct"
        assert policy.path in FAMILY.published and policy.precision is Precision.bf16
        assert dataclasses.astuple(policy.lora) == (16, 32, 0.0, LoraCompute.native, False)
