"""Random and guided damage to annotation files, predictions and settings: every refusal is a documented one."""

import json
import random
import time

import pytest
from fuzzing import bent, fuzz_annotations, row_of
from helpers.settings import composed
from hypothesis import given, settings
from hypothesis import strategies as st

from tartvg.config import DatasetName, SettingError
from tartvg.data.annotations import ReadOptions
from tartvg.data.datasets import SOURCES
from tartvg.data.parsing import parse_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def test_a_thousand_files():
    fuzz_annotations(1000, seed=0)


def test_most_of_the_files_are_near_misses():
    """A fuzzer whose files are all nonsense tests the JSON parser only."""
    rng = random.Random(0)
    rows = [row_of(rng, DatasetName.jsonl) for _ in range(200)]
    changed = [bent(rng, row) for row in rows]
    assert all(isinstance(row, dict) and len(row) >= 3 for row in rows)
    assert sum(isinstance(row, dict) for row in changed) > 150
    assert sum(json.dumps(a) != json.dumps(b) for a, b in zip(rows, changed, strict=True)) > 150


@settings(max_examples=150, deadline=None)
@given(value=JSON, name=st.sampled_from([n for n in SOURCES if "planted" not in n.value]))
def test_any_json_is_read_or_refused_by_name(tmp_path_factory, value, name):
    path = tmp_path_factory.mktemp("any") / "f.json"
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    try:
        SOURCES[name].read([path], ReadOptions("test"))
    except ValueError as error:
        assert str(path) in str(error)


def test_repeated_keys_are_found_in_linear_time():
    pairs = ", ".join(f'"{i}": 0' for i in range(200_000))
    start = time.process_time()
    with pytest.raises(ValueError, match="'199999' is there twice"):
        parse_json(f'{{{pairs}, "199999": 1}}', "f")
    assert time.process_time() - start < 5


VALUES = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "[]", "{}", "x", "''"]),
)
NAMES = [
    "grpo.group_size", "grpo.lr", "grpo.kl_coef", "grpo.sampling.temperature", "grpo.sampling.max_new_tokens",
    "reward.beta", "anchors.count", "anchors.max_count", "policy.lora.rank", "policy.frames.fps",
    "policy.frames.max_frames", "policy.logit_chunk", "trainer.devices", "trainer.checkpoint_minutes",
    "trainer.checkpoints_kept", "trainer.max_skipped_steps", "trainer.memory_gib", "dataset.num_queries",
    "dataset.planted.num_train", "seed", "name", "sft.epochs", "evaluate.batch_size", "tracking.tags",
]  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(NAMES), value=VALUES)
def test_any_value_of_a_setting_is_taken_or_refused_by_name(name, value):
    check_setting(name, value)


@pytest.mark.campaign
@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), value=VALUES)
def test_any_value_of_a_setting_at_length(name, value):
    check_setting(name, value)


def check_setting(name, value):
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from tartvg.config.errors import explain

    try:
        composed(f"{name}={value}")
    except (SettingError, OmegaConfBaseException, HydraException) as error:
        assert name.split(".")[-1] in explain(error)
