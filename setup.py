"""Put run.py and its configuration into the package of a wheel; everything else about the build is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildPy(build_py):
    """As usual, then what `tartvg.config.place` looks for inside an installed package."""

    def run(self) -> None:
        """Copy the modules, then run.py and every YAML file below conf/, sweeps/ and experiments/."""
        super().run()
        if self.editable_mode:
            return
        root = Path(self.build_lib) / "tartvg" / "root"
        shutil.rmtree(root, ignore_errors=True)
        files = [HERE / "run.py"]
        for folder in ("conf", "sweeps", "experiments"):
            files += sorted((HERE / folder).rglob("*.yaml"))
        for file in files:
            target = root / file.relative_to(HERE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildPy})
