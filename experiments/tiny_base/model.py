"""The tiny bases' architectures and tokenizer: a genuine Qwen2.5-VL and a genuine Qwen3-VL, only small.

`python -m experiments.tiny_base` trains what this file builds and writes it in Hugging Face format; everything else
loads the result with the code that loads the released models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen3VLConfig

from tartvg.policy.families.family import family_of

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VOCABULARY = 1024
"""Upper bound; the corpus has fewer words."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's word rule (every digit is a token) and Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """About 1.6 million parameters: 6 layers of width 128, a 2-layer vision tower of width 64."""
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[6, 5, 5])
    tower = dict(depth=2, patch_size=14, window_size=112, fullatt_block_indexes=[1], tokens_per_second=2)
    return Qwen2_5_VLConfig(**_shapes(tokenizer, text=dict(rope_parameters=rope), tower=tower))


def tiny3_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """About 1.8 million parameters: 6 layers of width 128, a 3-layer vision tower of width 64, DeepStack from two."""
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5], mrope_interleaved=True)
    tower = dict(depth=3, patch_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    return Qwen3VLConfig(**_shapes(tokenizer, text=dict(head_dim=32, rope_parameters=rope), tower=tower))


def _shapes(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], tower: dict[str, Any]) -> dict[str, Any]:
    """What both families' configs have in common, with what a family's decoder and tower have besides."""
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    return dict(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            tie_word_embeddings=True,
            **text,
        ),
        vision_config=dict(
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=128,
            spatial_merge_size=2,
            temporal_patch_size=2,
            **tower,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_tiny(
    corpus: Iterable[str], seed: int, config_of: Callable[[PreTrainedTokenizerFast], Any] = tiny_config
) -> tuple[Any, PreTrainedTokenizerFast]:
    """An untrained tiny model with its tokenizer."""
    tokenizer = build_tokenizer(corpus)
    torch.manual_seed(seed)
    config = config_of(tokenizer)
    return family_of(config.model_type).model_class(config), tokenizer
