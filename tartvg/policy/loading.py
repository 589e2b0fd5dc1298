"""Base model, tokenizer and adapters from files. The tiny base and the 7B take the same path."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Set
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from tartvg.config import LoraCompute, LoraConfig, PolicyConfig, Precision, SettingError, VideoWrapper
from tartvg.launch.processes import is_follower
from tartvg.policy.families.family import Family, family_of
from tartvg.policy.inputs import chat_text
from tartvg.policy.lora import compute_natively
from tartvg.policy.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONFIG,
    check_adapter_files,
    check_model,
    hub_folder,
    read_header,
    read_json,
)
from tartvg.policy.patches import embed_as_product
from tartvg.policy.window_attention import WINDOW_ATTENTION

EMBEDDED = "embedded:"
"""Before the name of a base that ships in the package."""
ADAPTER = "default"
REFERENCE = "reference"
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
TOKEN_IDS = {
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
"""Special tokens, and what config.json calls their ids."""
TURN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""What a chat is made of; the last two end an answer."""
OLD_NAMES = (
    (
        re.compile(r"^base_model\.model\.model\.(?=(layers|embed_tokens|norm)\.)"),
        "base_model.model.model.language_model.",
    ),
    (re.compile(r"^base_model\.model\.visual\."), "base_model.model.model.visual."),
)
"""How the weights of an adapter were called under transformers 4.51 and before, and what stands there today."""


def embedded_path(name: str = "tiny") -> Path:
    """Return the folder of a base that ships in the package."""
    return Path(str(resources.files("tartvg") / "assets" / name))


def base_path(settings: PolicyConfig) -> str:
    """Return where the base model lies: a folder or a Hub id."""
    if not settings.path.startswith(EMBEDDED):
        return settings.path
    name = settings.path.removeprefix(EMBEDDED)
    path = embedded_path(name)
    if not (path / CONFIG).is_file():
        raise SettingError(
            f"policy.path={settings.path}: {path} is missing; build it with `python -m experiments.tiny_base {name}`"
        )
    return str(path)


def base_folder(settings: PolicyConfig) -> Path:
    """The folder of the base's files, fetched from the Hub where need be, and checked before any weight is read.

    Raises SettingError for a base that cannot be used, as far as names, sizes and headers of files tell.
    """
    if settings.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise SettingError(
            "policy.attention=flash_attention_2 needs a CUDA GPU and the package flash-attn (2.3.3 or later), and one "
            "of them is not here: policy.attention=sdpa needs neither"
        )
    setting, folder = _named(settings), Path(base_path(settings))
    if not folder.exists():
        folder = hub_folder(settings.path, settings.revision, setting)
    if not folder.is_dir():
        raise SettingError(f"{setting} is a file: give the folder that holds the whole base")
    check_model(folder, setting)
    family = family_in(folder, setting)
    if settings.video_wrapper is not VideoWrapper.inner and not family.is_time_text:
        raise SettingError(
            f"policy.video_wrapper={settings.video_wrapper.value}: {family.title} writes no marks around the "
            "steps of a video: leave it at inner"
        )
    return folder


def family_in(folder: Path, setting: str) -> Family:
    """Return the family of the base in a folder that has been checked."""
    return family_of(read_json(folder / CONFIG, setting)["model_type"])


def checked_base(settings: PolicyConfig) -> tuple[Path, Any]:
    """The folder of the base and its tokenizer. Every stage that needs them begins here: it takes a second.

    Raises SettingError for a base that cannot be used.
    """
    folder, setting = base_folder(settings), _named(settings)
    return folder, load_tokenizer(folder, read_config(folder, setting), setting)


def _named(settings: PolicyConfig) -> str:
    return f"policy.path={settings.path}"


def _in_a_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 300) or type(error).__name__


def read_config(folder: Path, setting: str) -> Any:
    """The shapes of the base in a folder. Raises SettingError."""
    try:
        return family_in(folder, setting).config_class.from_pretrained(str(folder))
    except Exception as error:  # whatever the library makes of values that a user's file holds
        raise SettingError(f"{setting}: {CONFIG} cannot be used ({_in_a_line(error)})") from error


