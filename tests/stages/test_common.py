"""What stages say about queries with several windows, and which queries of a mix they ask first."""

import subprocess
from pathlib import Path

from tartvg.config import Truth
from tartvg.stages import folder
from tartvg.stages.common import first_of, say_windows
from tartvg.types import GroundingSample, Prompt, Span


def prompt(name: str, num_windows: int = 1, source: str = "") -> Prompt:
    windows = tuple(Span(10 * i, 10 * i + 5) for i in range(num_windows))
    return Prompt(GroundingSample(name, Path("v.mp4"), "q", windows, 60.0, "train", source=source), "")


def test_a_stage_says_how_many_queries_have_several_windows(capsys):
    say_windows("grpo1", [prompt("a"), prompt("b")], Truth.best)
    assert capsys.readouterr().out == ""
    say_windows("grpo1", [prompt("a"), prompt("b", 2), prompt("c", 3)], Truth.best)
    assert capsys.readouterr().out == (
        "grpo1: 2 of 3 queries have several windows; "
        "reward.truth=best compares each answer with the window of highest soft IoU\n"
    )


def test_the_first_queries_of_a_mix_are_of_all_its_parts():
    parts = [*[prompt(f"a{i}", source="a") for i in range(5)], *[prompt(f"b{i}", source="b") for i in range(2)]]
    names = {limit: [p.sample.sample_id for p in first_of(parts, limit)] for limit in (3, 6, 99, None)}
    assert names[3] == ["a0", "a1", "b0"]
    assert names[6] == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert names[99] == names[None] == ["a0", "a1", "a2", "a3", "a4", "b0", "b1"]
    alone = [prompt(str(i)) for i in range(5)]
    assert first_of(alone, 3) == alone[:3]


def test_the_commit_of_another_project_around_an_installed_package_is_not_ours(tmp_path, monkeypatch):
    assert len(folder.git_state().removesuffix("+changes")) == 40
    package = tmp_path / ".venv" / "tartvg" / "stages"
    package.mkdir(parents=True)
    (package / "folder.py").touch()
    (tmp_path / "theirs.txt").touch()
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "theirs.txt"], [*who, "commit", "-q", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(folder, "__file__", str(package / "folder.py"))
    assert folder.git_state() == "unknown"
