"""`python -m tartvg.evaluation`: annotations and predictions in, scores out."""

import sys

from tartvg.evaluation.cli import main
from tartvg.launch.terminal import print_anything

if __name__ == "__main__":
    print_anything()
    sys.exit(main())
