"""The bases that ship: small, safe, loaded like any other, and as careless as they are said to be."""

import json

import pytest

from experiments.tiny_base.model import SPECIAL_TOKENS
from tartvg.policy.loading import embedded_path

BASES = ["tiny", "tiny3"]


@pytest.mark.parametrize("base", BASES)
def test_it_is_small_and_holds_no_pickle(base):
    files = [p for p in embedded_path(base).iterdir() if p.is_file()]
    names = {p.name for p in files}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= names
    assert sum(p.stat().st_size for p in files) < 5 * 2**20
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl", ".py"))]


@pytest.mark.parametrize("base", BASES)
def test_it_is_a_qwen_with_qwens_special_tokens(base):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_path(base))
    model = AutoModelForImageTextToText.from_pretrained(embedded_path(base))
    assert model.config.model_type == {"tiny": "qwen2_5_vl", "tiny3": "qwen3_vl"}[base]
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert all(tokenizer.encode(t, add_special_tokens=False).__len__() == 1 for t in SPECIAL_TOKENS)
    assert model.config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert model.config.text_config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_it_can_do_better_than_it_does(run_command, tmp_path):
    """15 to 35 % of its samples are valid, and its best of eight is far better than its habit."""
    run_command(
        "stage=evaluate", "evaluate.policies=[base]", "evaluate.num_samples=8", f"runs_dir={tmp_path}", "name=r",
        "tracking.mode=off", "trainer.progress_bar=false", "trainer.num_threads=1",
        f"dataset.root={tmp_path}/data", "dataset.planted.num_train=1", "dataset.planted.num_val=1",
    )  # fmt: skip
    scores = json.loads((tmp_path / "r/evaluate/base/scores.json").read_text())
    assert scores["num_queries"] == 120
    assert scores["valid_rate"]["low"] >= 0.15 and scores["valid_rate"]["high"] <= 0.35
    assert scores["oracle_iou"] > scores["miou"]["value"] + 0.15