def load_tokenizer(folder: Path, config: Any, setting: str) -> Any:
    """The tokenizer of a base, with a chat template and the special tokens of config.json. Raises SettingError."""
    advice = "copy the tokenizer's files and chat_template.jinja of the released model there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        fault = _fault_of(tokenizer, config)
    except Exception as error:  # as above; jinja's too, where a template is wrong
        raise SettingError(f"{setting}: the tokenizer cannot be used ({_in_a_line(error)}): {advice}") from error
    if fault:
        raise SettingError(f"{setting}: {fault}: {advice}")
    return tokenizer


def _fault_of(tokenizer: Any, config: Any) -> str | None:
    for token in (*TOKEN_IDS, *TURN_TOKENS):
        found = tokenizer.convert_tokens_to_ids(token)
        if found is None or tokenizer.convert_ids_to_tokens(found) != token:
            return f"the tokenizer does not know {token}"
        expected = getattr(config, TOKEN_IDS[token]) if token in TOKEN_IDS else found
        if found != expected:
            return f"{token} is {found} to the tokenizer and {expected} in {CONFIG} ({TOKEN_IDS[token]})"
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        return f"the tokenizer has {len(tokenizer)} entries, {CONFIG} a vocab_size of {size}"
    if not tokenizer.chat_template:
        return "there is no chat template"
    chat_text(tokenizer, "")  # raises where there is no place for a video
    return None


