"""The wheel in an empty environment, away from the source: both commands, the configuration and the embedded policy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers.settings import ROOT, files
from helpers.videos import write_usual

pytestmark = pytest.mark.slow
DATA = os.environ.get("TARTVG_TEST_DATA")


def alone() -> dict[str, str]:
    """The environment without what leads to the source tree, where pip would find the package installed."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TARTVG_ROOT")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the committed files and those that git does not ignore, with the setuptools that is here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, *build], check=True, cwd=out, env=alone())
    (found,) = out.glob("tartvg-*-py3-none-any.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder of an environment that holds the wheel, and sees what it requires where that is here."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-compile", str(wheel)]
    subprocess.run([sys.executable, *install], check=True, cwd=folder, env=alone())
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its own .pth files are not read
    return folder / "bin"


def called(installed: Path, folder: Path, command: str, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [str(installed / command), *arguments], cwd=folder, env=alone(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_it_holds_the_package_its_configuration_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"tartvg", next(top for top in tops if top.endswith(".dist-info"))}
    for folder in ("conf", "sweeps", "experiments"):
        assert {f"tartvg/root/{folder}/{choice}.yaml" for choice in files(folder)} <= names
    assert {"tartvg/root/run.py", "tartvg/assets/tiny/model.safetensors", "tartvg/assets/export/answer.py"} <= names
    assert {f"tartvg/{p.relative_to(ROOT / 'tartvg').as_posix()}" for p in (ROOT / "tartvg").rglob("*.py")} <= names


def test_it_is_the_wheel_that_runs(installed: Path, tmp_path: Path) -> None:
    said = called(installed, tmp_path, "python", "-c", "import tartvg, torch; print(tartvg.__file__)")
    assert Path(said.strip()).is_relative_to(installed.parent)


def test_every_group_is_found_and_a_wrong_choice_is_named(installed: Path, tmp_path: Path) -> None:
    said = called(installed, tmp_path, "tartvg", "--cfg", "job", "reward=tar1", "experiments=stage_order/sft_grpo")
    assert "stage_order" in said and "gamma: 0" in said
    refused = called(installed, tmp_path, "tartvg", "reward=tarr", code=2)
    assert refused.startswith("error: reward=tarr: there is no such choice; did you mean tar?")
    mix = ("stage=check_data", "dataset=mix", "dataset.parts={nothing: 1}")
    assert "charades_sta" in called(installed, tmp_path, "tartvg", *mix, code=2)
    axes = called(installed, tmp_path, "python", "-m", "tartvg.launch.sweep_files", "anchors")
    assert "program: run.py" in axes and "three" in axes


def test_it_grounds_with_the_embedded_policy(installed: Path, tmp_path: Path) -> None:
    video = write_usual(tmp_path)
    said = called(
        installed, tmp_path, "tartvg", "stage=ground", f"video={video}", "query=the red circle",
        "grpo.sampling.max_new_tokens=40", "trainer.num_threads=1",
    )  # fmt: skip
    assert "policy: embedded:tiny" in said and (tmp_path / "runs/default/ground/usual_the_red_circle.png").is_file()


@pytest.mark.skipif(DATA is None, reason="TARTVG_TEST_DATA is not set")
def test_the_scorer_gives_the_published_numbers(installed: Path, tmp_path: Path) -> None:
    """QVHighlights' published predictions and metrics."""
    data, out = Path(str(DATA)) / "qvhighlights", tmp_path / "scores.json"
    called(
        installed, tmp_path, "tartvg-score", "--dataset", "qvhighlights", "--annotations",
        str(data / "highlight_val_release.jsonl"), "--predictions", str(data / "sample_val_preds.jsonl"),
        "--json", str(out),
    )  # fmt: skip
    published = json.loads((data / "sample_val_preds_metrics_raw.json").read_text())["full"]
    (found,) = json.loads(out.read_text())["files"]
    assert f"{100 * found['detection']['average']:.2f}" == f"{published['MR-mAP']['average']:.2f}"
    for threshold in ("0.5", "0.7"):
        assert f"{100 * found['scorecard']['recall'][threshold]['value']:.2f}" == f"{published['MR-R1'][threshold]:.2f}"
