"""Untrained bases of a given size."""

from __future__ import annotations

SIZES = {"narrow": (192, 576, 4, 500, 8, 96), "wide": (320, 1280, 4, 600, 8, 96), "deep": (256, 768, 8, 400, 6, 128)}
"""Hidden and intermediate width, layers, prompt tokens, completions, and their length."""


LARGE = {"large": (1024, 4096, 10)}
"""Of which only the weights matter."""


def tiny_of(name, folder):
    """An untrained tiny base of that size, written in Hugging Face format."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from experiments.tiny_base.model import build_tokenizer, tiny_config

    hidden, intermediate, layers, *_ = (SIZES | LARGE)[name]
    tokenizer = build_tokenizer(["the red circle appears at <timestamp>1.00 to 2.00</timestamp>"] * 3)
    config = tiny_config(tokenizer)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, intermediate, layers
    text.num_attention_heads, text.num_key_value_heads = hidden // 32, hidden // 64
    text.layer_types = ["full_attention"] * layers
    config.vision_config.out_hidden_size = hidden
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def untrained_qwen3(folder, **text):
    """An untrained Qwen3-VL with three DeepStack features and heads wider than hidden / heads, in that folder."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    from experiments.tiny_base.model import build_tokenizer, tiny3_config

    words = "<think>It is <timestamp>1.00 to 2.00</timestamp>.</think><answer>1.00 to 2.00</answer> the red circle"
    tokenizer = build_tokenizer([f"{words} <12.3 seconds>"] * 3)
    changed = tiny3_config(tokenizer).to_dict()
    changed["text_config"] |= dict(hidden_size=96, intermediate_size=192, num_hidden_layers=5) | text
    changed["vision_config"] |= dict(depth=4, out_hidden_size=96, deepstack_visual_indexes=[0, 1, 2])
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(tiny3_config(tokenizer).__class__(**changed)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
