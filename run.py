"""The one command: composes the settings from conf/ and runs the stages.

python run.py                            the whole method on the embedded model and data
python run.py stage=grpo1 reward=tar1    one stage, another reward
python run.py --help                     the groups and their choices
python run.py --cfg job                  every setting and its value
"""

import os
import sys
from pathlib import Path

# conf/config.yaml finds experiments/ and sweeps/ through it, from whatever directory the command is given in.
os.environ["TARTVG_ROOT"] = str(Path(__file__).resolve().parent)

import hydra
from omegaconf import DictConfig

from tartvg.config import register
from tartvg.launch.job import finish, job, launch
from tartvg.launch.processes import needs_processes, run_processes

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one job; a sweep calls this once per job."""
    with job(cfg) as config:
        if needs_processes(config):
            finish(run_processes(config.trainer.devices))
            return
        from tartvg import stages  # torch comes with it: not before it is needed

        finish(stages.run(config))


if __name__ == "__main__":
    sys.exit(launch(main))
