"""The real 3B and 7B: their architecture on the meta device, their checkpoint format in miniature, their settings."""

import ast
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.released import WIDTHS, original_name, released_config
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from experiments.tiny_base import model as tiny
from tartvg.config import (
    FramesConfig,
    LoraCompute,
    LoraConfig,
    PolicyConfig,
    Precision,
    SamplingConfig,
    register,
    to_dataclasses,
)
from tartvg.data.video import FACTOR, Clip
from tartvg.policy.families.qwen2_5_vl import PATCH_FORM
from tartvg.policy.loading import load_base, new_adapter
from tartvg.policy.patches import MERGE, TEMPORAL_PATCH
from tartvg.policy.policy import Policy, token_batch
from tartvg.types import GroundingSample, Prompt, Span

CONF = Path(__file__).resolve().parents[2] / "conf"
MODELS = ["qwen2_5_vl_3b", "qwen2_5_vl_7b"]
SHRUNKEN = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
TINY_VISION = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, fullatt_block_indexes=[1])
COUNTS = {
    "qwen2_5_vl_3b": dict(all=3_754_622_976, vision=668_684_288, lora=29_933_568, cache=36_864),
    "qwen2_5_vl_7b": dict(all=8_292_166_656, vision=676_550_144, lora=40_370_176, cache=57_344),
}


def composed(name: str):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_dataclasses(compose("config", overrides=[f"policy={name}"]))


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


# --- architecture


