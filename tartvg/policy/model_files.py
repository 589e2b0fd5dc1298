"""What a folder with a base or an adapter must hold, read from names, sizes and headers before any weight is. No torch.

The libraries forgive what a user should hear of: without config.json they build a model of default size, without a
tokenizer's files one of a single entry, and beside an adapter_config.json they read the base alone.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from tartvg.config import SettingError
from tartvg.policy.families import FAMILIES

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the shard of every weight, where there are several files."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
"""PEFT's name for an adapter's weights."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the types of weights that are not quantised."""
QUANTISED = "quantised weights are not supported; give the base that they were made from"
LFS_POINTER = b"version https://git-lfs"
"""How the text begins that stands for a large file in a clone without git-lfs."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""`organisation/model`, or a name alone."""
SMALL_FILES = ["*.json", "*.jinja", "*.txt"]
"""Everything of a model on the Hub but its weights."""


def check_model(folder: Path, setting: str) -> None:
    """Refuse a folder that holds no whole base of a supported kind. `setting` begins the message.

    Raises SettingError.
    """
    check_small_files(folder, setting)
    for file in weight_files(folder, setting):
        other = {str(entry["dtype"]) for entry in read_header(file, setting).values()} - set(FLOATS)
        if other:
            raise SettingError(f"{setting}: {file.name} holds weights of type {', '.join(sorted(other))}: {QUANTISED}")


def check_small_files(folder: Path, setting: str) -> None:
    """Refuse what config.json and the names of the other files show. Raises SettingError."""
    if (folder / ADAPTER_CONFIG).exists():
        base = _field(folder / ADAPTER_CONFIG, "base_model_name_or_path")
        advice = f"give it as init_adapter={folder} (to score it: evaluate.policies)"
        if (folder / CONFIG).exists():
            advice = "move the adapter's files to a folder of their own and give that as init_adapter"
        raise SettingError(
            f"{setting}: there is an {ADAPTER_CONFIG} in this folder: {advice}; policy.path is its base"
            + (f", {base}" if isinstance(base, str) and base else "")
        )
    if not (folder / CONFIG).is_file():
        hint = "; the Hub's cache keeps the files below snapshots/" if (folder / "snapshots").is_dir() else ""
        raise SettingError(f"{setting}: no {CONFIG} in this folder: give the folder that holds the whole base{hint}")
    config = read_json(folder / CONFIG, setting)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise SettingError(f"{setting}: {CONFIG} says model_type={kind}; supported: {', '.join(FAMILIES)}")
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise SettingError(f"{setting}: {CONFIG} has a quantization_config ({method}): {QUANTISED}")
    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        raise SettingError(
            f"{setting}: no tokenizer.json (or vocab.json and merges.txt) in this folder: copy the tokenizer's files "
            "of the base there"
        )


def weight_files(folder: Path, setting: str) -> list[Path]:
    """The safetensors of a base, all of them there. Raises SettingError."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise SettingError(
            f"{setting}: neither {WEIGHTS} nor {INDEX} in this folder: save the model as safetensors; other forms "
            "(.bin, .pt) may hold pickled Python objects, which run code when they are read, and are refused"
        )
    shards = _shards(folder, setting)
    if not shards or any(Path(name).name != name for name in shards):
        raise SettingError(f"{setting}: {INDEX} has no weight_map of weights to files beside it: fetch it again")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SettingError(f"{setting}: {missing[0]}{more} of {len(shards)} files is missing: fetch the rest")
    return [folder / name for name in shards]


def _shards(folder: Path, setting: str) -> list[str]:
    """The names of files in an index; none where it has no map of weights to files. Raises SettingError."""
    names = read_json(folder / INDEX, setting).get("weight_map")
    return sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []


def read_header(file: Path, setting: str) -> dict[str, Any]:
    """Type, shape and place of every tensor in a safetensors file that is as long as it says. Raises SettingError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise SettingError(f"{setting}: {_pointer(file)}")
        length = int.from_bytes(start[:8], "little")
        stream.seek(8)
        text = stream.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        is_whole = all("dtype" in entry and "shape" in entry for entry in header.values())
    except (ValueError, AttributeError, LookupError, TypeError):
        is_whole = False
    if not is_whole:
        raise SettingError(f"{setting}: {file.name} is cut or no safetensors file: fetch it again")
    if size != expected:
        raise SettingError(f"{setting}: {file.name} has {size:,} bytes instead of {expected:,}: fetch it again")
    return dict(header)


