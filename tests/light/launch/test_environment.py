"""What a shell leaves behind: variables of a launcher that is gone, and a terminal that knows few letters."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tartvg.config import SettingError
from tartvg.launch.job import launch
from tartvg.launch.processes import LAUNCHED, is_follower, is_started, refuse_leftovers
from tartvg.launch.signals import SIGNALS

ROOT = Path(__file__).parents[3]
WHOLE = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `launch` changes in its process, as it was before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    for name in (*LAUNCHED, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"RANK": "3"}, "RANK=3 in the environment, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: unset RANK"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 in the environment, but not RANK, MASTER_ADDR, MASTER_PORT: unset WORLD_"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 WORLD_SIZE=2 in the environment, but not MASTER_ADDR, MASTER_PORT"),
        ({**WHOLE, "RANK": "8"}, "RANK must be below WORLD_SIZE; unset RANK WORLD_SIZE if no launcher started this"),
        ({**WHOLE, "RANK": "x"}, "RANK=x WORLD_SIZE=8 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 in the environment"),
    ],
)
def test_a_part_of_a_launcher_is_refused_and_never_silently(
    left: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise AssertionError("it ran")

    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert launch(main) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and said in shown and len(shown.splitlines()) == 1


def test_a_whole_launcher_and_none_at_all_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_leftovers()
    assert not is_started() and not is_follower()
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    refuse_leftovers()
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    refuse_leftovers()
    assert is_started() and is_follower()


def test_a_stray_rank_does_not_silence_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise SettingError("grpo.lr must be > 0")

    monkeypatch.setenv("RANK", "3")
    assert launch(main) == 2 and "RANK=3" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert launch(main) == 2 and capsys.readouterr().err == "error: grpo.lr must be > 0\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_knows_few_letters_gets_escapes(encoding: str) -> None:
    code = (
        "import subprocess, sys\nfrom tartvg.launch.job import launch\n"
        "def main():\n    print('\\u2500 \\u4e2d', flush=True)\n"
        "    subprocess.run([sys.executable, '-c', 'print(chr(0x4e2d))'], check=True)\n"
        "sys.argv = ['run.py']\nsys.exit(launch(main))\n"
    )
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = "\u2500 \u4e2d\n\u4e2d\n" if encoding == "utf-8" else "\\u2500 \\u4e2d\n\\u4e2d\n"
    assert done.stdout.decode(encoding) == expected


def test_a_command_of_its_own_prints_on_such_a_terminal_too() -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tartvg.tracking", "--print", "--dataset", "\u4e2d"]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"eval/\\u4e2d/miou" in done.stdout