@pytest.fixture(scope="module", params=MODELS)
def on_meta(request):
    """The real architecture without its memory."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(**released_config(WIDTHS[request.param], [16, 24, 24]))
        )
    return request.param, model


def test_the_architecture_has_the_published_number_of_parameters(on_meta):
    name, model = on_meta
    assert count(model.parameters()) == COUNTS[name]["all"]
    assert count(model.model.visual.parameters()) == COUNTS[name]["vision"]
    text, vision = model.config.text_config, model.config.vision_config
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert text.rope_parameters["mrope_section"] == [16, 24, 24] and text.rope_parameters["rope_theta"] == 1e6
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (
        PATCH_FORM.size,
        MERGE,
        TEMPORAL_PATCH,
    )
    assert vision.tokens_per_second == 2
    head = text.hidden_size // text.num_attention_heads
    assert text.num_hidden_layers * text.num_key_value_heads * head * 2 * 2 == COUNTS[name]["cache"]


def test_lora_reaches_every_linear_layer_of_the_language_model_and_no_other(on_meta):
    name, model = on_meta
    linear = {n for n, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    model.requires_grad_(False)
    with torch.device("meta"):
        adapted = new_adapter(model, composed(name).policy.lora, seed=0)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert count(trained.values()) == COUNTS[name]["lora"]
    layers = {n.split("language_model.")[1].split(".lora_")[0] for n in trained}
    assert layers == linear and len(layers) == 7 * WIDTHS[name]["num_hidden_layers"]
    assert all(".lora_" in n and "visual" not in n for n in trained)
    adapted.unload()


# --- checkpoint


def original_weights(tied: bool) -> tuple[dict[str, Tensor], dict, transformers.PreTrainedTokenizerFast]:
    """Random bf16 weights of a shrunken model under the names of the released files, its config and its tokenizer."""
    tokenizer = tiny.build_tokenizer(["find the red circle 0123456789"] * 3)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in tiny.SPECIAL_TOKENS}
    config = released_config(
        {**SHRUNKEN, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}, [2, 3, 3], TINY_VISION
    )
    names = dict(vision_start="start", vision_end="end")
    config |= {f"{k}_token_id": ids[f"<|vision_{v}|>"] for k, v in names.items()}
    config |= {f"{k}_token_id": ids[f"<|{k}_pad|>"] for k in ("image", "video")}
    config |= {"vision_token_id": ids["<|vision_pad|>"], "bos_token_id": 0, "eos_token_id": ids["<|im_end|>"]}
    torch.manual_seed(0)
    state = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).to(torch.bfloat16).state_dict()
    weights = {}
    for name, weight in state.items():
        if not (tied and name == "lm_head.weight"):
            weights[original_name(name)] = weight.clone()
    return weights, config, tokenizer


def write_checkpoint(folder: Path, weights: dict[str, Tensor], config: dict, tokenizer, num_shards: int = 3) -> Path:
    """Shards and their index as in the release."""
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    places = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[shard::num_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def settings(folder: Path, precision: Precision = Precision.bf16) -> PolicyConfig:
    frames = FramesConfig(min_frames=4, max_frames=8, min_pixels=3136, max_pixels=3136)
    return PolicyConfig(
        name="shrunken", path=str(folder), precision=precision, frames=frames, lora=LoraConfig(rank=4, alpha=8)
    )


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_checkpoint_with_the_original_names_is_read_exactly(tmp_path, tied, precision):
    weights, config, tokenizer = original_weights(tied)
    assert ("lm_head.weight" in weights) is not tied
    assert {name.split(".")[0] for name in weights} <= {"visual", "model", "lm_head"}
    assert {
        "visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight",
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight",
    } <= weights.keys()  # fmt: skip
    model, _ = load_base(settings(write_checkpoint(tmp_path / "c", weights, config, tokenizer), precision))
    expected = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    loaded = {original_name(n): p for n, p in model.named_parameters()}
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded[name].dtype == expected
        assert torch.equal(loaded[name].to(torch.bfloat16), weight), name
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    # the rotary frequencies are no weights: they are made anew, in fp32 whatever the precision
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_released_checkpoint_becomes_a_policy_in_bf16(tmp_path, tied):
    policy = Policy(settings(write_checkpoint(tmp_path / "c", *original_weights(tied))))
    base, adapter = [], []
    for name, parameter in policy.model.named_parameters():
        (adapter if ".lora_" in name else base).append(parameter)
        assert not (".lora_" in name and "visual" in name)
    assert {(p.dtype, p.requires_grad) for p in base} == {(torch.bfloat16, False)}
    assert {(p.dtype, p.requires_grad) for p in adapter} == {(torch.float32, True)}
    frames = np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3)).astype(np.uint8)
    sample = GroundingSample("a", Path("absent.mp4"), "find it", (Span(0, 1),), 2.0, "train")
    prepared = policy.prepare(Prompt(sample, "find it"), Clip(frames, (0.0, 0.5, 1.0, 1.5), 2.0))
    assert prepared.video.embeddings.dtype == torch.bfloat16
    group = policy.sample([prepared], 3, SamplingConfig(max_new_tokens=6), [0])[0]
    batch = token_batch(group, policy.device)
    logps = policy.logps(prepared, batch)
    assert torch.allclose(logps.detach(), batch.logps, atol=0.05)  # bf16 has 8 bits: 0.4 % of |logp| of about 6
    logps.sum().backward()
    assert all(p.grad is None for p in base)
    assert any(p.grad is not None and p.grad.norm() > 0 for p in adapter)


QUERY = "model.layers.1.self_attn.q_proj.weight"
TOWER = "visual.blocks.1.mlp.gate_proj.weight"
REFUSED: dict[str, tuple[bool, Callable[[dict[str, Tensor]], object], str]] = {
    "a missing weight of the language model": (True, lambda w: w.pop(QUERY), r"missing keys.*layers\.1\.self_attn\.q_"),
    "a missing weight of the tower": (True, lambda w: w.pop(TOWER), r"missing keys.*visual\.blocks\.1\.mlp\.gate_proj"),
    "a missing bias": (False, lambda w: w.pop(QUERY.replace("weight", "bias")), r"missing keys.*q_proj\.bias"),
    "no embedding": (True, lambda w: w.pop("model.embed_tokens.weight"), r"missing keys.*embed_tokens"),
    "no head": (False, lambda w: w.pop("lm_head.weight"), r"missing keys.*lm_head\.weight"),
    "one layer too many": (
        True, lambda w: w.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
        r"unexpected keys.*layers\.3\.mlp\.up_proj",
    ),
    "a foreign tower weight": (
        False, lambda w: w.update({"visual.pos_embed.weight": torch.ones(2)}), r"unexpected keys.*visual\.pos_embed",
    ),
    "another shape": (True, lambda w: w.update({QUERY: w[QUERY][:, :32].clone()}), r"mismatched keys.*q_proj.*64, 32"),
    "another shape in the tower": (
        False, lambda w: w.update({TOWER: w[TOWER][:8].clone()}), r"mismatched keys.*visual\.blocks\.1.*8, 32",
    ),
    "a head of its own under tie_word_embeddings": (
        True, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}), r"tie_word.*lm_head\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, case):
    tied, spoil, message = REFUSED[case]
    weights, config, tokenizer = original_weights(tied)
    spoil(weights)
    folder = write_checkpoint(tmp_path / "c", weights, config, tokenizer)
    with pytest.raises(ValueError, match=message) as caught:
        load_base(settings(folder))
    assert f"policy.path={folder}" in str(caught.value)


def test_a_redundant_copy_of_a_tied_head_is_no_contradiction(tmp_path):
    weights, config, tokenizer = original_weights(tied=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model, _ = load_base(settings(write_checkpoint(tmp_path / "c", weights, config, tokenizer)))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_absent_cut_and_pickled_files_are_refused(tmp_path):
    weights, config, tokenizer = original_weights(tied=True)
    folder = write_checkpoint(tmp_path / "c", weights, config, tokenizer)
    shard = folder / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"policy\.path=.*model-00002-of-00003.* bytes instead of"):
        load_base(settings(folder))
    shard.unlink()
    with pytest.raises(ValueError, match=r"policy\.path=.*model-00002-of-00003"):
        load_base(settings(folder))
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"policy\.path=.*safetensors"):
        load_base(settings(folder))
    with pytest.raises(ValueError, match=r"policy\.path="):
        load_base(settings(tmp_path / "nowhere"))


# --- settings


def published_video_settings() -> dict:
    """Class attributes of transformers' Qwen2-VL video processor, read from its source: importing needs torchvision."""
    source = Path(transformers.__file__).parent / "models" / "qwen2_vl" / "video_processing_qwen2_vl.py"
    wanted = {"size", "patch_size", "temporal_patch_size", "merge_size", "min_frames", "max_frames"}
    body = next(
        n for n in ast.parse(source.read_text()).body if getattr(n, "name", None) == "Qwen2VLVideoProcessor"
    ).body
    found = {n.targets[0].id: n.value for n in body if isinstance(n, ast.Assign)}
    return {k: eval(compile(ast.Expression(found[k]), "settings", "eval"), {}) for k in wanted}