def _pointer(file: Path) -> str:
    return f"{file.name} is a git-lfs pointer instead of the file: run `git lfs pull` in its folder"


def read_json(file: Path, setting: str) -> dict[str, Any]:
    """An object from a small file. Raises SettingError."""
    content = file.read_bytes()
    if content.startswith(LFS_POINTER):
        raise SettingError(f"{setting}: {_pointer(file)}")
    try:
        value = json.loads(content)
    except ValueError as error:
        raise SettingError(f"{setting}: {file.name} is not JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise SettingError(f"{setting}: {file.name} holds no JSON object: fetch it again")
    return value


def _field(file: Path, key: str) -> object:
    try:
        return read_json(file, "").get(key)
    except SettingError:
        return None


def check_adapter_files(folder: Path, setting: str) -> None:
    """Refuse a folder that holds no whole LoRA adapter. `setting` begins the message. Raises SettingError."""
    if folder.is_file() or (folder / "adapter_model.bin").exists():
        raise SettingError(
            f"{setting}: adapters are read from a folder with {ADAPTER_FILE}; other forms (.bin, .pt, .ckpt) "
            "may hold pickled Python objects, which run code when they are read, and are refused"
        )
    if not (folder / ADAPTER_FILE).is_file():
        advice = "run that stage first, or give an adapter folder"
        if (folder / CONFIG).is_file():
            advice = "this is the folder of a whole model: give it as policy.path"
        raise SettingError(f"{setting}: no {ADAPTER_FILE} there; {advice}")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise SettingError(f"{setting}: no {ADAPTER_CONFIG} beside {ADAPTER_FILE}: copy it there")
    kind = read_json(folder / ADAPTER_CONFIG, setting).get("peft_type")
    if kind != "LORA":
        raise SettingError(f"{setting}: {ADAPTER_CONFIG} says peft_type={kind}; only LORA adapters are supported")
    read_header(folder / ADAPTER_FILE, setting)


@lru_cache(maxsize=8)
def hub_folder(name: str, revision: str | None, setting: str) -> Path:
    """A model of the Hub in its cache; what is missing is fetched, the weights last. Raises SettingError."""
    folder = hub_small_files(name, revision, setting)
    shards = _shards(folder, setting) if (folder / INDEX).is_file() else []
    return _fetch(name, revision, [*SMALL_FILES, *(shards or [WEIGHTS])], setting)


def hub_small_files(name: str, revision: str | None, setting: str) -> Path:
    """Everything of a model of the Hub but its weights, in its cache, checked. Raises SettingError."""
    if not HUB_ID.fullmatch(name):
        hint = "; a shell leaves ~ behind a = as it is: write $HOME" if name.startswith("~") else ""
        raise SettingError(f"{setting}: there is no such folder{hint}")
    folder = _fetch(name, revision, SMALL_FILES, setting)
    check_small_files(folder, setting)
    return folder


def _fetch(name: str, revision: str | None, patterns: list[str], setting: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of the network, the Hub, the cache or the disk, by half a dozen libraries
        said = next(iter(str(error).splitlines()), "")
        raise SettingError(
            f"{setting}: there is no such folder, and the Hub's model of that name could not be fetched "
            f"({type(error).__name__}: {said}): check the name, or fetch it where there is a network "
            f"(hf download {name} --local-dir FOLDER) and set policy.path to that folder"
        ) from error
