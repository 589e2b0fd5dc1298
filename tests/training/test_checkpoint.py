"""Checkpoints: whole or not at all, checked, pruned; on a full disk; and what a pickle gets."""

import hashlib
import json
import os
import pickle
import resource
import subprocess

import pytest
import torch
from forking import call
from helpers.checkpoints import names, save_step

from tartvg.config import SettingError
from tartvg.policy.loading import ADAPTER_FILE as WEIGHTS
from tartvg.training.checkpoint import MANIFEST, OPTIMIZER, check_files, latest_checkpoint


def test_what_was_saved_comes_back(tmp_path):
    save_step(tmp_path, 7)
    found = latest_checkpoint(tmp_path)
    assert (found.step, found.counters) == (7, {"skipped_in_row": 7})
    assert torch.equal(found.weights["lora_A"], torch.full((4,), 7.0))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))])
    optimizer.load_state_dict(found.optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], torch.full((4,), 0.1))
    assert latest_checkpoint(tmp_path / "nowhere") is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "one bit of a weight": (lambda p: flip(p / WEIGHTS), "its checksum differs"),
    "one bit of the optimiser": (lambda p: flip(p / OPTIMIZER), "its checksum differs"),
    "cut short": (lambda p: os.truncate(p / OPTIMIZER, 10), "10 bytes instead of"),
    "a file lost": (lambda p: (p / WEIGHTS).unlink(), "No such file"),
    "the manifest lost": (lambda p: (p / MANIFEST).unlink(), "No such file"),
    "the manifest cut": (lambda p: os.truncate(p / MANIFEST, 30), "JSONDecodeError"),
    "the manifest of another": (lambda p: p.rename(p.with_name("step_000003")), "belongs to another"),
    "a manifest that leads out": (
        lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace(f'"{WEIGHTS}"', f'"../{WEIGHTS}"')),
        "belongs to another",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, capsys, damage):
    save_step(tmp_path, 1)
    hurt, message = DAMAGES[damage]
    hurt(save_step(tmp_path, 2))
    assert latest_checkpoint(tmp_path).step == 1
    said = capsys.readouterr().out
    assert "is damaged" in said and message in said and "using the one before" in said


def test_all_damaged_starts_anew_and_says_so(tmp_path, capsys):
    flip(save_step(tmp_path, 1) / WEIGHTS)
    assert latest_checkpoint(tmp_path) is None
    assert "starts from its first step" in capsys.readouterr().out


def test_old_ones_go_but_a_damaged_one_pushes_no_sound_one_out(tmp_path):
    for step in range(1, 5):
        save_step(tmp_path, step)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    flip(tmp_path / "step_000004" / WEIGHTS)
    save_step(tmp_path, 6)
    assert names(tmp_path) == ["step_000003", "step_000006"]
    for step in (7, 8, 9):
        save_step(tmp_path, step, kept=3)
    assert names(tmp_path) == ["step_000007", "step_000008", "step_000009"]


def test_what_a_killed_writer_left_is_removed_and_never_read(tmp_path):
    save_step(tmp_path, 1)
    (tmp_path / ".step_000002.4711").mkdir()
    (tmp_path / ".step_000002.4711" / WEIGHTS).write_bytes(b"half")
    assert latest_checkpoint(tmp_path).step == 1
    save_step(tmp_path, 2)
    assert names(tmp_path) == ["step_000001", "step_000002"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_a_pickle_is_refused_by_name_and_does_not_run(tmp_path, form, name):
    """With checksums that match: whoever plants a file can also write its checksum."""
    save_step(tmp_path, 1)
    path, trace = save_step(tmp_path, 2), tmp_path / "ran"
    value = Malicious(str(trace))
    torch.save(value, path / name) if form == "torch" else (path / name).write_bytes(pickle.dumps(value))
    content = (path / name).read_bytes()
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SettingError, match=r"step_000002: refused.*run code when they are read"):
        latest_checkpoint(tmp_path)
    assert not trace.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.bin", "last.ckpt"])
def test_an_adapter_that_is_a_pickle_is_refused(tmp_path, name, small, run_command):
    torch.save({"w": torch.zeros(1)}, tmp_path / name)
    target = tmp_path if name.endswith(".bin") else tmp_path / name
    result = run_command(*small, "stage=grpo1", f"init_adapter={target}", f"runs_dir={tmp_path}/runs", check=False)
    assert result.returncode == 2
    assert str(target) in result.stderr and "are refused" in result.stderr and "Traceback" not in result.stderr


def save_too_much(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save_step(folder, 2, size=50_000)


@pytest.mark.xdist_group("forked")
def test_a_file_that_may_not_grow_leaves_the_last_one_intact(tmp_path):
    """The system itself refuses the write (RLIMIT_FSIZE), in a process of its own."""
    folder = tmp_path / "checkpoints"
    save_step(folder, 1)

    assert call(save_too_much, folder, output=tmp_path / "said").wait(60) == 1
    last = (tmp_path / "said").read_text().strip().splitlines()[-1]
    assert "the checkpoint of step 2 cannot be written" in last and "File too large" in last
    assert "the last one, step_000001, is intact" in last
    assert names(folder) == ["step_000001"] and check_files(folder / "step_000001")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB of its own. Only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_says_so_and_leaves_the_last_one_intact(small_disk):
    folder = small_disk / "checkpoints"
    save_step(folder, 1)
    with pytest.raises(SettingError, match=r"No space left on device .*step_000001, is intact.*same command"):
        save_step(folder, 2, size=300_000)
    assert names(folder) == ["step_000001"]
    assert latest_checkpoint(folder).step == 1
    assert save_step(folder, 2).is_dir()