@pytest.mark.parametrize("name", MODELS)
def test_the_settings_are_those_of_the_published_preprocessing(name):
    config, published = composed(name), published_video_settings()
    frames = config.policy.frames
    assert config.policy.path == f"Qwen/Qwen2.5-VL-{name[-2:].upper()}-Instruct"
    assert (config.policy.precision, config.policy.attention) == (Precision.bf16, "sdpa")
    assert dataclasses.astuple(config.policy.lora) == (16, 32, 0.0, LoraCompute.native, False)
    assert (published["patch_size"], published["merge_size"], published["temporal_patch_size"]) == (
        PATCH_FORM.size, MERGE, TEMPORAL_PATCH,
    )  # fmt: skip
    assert PATCH_FORM.side == FACTOR == 28
    assert (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)) == (PATCH_FORM.mean, PATCH_FORM.std)
    assert (frames.min_frames, frames.max_frames) == (published["min_frames"], published["max_frames"])
    assert frames.fps == 2.0  # FPS of qwen-vl-utils
    assert frames.max_pixels == published["size"]["longest_edge"] == 768 * FACTOR**2
    # tighter than published (128 * 28 * 28 and 0.9 * 128000 * 28 * 28), as in the paper's relatives
    assert frames.min_pixels == 16 * FACTOR**2 < published["size"]["shortest_edge"]
    assert frames.total_pixels == 3584 * FACTOR**2 < 0.9 * 128000 * FACTOR**2
    assert composed("qwen2_5_vl_3b").policy.frames == composed("qwen2_5_vl_7b").policy.frames
    assert config.policy.activation_checkpointing == "auto"
    assert config.faithfulness.every == 50, "greedy answers of up to 1,024 tokens"
