"""Base model, tokenizer and adapters from files. The tiny base and the 7B take the same path."""

from __future__ import annotations

from collections.abc import Set
from importlib import resources
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from tartvg.config import LoraCompute, LoraConfig, PolicyConfig, Precision
from tartvg.policy.lora import compute_natively
from tartvg.policy.patches import embed_as_product
from tartvg.policy.window_attention import WINDOW_ATTENTION

EMBEDDED_TINY = "embedded:tiny"
ADAPTER = "default"
ADAPTER_FILE = "adapter_model.safetensors"
"""PEFT's name for an adapter's weights."""
REFERENCE = "reference"
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Every linear layer of the language model; the vision tower stays as released."""
TOWER_TARGETS = r".*visual\.blocks\..*\.(qkv|proj|gate_proj|up_proj|down_proj)"
"""Every linear layer of the tower's blocks, with `policy.lora.vision`."""
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def embedded_path() -> Path:
    """The folder of the tiny base that ships in the package."""
    return Path(str(resources.files("tartvg") / "assets" / "tiny"))


def base_path(settings: PolicyConfig) -> str:
    """Where the base model lies: a folder or a Hub id."""
    if settings.path != EMBEDDED_TINY:
        return settings.path
    path = embedded_path()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"policy.path={EMBEDDED_TINY}: {path} is missing; build it with `python run.py stage=pretrain`"
        )
    return str(path)


def load_base(settings: PolicyConfig) -> tuple[Qwen2_5_VLForConditionalGeneration, Any]:
    """The frozen base model in eval mode, and its tokenizer.

    Raises ValueError when there are no readable safetensors, and when a weight is missing, unexpected, of another shape
    or contradicts the tying of the head: the library would only warn and train on random numbers.
    """
    path = base_path(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=settings.revision, trust_remote_code=False)
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path,
            revision=settings.revision or "main",
            dtype=DTYPES[settings.precision],
            attn_implementation=settings.attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name; the library's own error names no weight
            trust_remote_code=False,  # unset, the library asks at the terminal
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"policy.path={settings.path}: {error}") from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        wrong = info.get(kind)
        if wrong:
            raise ValueError(f"policy.path={settings.path}: {kind.replace('_', ' ')}: {sorted(map(str, wrong))[:5]}")
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.language_model.embed_tokens.weight:
        raise ValueError(
            f"policy.path={settings.path}: tie_word_embeddings is true, but lm_head.weight is not the embedding"
        )
    if settings.attention != "flash_attention_2":
        model.model.visual.config._attn_implementation = WINDOW_ATTENTION
    embed_as_product(model.model.visual)
    model.requires_grad_(False)
    return model.eval(), tokenizer


def new_adapter(model: Any, settings: LoraConfig, seed: int) -> peft.PeftModel:
    """A fresh LoRA adapter on the language model, or on the tower too; it starts as the identity."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=f"({LORA_TARGETS}|{TOWER_TARGETS})" if settings.vision else LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    if settings.compute is LoraCompute.native:
        compute_natively(wrapped)
    return wrapped


def load_adapter(model: Any, folder: Path, settings: LoraConfig, *, is_reference_kept: bool) -> peft.PeftModel:
    """An adapter from a run's folder, trainable; with `is_reference_kept` also a frozen copy named `reference`.

    Raises ValueError for a folder without readable safetensors, and for those of another adapter.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: no {ADAPTER_FILE} there")
    try:
        with safe_open(file, framework="pt") as content:
            names = set(content.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from error
    wrapped = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=ADAPTER, is_trainable=True)
    refuse_other_weights(wrapped, names, str(file))
    if is_reference_kept:
        wrapped.load_adapter(str(folder), adapter_name=REFERENCE, is_trainable=False)
        wrapped.set_adapter(ADAPTER)
    if settings.compute is LoraCompute.native:
        compute_natively(wrapped)
    return wrapped


def refuse_other_weights(model: peft.PeftModel, names: Set[str], where: str) -> None:
    """Raise ValueError unless `names` are those of the trainable adapter's weights.

    The library passes over what has no place, and leaves what is missing as it was born.
    """
    expected = set(get_peft_model_state_dict(model, adapter_name=ADAPTER))
    for kind, wrong in (("missing", expected - names), ("unexpected", names - expected)):
        if wrong:
            raise ValueError(f"{where}: {kind} weights: {sorted(wrong)[:3]}: it belongs to another model or is damaged")


def save_adapter(model: peft.PeftModel, folder: Path, base: str, state: dict[str, torch.Tensor] | None = None) -> None:
    """The trained adapter alone, in PEFT's own format, so that plain `PeftModel.from_pretrained` reads it.

    `state` replaces the model's own weights where training has split them over processes.
    """
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base
    own: Any = {} if state is None else {"state_dict": state}
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER], safe_serialization=True, **own)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
