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
