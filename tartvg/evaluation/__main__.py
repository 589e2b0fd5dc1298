"""`python -m tartvg.evaluation`: annotations and predictions in, scores out."""

import sys

from tartvg.evaluation.cli import main

if __name__ == "__main__":
    sys.exit(main())
