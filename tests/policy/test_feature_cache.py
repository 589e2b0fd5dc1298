"""Vision features on disk: whole or not at all, believed only when they fit, and never when the tower is trained."""

import dataclasses
import os
import resource
import signal
import time

import pytest
import torch
from forking import call

from tartvg.config import FramesConfig, LoraConfig, PolicyConfig, Precision, SamplingConfig
from tartvg.data.planted import encode
from tartvg.data.scene import RULES, make_scene
from tartvg.policy.disk_cache import DiskCache, tower_identity
from tartvg.policy.features import VideoFeatures, video_key
from tartvg.policy.policy import Policy, token_batch
from tartvg.types import GroundingSample, Prompt, Span

FRAMES = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)


def features(seed=0, tokens=64, dtype=torch.float32):
    made = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(seed))
    return VideoFeatures(made.to(dtype), (tokens // 4, 4, 4), 1.0 + seed, 14.5)


def same(a, b):
    facts = [(f.grid_thw, f.seconds_per_grid, f.duration, f.embeddings.dtype) for f in (a, b)]
    return facts[0] == facts[1] and torch.equal(a.embeddings, b.embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_put_is_what_comes_back(tmp_path, dtype):
    cache = DiskCache(tmp_path / "new" / "folder", 1 / 1024, "tower")
    assert cache.get("a") is None
    cache.put("a", features(3, dtype=dtype))
    assert same(DiskCache(cache.folder, 1 / 1024, "tower").get("a"), features(3, dtype=dtype))
    assert cache.get("b") is None and DiskCache(cache.folder, 1 / 1024, "another tower").get("a") is None
    assert [p.suffix for p in cache.folder.iterdir()] == [".safetensors"]


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "empty": lambda c: b"",
    "cut": lambda c: c[: len(c) // 2],
    "one byte short": lambda c: c[:-1],
    "a bit of a feature": lambda c: flip(c, len(c) - 100),
    "a digit of the duration": lambda c: c.replace(b"14.5", b"14.6", 1),
    "a digit of the grid": lambda c: c.replace(b"[[16, 4", b"[[64, 1", 1),
    "not safetensors": lambda c: b"not what it says" * 100,
    "another format": lambda c: c.replace(b"embeddings", b"embeddingz", 1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_entry_is_dropped_and_written_again(tmp_path, case, capsys):
    cache = DiskCache(tmp_path, 1 / 1024, "tower")
    cache.put("a", features())
    path = cache.path_of("a")
    spoilt = DAMAGE[case](path.read_bytes())
    assert spoilt != path.read_bytes()
    path.write_bytes(spoilt)
    assert cache.get("a") is None
    assert "damaged" in capsys.readouterr().out and not path.exists()
    cache.put("a", features())
    assert same(cache.get("a"), features())


def test_an_entry_under_anothers_name_is_not_believed(tmp_path):
    cache = DiskCache(tmp_path, 1 / 1024, "tower")
    cache.put("a", features(1))
    cache.path_of("a").rename(cache.path_of("b"))
    assert cache.get("b") is None


def test_the_least_recently_used_entries_go_first(tmp_path):
    cache = DiskCache(tmp_path, 1 / 1024, "tower")
    size = 700  # tokens of 512 bytes: three entries exceed 1 MiB
    for age, key in ((40, "a"), (30, "b")):
        cache.put(key, features(tokens=size))
        os.utime(cache.path_of(key), (time.time() - age,) * 2)
    assert cache.get("a") is not None  # now younger than b
    cache.put("c", features(tokens=size))
    assert [cache.path_of(k).exists() for k in "abc"] == [True, False, True]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 2**20
    cache.put("too large", features(tokens=3000))
    assert cache.get("too large") is None and cache.get("c") is not None


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "below", 1 / 1024, "tower")
    cache.put("a", features())
    cache.put("b", features())
    assert cache.get("a") is None
    assert capsys.readouterr().out.count("going on without writing") == 1


def hammer(folder, ready, go):
    cache, found = DiskCache(folder, 1 / 1024, "tower"), 0
    ready.touch()
    while not go.exists():
        time.sleep(0.001)
    for _ in range(150):
        for key in range(4):  # four entries of 0.34 MiB in a folder of 1 MiB: reads, writes and evictions cross
            known = cache.get(key)
            found += known is not None
            assert known is None or same(known, features(key, 700)), key
            if known is None:
                cache.put(key, features(key, 700))
    print(found)


@pytest.mark.slow
@pytest.mark.xdist_group("forked")
def test_two_processes_fill_it_at_the_same_time(tmp_path):
    said, ready, go = ([tmp_path / f"{name}{i}" for i in range(2)] for name in ("said", "ready", "go"))
    both = [call(hammer, tmp_path / "cache", ready[i], go[0], output=said[i]) for i in range(2)]
    while not all(file.exists() for file in ready):
        assert [process.poll() for process in both] == [None, None]
    go[0].touch()
    for process, file in zip(both, said, strict=True):
        code, out = process.wait(120), file.read_text()
        assert code == 0, out
        assert "damaged" not in out and int(out) > 0
    left = list((tmp_path / "cache").iterdir())
    assert 2 <= len(left) <= 3 and all(p.suffix == ".safetensors" for p in left)


def killed(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process when it writes past the limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    DiskCache(folder, 1 / 1024, "tower").put("a", features(tokens=700))


@pytest.mark.xdist_group("forked")
def test_a_process_killed_in_the_middle_of_a_write_leaves_no_entry(tmp_path_factory, tmp_path):
    said = tmp_path_factory.mktemp("said") / "said"
    assert call(killed, tmp_path, output=said).wait(120) == -signal.SIGXFSZ, said.read_text()
    [half] = tmp_path.iterdir()
    assert half.stat().st_size == 100_000
    cache = DiskCache(tmp_path, 1 / 1024, "tower")
    assert cache.get("a") is None
    cache.put("a", features(tokens=700))
    assert same(cache.get("a"), features(tokens=700)) and half.exists()
    os.utime(half, (time.time() - 7200,) * 2)
    cache.put("b", features())
    assert not half.exists() and cache.get("b") is not None


# --- with a policy


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    encode(path, make_scene(1, RULES["planted"]))
    return path


@pytest.fixture
def make(untrained_base, tmp_path):
    """A policy with a disk cache, and its tower calls."""

    def make(**changes):
        settings = PolicyConfig(name="t", path=str(untrained_base), frames=FRAMES, lora=LoraConfig(rank=4))
        settings = dataclasses.replace(settings, feature_cache_dir=str(tmp_path / "cache"), **changes)
        policy, calls = Policy(settings), []
        policy.core.model.visual.register_forward_hook(lambda *_: calls.append(1))
        return policy, calls

    return make


def prompt(video, text="where is it"):
    return Prompt(GroundingSample("a", video, text, (Span(1, 2),), 14.0, "train"), text)


def test_a_second_run_never_calls_the_tower(make, video):
    first, calls = make()
    expected = first.prepare(prompt(video)).video
    assert len(calls) == 1
    second, calls = make()
    assert same(second.prepare(prompt(video)).video, expected)
    assert second.timer.seconds["decode"] == 0 and not calls
    third, calls = make(feature_cache_gib=0)  # RAM off: the disk serves every time
    assert [same(third.prepare(prompt(video, t)).video, expected) for t in ("x", "y")] == [True, True] and not calls


@pytest.mark.parametrize(
    "change",
    [
        dict(frames=dataclasses.replace(FRAMES, max_frames=8)),
        dict(frames=dataclasses.replace(FRAMES, fps=1.0)),
        dict(frames=dataclasses.replace(FRAMES, max_pixels=12544, min_pixels=12544)),
        dict(precision=Precision.bf16),
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_is_another_entry(make, video, change):
    make()[0].prepare(prompt(video))
    changed, calls = make(**change)
    got = changed.prepare(prompt(video)).video
    assert len(calls) == 1
    plain, _ = make(**change)
    plain.disk = None
    assert same(got, plain.prepare(prompt(video)).video)


def test_another_attention_kernel_is_another_tower(make):
    tower = make()[0].core.model.visual
    assert tower_identity(tower, "sdpa") == tower_identity(tower, "sdpa") != tower_identity(tower, "flash_attention_2")


def test_a_setting_without_influence_is_the_same_entry(make, video):
    make()[0].prepare(prompt(video))
    changed, calls = make(frames=dataclasses.replace(FRAMES, timeout_s=5.0), logit_chunk=3)
    changed.prepare(prompt(video))
    assert not calls


def test_another_file_or_another_tower_is_another_entry(make, video, tmp_path):
    moving = tmp_path / "moving.mp4"
    moving.write_bytes(video.read_bytes())
    first = make()[0].prepare(prompt(moving)).video
    encode(moving, make_scene(2, RULES["planted"]))
    policy, calls = make()
    second = policy.prepare(prompt(moving)).video
    assert len(calls) == 1 and not same(first, second)
    with torch.no_grad():
        next(policy.core.model.visual.parameters())[0] += 1
    assert policy._disk_cache().get(video_key(moving, FRAMES, "cpu")) is None
    assert same(policy.disk.get(video_key(moving, FRAMES, "cpu")), second)


def test_a_trained_tower_is_never_cached_and_says_so(make, video, tmp_path, capsys):
    policy, calls = make(lora=LoraConfig(rank=4, vision=True))
    assert "the vision tower is trained" in capsys.readouterr().out
    assert policy.disk is None and policy.is_tower_trainable
    for _ in range(2):
        item = policy.prepare(prompt(video))
    assert not calls and not policy.cache.entries and not (tmp_path / "cache").exists()
    frozen, _ = make()
    assert not frozen.is_tower_trainable and capsys.readouterr().out == ""

    batch = token_batch(policy.sample([item], 3, SamplingConfig(max_new_tokens=5), [0])[0], policy.device)
    assert len(calls) == 1
    logps = policy.logps(item, batch)
    assert len(calls) == 2  # the prompt is encoded anew in every pass, and still once for the group
    # a fresh adapter is the identity: the same numbers as a frozen tower's
    assert torch.allclose(logps, frozen.logps(frozen.prepare(prompt(video)), batch), atol=1e-5)
    logps.sum().backward()
    grads = {n: p.grad for n, p in policy.model.named_parameters() if p.requires_grad and "lora_B" in n}
    assert {n for n in grads if "visual" in n} and all(g is not None and g.norm() > 0 for g in grads.values())


def test_a_trained_tower_agrees_with_the_naive_path(make, video):
    policy, _ = make(lora=LoraConfig(rank=4, vision=True))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    item = policy.prepare(prompt(video))
    batch = token_batch(policy.sample([item], 3, SamplingConfig(max_new_tokens=5), [0])[0], policy.device)
    found = []
    for shared in (True, False):
        policy.settings = dataclasses.replace(policy.settings, shared_prefix=shared)
        policy.zero_grad()
        logps = policy.logps(item, batch)
        logps.sum().backward()
        found.append((logps.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])))
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-5
    assert (found[0][1] - found[1][1]).norm() <= 1e-5 * found[1][1].norm()
