"""What a user's model, adapter or machine can do wrong: one line that says what to do, before a weight is read."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tartvg.policy.model_files import ADAPTER_CONFIG, ADAPTER_FILE

pytestmark = pytest.mark.slow
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 3087467144\n"
WEIGHTS = "model.safetensors"


def change(file, **values):
    """Set fields of a JSON file; None takes one away."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def add_adapter(folder):
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        shutil.copy(folder.parent / "adapter" / name, folder / name)


def only_adapter(folder):
    """As trainers save it: an adapter with the tokenizer."""
    add_adapter(folder)
    remove(folder, "config.json", WEIGHTS)


def only_pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    weights = load_file(folder / WEIGHTS)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: files[number % 2] for number, name in enumerate(sorted(weights))}
    save_file({n: w for n, w in weights.items() if places[n] == files[0]}, folder / files[0])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    remove(folder, WEIGHTS)


def quantise_a_weight(folder):
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name].char()}, folder / WEIGHTS, {"format": "pt"})


def other_template(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: ?\n{% endfor %}")


BASES = {
    "no config.json": (lambda f: remove(f, "config.json"), "no config.json in this folder"),
    "config.json is not JSON": (lambda f: cut(f / "config.json"), "config.json is not JSON"),
    "a config.json that the library refuses": (
        lambda f: change(f / "config.json", text_config={"hidden_size": "wide"}),
        "config.json cannot be used (Validation error for field 'hidden_size': ",
    ),
    "another model": (lambda f: change(f / "config.json", model_type="qwen2"), "says model_type=qwen2; supported"),
    "an adapter": (only_adapter, "there is an adapter_config.json in this folder: give it as init_adapter="),
    "an adapter beside the base": (add_adapter, "there is an adapter_config.json in this folder: move the adapter's"),
    "the cache's folder of a model": (
        lambda f: (remove(f, "config.json"), (f / "snapshots").mkdir()), "the files below snapshots/",
    ),
    "no tokenizer": (
        lambda f: remove(f, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), "no tokenizer.json (or ",
    ),
    "a cut tokenizer": (lambda f: cut(f / "tokenizer.json"), "the tokenizer cannot be used"),
    "another tokenizer": (
        lambda f: change(f / "config.json", video_token_id=6),
        "<|video_pad|> is 7 to the tokenizer and 6 in config.json (video_token_id): copy",
    ),
    "no chat template": (lambda f: remove(f, "chat_template.jinja"), "there is no chat template: copy"),
    "a chat template for text": (other_template, "the chat template made 0 video places instead of 1): copy"),
    "pickled weights": (only_pickled, "save the model as safetensors"),
    "cut weights": (lambda f: cut(f / WEIGHTS), "bytes instead of"),
    "no weights in the file": (lambda f: (f / WEIGHTS).write_bytes(b"<html>"), "is cut or no safetensors file"),
    "a git-lfs pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), "git lfs pull"),
    "a missing shard": (lose_a_shard, "model-00002-of-00002.safetensors of 2 files is missing"),
    "AWQ": (
        lambda f: change(f / "config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "has a quantization_config (awq): quantised weights are not supported; give the base",
    ),
    "int8": (quantise_a_weight, "holds weights of type I8: quantised weights are not supported"),
}  # fmt: skip


def refused(said, *parts):
    """One line, exit code 2, and all that it has to name."""
    assert said.returncode == 2, said.stderr[-3000:]
    assert said.stderr.count("\n") == 1 and said.stderr.startswith("error: "), said.stderr
    assert all(str(part) in said.stderr for part in parts), said.stderr


@pytest.fixture(scope="module")
def models(untrained_base, tmp_path_factory):
    """A folder with a base and an adapter for it, of rank 4."""
    from tartvg.config import LoraConfig, PolicyConfig
    from tartvg.policy.loading import load_base, new_adapter, save_adapter

    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(untrained_base, folder / "base")
    model, _ = load_base(PolicyConfig(name="t", path=str(folder / "base")))
    save_adapter(new_adapter(model, LoraConfig(rank=4), seed=0), folder / "adapter", "someone/base")
    return folder


@pytest.fixture
def copies(models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def train(small, run_command, tmp_path):
    """The command that would train; nothing of it may have begun."""

    def call(*overrides, **kwargs):
        said = run_command(*small, "stage=grpo1", f"runs_dir={tmp_path}/runs", *overrides, check=False, **kwargs)
        assert not (tmp_path / "runs").exists()
        return said

    return call


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_be_used_is_refused_in_one_line(case, copies, train):
    spoil, message = BASES[case]
    spoil(copies / "base")
    refused(train(f"policy.path={copies}/base"), f"policy.path={copies}/base: ", message)


def offline():
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True


def without_network():
    """The discard port of this machine, where nobody listens."""
    import huggingface_hub.constants

    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"


@pytest.mark.parametrize("prepare", [offline, without_network])
def test_a_base_that_the_hub_cannot_give_is_refused_in_one_line(prepare, train, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    said = train("policy.path=nobody/has-this", prepare=prepare)
    refused(said, "policy.path=nobody/has-this: there is no such folder", "hf download nobody/has-this --local-dir")


@pytest.mark.parametrize(("path", "message"), [("/no/where", "no such folder"), ("~/base", "write $HOME")])
def test_a_path_that_does_not_exist_is_refused_in_one_line(path, message, train):
    refused(train(f"policy.path='{path}'"), f"policy.path={path}: ", message)


def test_a_file_in_place_of_a_folder_is_refused_in_one_line(copies, train):
    refused(train(f"policy.path={copies}/base/{WEIGHTS}"), f"policy.path={copies}/base/{WEIGHTS} is a file")


def other_rank(folder):
    change(folder / ADAPTER_CONFIG, r=8)


def other_layers(folder):
    change(folder / ADAPTER_CONFIG, target_modules=["c_attn"])


def wider_base(folder):
    """As one of the 7B is to the 3B."""
    weights = load_file(folder / ADAPTER_FILE)
    save_file({n: w.repeat(1, 2) if "lora_A" in n else w for n, w in weights.items()}, folder / ADAPTER_FILE)


def deeper_base(folder):
    weights = load_file(folder / ADAPTER_FILE)
    more = {n.replace("layers.5", "layers.6"): w.clone() for n, w in weights.items() if "layers.5" in n}
    save_file(weights | more, folder / ADAPTER_FILE)


ADAPTERS = {
    "no config": (lambda f: remove(f, ADAPTER_CONFIG), "no adapter_config.json beside adapter_model.safetensors"),
    "broken JSON": (lambda f: cut_half(f / ADAPTER_CONFIG), "adapter_config.json is not JSON"),
    "another kind": (lambda f: change(f / ADAPTER_CONFIG, peft_type="IA3"), "says peft_type=IA3; only LORA"),
    "a rank that is no number": (lambda f: change(f / ADAPTER_CONFIG, r="four"), "does not fit"),
    "another rank": (other_rank, "is [4, 384] instead of [8, 384]"),
    "layers that the base lacks": (other_layers, "adapter_config.json does not fit"),
    "of a wider base": (wider_base, "is [4, 768] instead of [4, 384]"),
    "of a deeper base": (deeper_base, "unexpected weights: "),
    "cut": (lambda f: cut(f / ADAPTER_FILE), "bytes instead of"),
    "a git-lfs pointer": (lambda f: (f / ADAPTER_FILE).write_text(POINTER), "git lfs pull"),
    "no weights": (lambda f: remove(f, ADAPTER_FILE), "no adapter_model.safetensors there; run that stage"),
}


def cut_half(file):
    file.write_text(file.read_text()[: len(file.read_text()) // 2])


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_cannot_be_used_is_refused_in_one_line(case, copies, train):
    spoil, message = ADAPTERS[case]
    spoil(copies / "adapter")
    said = train(f"policy.path={copies}/base", f"init_adapter={copies}/adapter")
    refused(said, f"init_adapter={copies}/adapter", message)


def test_a_base_given_as_adapter_is_refused_in_one_line(copies, train):
    refused(train(f"init_adapter={copies}/base"), f"init_adapter={copies}/base", "give it as policy.path")


def test_every_stage_that_loads_a_base_or_an_adapter_refuses_it(copies, train):
    """Scoring, and planning memory; `train` is what its settings make of it."""
    remove(copies / "adapter", ADAPTER_CONFIG)
    said = train("stage=evaluate", f"evaluate.policies=[{copies}/adapter]")
    refused(said, f"evaluate.policies={copies}/adapter: no adapter_config.json")
    remove(copies / "base", "config.json")
    refused(train("stage=evaluate", f"policy.path={copies}/base", "evaluate.policies=[base]"), "no config.json in this")
    refused(train("stage=memory", f"policy.path={copies}/base"), f"policy.path={copies}/base: no config.json in this")
    refused(train("stage=memory", "policy.path=/no/where"), "policy.path=/no/where: there is no such folder")


def test_a_machine_without_gpu_is_refused_in_one_line(train, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused(train("trainer=one_gpu"), "trainer.accelerator=gpu: there is no GPU here", "trainer=cpu")
    said = train("trainer=ddp", "trainer.devices=2", "grpo.prompts_per_step=2")
    refused(said, "trainer.accelerator=gpu: there is no GPU here", "trainer=cpu")


def test_a_machine_without_flash_attention_is_refused_in_one_line(train):
    refused(
        train("policy.attention=flash_attention_2"), "policy.attention=flash_attention_2 needs", "policy.attention=sdpa"
    )


def test_the_base_and_the_adapter_that_all_others_were_made_from_are_taken(copies, small, run_command, tmp_path):
    place = [f"runs_dir={tmp_path}/runs", "grpo.max_steps=1", "grpo.sampling.max_new_tokens=8"]
    run_command(*small, "stage=grpo1", *place, f"policy.path={copies}/base", f"init_adapter={copies}/adapter")
    assert (tmp_path / "runs/default/grpo1/adapter" / ADAPTER_FILE).is_file()
