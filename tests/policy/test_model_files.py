"""A base in the Hub's cache, without a network. What is refused is in tests/stages/test_refused_models.py."""

import shutil

import huggingface_hub.constants
import pytest

from tartvg.config import PolicyConfig, SettingError
from tartvg.policy.loading import base_folder, load_base
from tartvg.policy.model_files import hub_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(untrained_base, tmp_path, monkeypatch):
    """The files of `someone/base` as `hf download` leaves them: links to blobs."""
    repository = tmp_path / "models--someone--base"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(untrained_base.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (folder / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_folder.cache_clear()
    yield folder
    hub_folder.cache_clear()


def test_a_base_in_the_cache_is_used_without_a_network(snapshot):
    settings = PolicyConfig(name="t", path="someone/base")
    assert base_folder(settings) == snapshot
    model, tokenizer = load_base(settings)
    assert len(tokenizer) == model.config.get_text_config().vocab_size


def test_a_base_whose_download_was_cut_is_refused(snapshot):
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(SettingError, match=r"^policy\.path=someone/base: .*model\.safetensors"):
        base_folder(PolicyConfig(name="t", path="someone/base"))


def test_a_commit_that_the_cache_lacks_is_refused(snapshot):
    with pytest.raises(SettingError, match=r"^policy\.path=someone/base: there is no such folder, and the Hub"):
        base_folder(PolicyConfig(name="t", path="someone/base", revision="f" * 40))
