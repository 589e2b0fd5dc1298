"""Adapters that other programs and versions have saved."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tartvg.config import LoraConfig, PolicyConfig, SettingError
from tartvg.policy.loading import check_adapter, load_adapter, load_base, new_adapter, save_adapter
from tartvg.policy.model_files import ADAPTER_CONFIG, ADAPTER_FILE


def old_name(name):
    """What transformers 4.51 called it, where the tower lay beside the language model and that had no name."""
    prefix = "base_model.model."
    return name.replace(f"{prefix}model.language_model.", f"{prefix}model.").replace(
        f"{prefix}model.visual.", f"{prefix}visual."
    )


@pytest.fixture
def settings(untrained_base):
    return PolicyConfig(name="t", path=str(untrained_base), lora=LoraConfig(rank=4, vision=True))


@pytest.fixture
def saved(settings, tmp_path):
    """An adapter on the language model and the tower, with weights that are not those it was born with."""
    model, _ = load_base(settings)
    adapted = new_adapter(model, settings.lora, seed=0)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_()
    save_adapter(adapted, tmp_path, "base")
    return tmp_path


def make_old(folder, targets):
    weights = load_file(folder / ADAPTER_FILE)
    save_file({old_name(name): weight for name, weight in weights.items()}, folder / ADAPTER_FILE)
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | {"target_modules": targets}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return weights


LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
OLD_TARGETS = {
    "a pattern of old names": rf"(model\.layers\.\d+\.\w+\.({LINEAR})|visual\.blocks\..*\.(qkv|proj|{LINEAR}))",
    "ends of names": [*LINEAR.split("|"), "qkv", "attn.proj"],
}


@pytest.mark.parametrize("targets", OLD_TARGETS)
def test_an_adapter_of_transformers_4_51_is_read_under_todays_names(saved, settings, targets, capsys):
    weights = make_old(saved, OLD_TARGETS[targets])
    names = load_file(saved / ADAPTER_FILE).keys()
    assert any(n.startswith("base_model.model.model.layers.") for n in names)
    assert any(n.startswith("base_model.model.visual.blocks.") for n in names)
    check_adapter(settings, saved, "init_adapter")
    model, _ = load_base(settings)
    adapted = load_adapter(model, saved, LoraConfig(), is_reference_kept=True)
    assert re.fullmatch(rf"{saved}: names of transformers 4\.51 or earlier, read as .*\n", capsys.readouterr().out)
    for adapter in ("default", "reference"):
        found = {n: p for n, p in adapted.named_parameters() if f".{adapter}." in n}
        assert {n.replace(f".{adapter}", "") for n in found} == weights.keys()
        assert all(torch.equal(p, weights[n.replace(f".{adapter}", "")]) for n, p in found.items())
    assert sorted(saved.iterdir()) == [saved / ADAPTER_CONFIG, saved / ADAPTER_FILE], "the user's folder is left alone"


def test_an_adapter_of_transformers_4_51_for_another_base_is_refused(saved, settings):
    make_old(saved, OLD_TARGETS["ends of names"])
    weights = load_file(saved / ADAPTER_FILE)
    name = next(n for n in weights if "layers.0" in n)
    save_file(weights | {name.replace("layers.0", "layers.27"): weights[name].clone()}, saved / ADAPTER_FILE)
    with pytest.raises(SettingError, match=r"init_adapter: .*layers\.27|does not fit"):
        check_adapter(settings, saved, "init_adapter")


def test_the_check_of_an_adapter_draws_no_random_number(saved, settings):
    """A run that starts from an adapter gives the numbers that it gave without the check."""
    before = torch.get_rng_state()
    check_adapter(settings, saved, "init_adapter")
    assert torch.equal(torch.get_rng_state(), before)