def load_base(settings: PolicyConfig) -> tuple[Any, Any]:
    """Load the frozen base model in eval mode, and its tokenizer.

    Raises SettingError for files that cannot be used (`checked_base`), and when a weight is missing, unexpected, of
    another shape or contradicts the tying of the head: the library would only warn and train on random numbers.
    """
    setting, (folder, tokenizer) = _named(settings), checked_base(settings)
    try:
        loaded: Any = family_in(folder, setting).model_class.from_pretrained(
            str(folder),
            dtype=DTYPES[settings.precision],
            attn_implementation=settings.attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name; the library's own error names no weight
            trust_remote_code=False,  # unset, the library asks at the terminal
        )
    except (OSError, SafetensorError) as error:
        raise SettingError(f"{setting}: {_in_a_line(error)}") from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        wrong = info.get(kind)
        if wrong:
            raise SettingError(f"{setting}: {kind.replace('_', ' ')}: {sorted(map(str, wrong))[:5]}")
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.language_model.embed_tokens.weight:
        raise SettingError(f"{setting}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
    if settings.attention != "flash_attention_2":
        model.model.visual.config._attn_implementation = WINDOW_ATTENTION
    embed_as_product(model.model.visual)
    model.requires_grad_(False)
    return model.eval(), tokenizer


def new_adapter(model: Any, settings: LoraConfig, seed: int) -> peft.PeftModel:
    """Add a fresh LoRA adapter to the language model, or to the tower too; it starts as the identity."""
    torch.manual_seed(seed)
    family = family_of(model.config.model_type)
    targets = f"({family.lora_targets}|{family.tower_targets})" if settings.vision else family.lora_targets
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    if settings.compute is LoraCompute.native:
        compute_natively(wrapped)
    return wrapped


def load_adapter(model: Any, folder: Path, settings: LoraConfig, *, is_reference_kept: bool) -> peft.PeftModel:
    """Load a trainable adapter from a run's folder; with `is_reference_kept` also a frozen copy named `reference`.

    Raises SettingError for a folder without a readable LoRA adapter, and for one of another base.
    """
    check_adapter_files(folder, str(folder))
    with todays_form(folder) as form:
        if form != folder and not is_follower():
            print(f"{folder}: names of transformers 4.51 or earlier, read as model.language_model and model.visual")
        wrapped = peft.PeftModel.from_pretrained(model, str(form), adapter_name=ADAPTER, is_trainable=True)
        refuse_other_weights(wrapped, read_header(form / ADAPTER_FILE, str(folder)).keys(), str(folder / ADAPTER_FILE))
        if is_reference_kept:
            wrapped.load_adapter(str(form), adapter_name=REFERENCE, is_trainable=False)
            wrapped.set_adapter(ADAPTER)
    if settings.compute is LoraCompute.native:
        compute_natively(wrapped)
    return wrapped


def add_adapter(model: peft.PeftModel, folder: Path, name: str, settings: LoraConfig) -> None:
    """Load an adapter beside those that the model has. Raises SettingError as `check_adapter_files` does."""
    check_adapter_files(folder, str(folder))
    with todays_form(folder) as form:
        model.load_adapter(str(form), adapter_name=name, is_trainable=True)
    if settings.compute is LoraCompute.native:
        compute_natively(model)


def todays_name(name: str) -> str:
    """What transformers 4.52 and later call a weight of an adapter."""
    for old, new in OLD_NAMES:
        name = old.sub(new, name)
    return name


@contextmanager
def todays_form(folder: Path) -> Iterator[Path]:
    """The folder of an adapter; where its weights have old names, a copy that lasts as long as the block.

    The layers of the copy are listed one by one: a pattern of old names may not fit the new ones.
    """
    header = read_header(folder / ADAPTER_FILE, str(folder))
    if all(todays_name(name) == name for name in header):
        yield folder
        return
    config = lora_config(folder)
    modules = {todays_name(n).removeprefix("base_model.model.").partition(".lora_")[0] for n in header if ".lora_" in n}
    config.target_modules, config.exclude_modules = sorted(modules), None
    config.layers_to_transform = config.layers_pattern = None
    with TemporaryDirectory() as place:
        config.save_pretrained(place)
        weights = load_file(folder / ADAPTER_FILE)
        save_file({todays_name(name): weight for name, weight in weights.items()}, Path(place) / ADAPTER_FILE)
        yield Path(place)


def lora_config(folder: Path) -> peft.LoraConfig:
    """The settings of an adapter. Raises SettingError."""
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever the library makes of values that a user's file holds
        raise SettingError(f"{folder}: {ADAPTER_CONFIG} cannot be used ({_in_a_line(error)})") from error
    assert isinstance(config, peft.LoraConfig), "check_adapter_files lets no other kind pass"
    return config


def check_adapter(settings: PolicyConfig, folder: Path, setting: str) -> None:
    """Refuse an adapter that cannot be used on the base, by names and shapes, before any weight is read.

    The base is built without memory for its weights, and PEFT's adapter on it. `setting` begins the message and says
    where the folder is. Raises SettingError.
    """
    check_adapter_files(folder, setting)
    base = read_config(base_folder(settings), _named(settings))
    with todays_form(folder) as form:
        found = {name: entry["shape"] for name, entry in read_header(form / ADAPTER_FILE, setting).items()}
        config = lora_config(form)
    config.base_model_name_or_path = None  # of the machine that saved it; the library warns that it is another
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = peft.get_peft_model(family_of(base.model_type).model_class(base), config, adapter_name=ADAPTER)
        weights = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    except Exception as error:  # PEFT's words for layers that this base does not have, and the like
        raise SettingError(f"{setting}: {ADAPTER_CONFIG} does not fit {settings.path} ({_in_a_line(error)})") from error
    expected = {name: list(weight.shape) for name, weight in weights.items()}
    _refuse_names(expected.keys(), found.keys(), f"{setting}: {ADAPTER_FILE}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise SettingError(
                f"{setting}: {ADAPTER_FILE}: {name} is {shape} instead of {expected[name]}: it belongs to another "
                f"{ADAPTER_CONFIG}, or to another base than policy.path={settings.path}"
            )


def refuse_other_weights(model: peft.PeftModel, names: Set[str], where: str) -> None:
    """Raise SettingError unless `names` are those of the trainable adapter's weights.

    The library passes over what has no place, and leaves what is missing as it was born.
    """
    _refuse_names(get_peft_model_state_dict(model, adapter_name=ADAPTER).keys(), names, where)


def _refuse_names(expected: Set[str], found: Set[str], where: str) -> None:
    for kind, wrong in (("missing", expected - found), ("unexpected", found - expected)):
        if wrong:
            raise SettingError(
                f"{where}: {kind} weights: {sorted(wrong)[:3]}: it belongs to another model or is damaged"
            )


def save_adapter(model: peft.PeftModel, folder: Path, base: str, state: dict[str, torch.Tensor] | None = None) -> None:
    """Save the trained adapter alone, in PEFT's own format, so that plain `PeftModel.from_pretrained` reads it.

    `state` replaces the model's own weights where training has split them over processes.
    """
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base
    own: Any = {} if state is None else {"state_dict": state}
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER], safe_serialization=True, **own)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
