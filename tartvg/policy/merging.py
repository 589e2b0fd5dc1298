"""Base and adapter -> one plain Hugging Face folder, which other programs load without PEFT and without this package.

The sum is made in fp32 and rounded once, to `policy.precision`. Files, their shards and the names of weights are those
of the base: a released checkpoint comes out under its original names, whatever the library calls them today.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tartvg.config import AnchorsConfig, PolicyConfig, Precision, SettingError
from tartvg.policy.families.family import family_of
from tartvg.policy.head import never_sampled
from tartvg.policy.loading import DTYPES, base_folder, load_adapter, load_base, todays_name
from tartvg.policy.model_files import ADAPTER_FILE, CONFIG, INDEX, read_header, read_json, weight_files
from tartvg.policy.patches import MERGE, TEMPORAL_PATCH
from tartvg.prompts import build_prompt
from tartvg.types import GroundingSample

SCRIPT = "answer.py"
"""Asks the exported model one question; it imports nothing of this package."""
GROUNDING = "grounding.json"
"""What the script needs beside the model: prompt and frames."""
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "LICENSE", "NOTICE",
)  # fmt: skip
"""Files of a base that a merge leaves as they are."""
ADAPTER_PREFIX = "base_model.model."
"""What stands before the names of weights in an adapter."""


def merge(settings: PolicyConfig, adapter: Path, target: Path) -> None:
    """Write weights, config.json and the tokenizer's files of base plus adapter to the folder `target`.

    Needs main memory for the base in fp32 and for one of its files. Raises SettingError for files that cannot be used.
    """
    base = base_folder(settings)
    setting = f"policy.path={settings.path}"
    _refuse_tied_adapter(base, adapter, setting)
    model, _ = load_base(replace(settings, precision=Precision.fp32, attention="sdpa"))
    try:
        merged = load_adapter(model, adapter, settings.lora, is_reference_kept=False).merge_and_unload(safe_merge=True)
    except ValueError as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{adapter}: cannot be merged ({error})") from error
    target.mkdir(parents=True, exist_ok=True)
    write_weights(base, merged.state_dict(), target, DTYPES[settings.precision], setting)
    dtype = str(DTYPES[settings.precision]).removeprefix("torch.")
    _write(target / CONFIG, with_type(read_json(base / CONFIG, setting), dtype) | {"dtype": dtype})
    for name in COPIED:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    for file in target.glob("*.safetensors"):
        shutil.copymode(target / CONFIG, file)  # safetensors writes files that nobody else may read


def _refuse_tied_adapter(base: Path, adapter: Path, setting: str) -> None:
    """Raise SettingError where one matrix is embedding and head, and an adapter would change one of the two uses."""
    names = read_header(adapter / ADAPTER_FILE, str(adapter))
    changed = [name for name in names if "embed_tokens" in name or "lm_head" in name]
    if changed and read_json(base / CONFIG, setting).get("tie_word_embeddings"):
        raise SettingError(
            f"{adapter}: {changed[0]} changes the embedding or the head alone, which are one matrix in {setting}: "
            "it cannot be merged; use base and adapter side by side"
        )


def write_weights(base: Path, state: dict[str, Tensor], target: Path, dtype: torch.dtype, setting: str) -> None:
    """Write `state` (today's names, fp32) in the files and under the names of the base, rounded to `dtype`."""
    places: dict[str, str] = {}
    size = 0
    for file in weight_files(base, setting):
        names = list(read_header(file, setting))
        part = {name: state[model_name(name)].to(dtype, copy=True).contiguous() for name in names}
        save_file(part, target / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file.name)
        size += sum(weight.numel() * weight.element_size() for weight in part.values())
    if len(set(places.values())) > 1:
        _write(target / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def model_name(name: str) -> str:
    """What transformers 4.52 and later call a weight that a released file names `name`."""
    return todays_name(ADAPTER_PREFIX + name).removeprefix(ADAPTER_PREFIX)


def with_type(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json whose every `dtype` or `torch_dtype`, nested ones too, is `dtype`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            found[key] = dtype
        else:
            found[key] = with_type(value, dtype) if isinstance(value, dict) else value
    return found


def write_usage(
    tokenizer: Any, settings: PolicyConfig, target: Path, anchors: AnchorsConfig, max_new_tokens: int
) -> str:
    """Write how the model is asked: generation and processor configs, prompt, frames and script. Returns the prompt.

    `{query}` stands in the prompt where the sentence goes.
    """
    config = read_json(target / CONFIG, str(target))
    size = int((config.get("text_config") or config)["vocab_size"])
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    _write(target / "generation_config.json", {
        "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1], "max_new_tokens": max_new_tokens,
        # as in training: no video inside an answer, no row of the head beyond the tokenizer's words
        "suppress_tokens": [*sorted(never_sampled(tokenizer)), *range(len(tokenizer), size)],
    })  # fmt: skip
    family, frames, base = family_of(config["model_type"]), settings.frames, base_folder(settings)
    told, form = family.exported(settings), family.patch_form
    unit = 255 / form.white
    shared = {
        "image_mean": [value / unit for value in form.mean],
        "image_std": [value / unit for value in form.std],
        "patch_size": form.size, "temporal_patch_size": TEMPORAL_PATCH, "merge_size": MERGE,
        "processor_class": told.processor,
    }  # fmt: skip
    _write_over(base, target, "preprocessor_config.json", {**shared, **told.images})
    _write_over(base, target, "video_preprocessor_config.json", {
        **shared, **told.videos, "fps": frames.fps, "min_frames": frames.min_frames, "max_frames": frames.max_frames,
        "do_sample_frames": True,
    })  # fmt: skip
    prompt = build_prompt(GroundingSample("", Path(), "{query}", (), 0.0, "test"), anchors).text
    bounds = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
    frame_settings = {name: getattr(frames, name) for name in bounds}
    _write(target / GROUNDING, {
        "prompt": prompt, "place": told.place, "step": told.step, "white": form.white, **frame_settings,
    })  # fmt: skip
    script = resources.files("tartvg") / "assets" / "export" / SCRIPT
    (target / SCRIPT).write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    return prompt


def _write_over(base: Path, target: Path, name: str, values: dict[str, Any]) -> None:
    """A config of the base's processors, where it has one, with these values over it."""
    own = read_json(base / name, str(base)) if (base / name).is_file() else {}
    _write(target / name, {**own, **values})


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
