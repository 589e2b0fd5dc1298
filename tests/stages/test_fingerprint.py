"""The hash of files in a stage's key: of their content, made once, on rank 0."""

import os

import pytest
from forking import call_ranks

from tartvg.config import Strategy, TrainerConfig
from tartvg.stages.keys import fingerprint
from tartvg.training import distributed


def changed(path, text, seconds_ago):
    path.write_text(text)
    then = path.stat().st_mtime - seconds_ago
    os.utime(path, (then, then))
    return then


def test_files_that_have_not_changed_are_not_read_again(tmp_path):
    """Gigabytes: the base is an input of every stage. Here the content changes behind an old time, which shows it."""
    weights = tmp_path / "model.safetensors"
    then = changed(weights, "one", 60)
    before = fingerprint(tmp_path)
    weights.write_text("two")
    os.utime(weights, (then, then))
    assert fingerprint(tmp_path) == before, "the size and the time are the same"
    changed(weights, "two", 50)
    other = fingerprint(tmp_path)
    assert other != before, "the time is another"
    changed(weights, "four", 50)
    assert fingerprint(tmp_path) not in (before, other), "the size is another"
    (tmp_path / "config.json").touch()
    assert fingerprint(tmp_path) not in (before, other), "there is one more file"


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path):
    """It may change again before the clock of its file system moves."""
    file = tmp_path / "traces.jsonl"
    then = changed(file, "one", 0)
    before = fingerprint(file)
    file.write_text("two")
    os.utime(file, (then, then))
    assert fingerprint(file) != before


def hash_as_a_rank(path, folder):
    distributed.init(TrainerConfig(devices=2, strategy=Strategy.ddp))
    (folder / str(distributed.rank())).write_text(fingerprint(path))
    distributed.destroy()


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_rank_0_alone_reads_the_files(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_text("one")
    assert call_ranks(2, hash_as_a_rank, weights, tmp_path, output=tmp_path / "said").wait(60) == 0
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == [fingerprint(weights), ""]
