"""`python -m tartvg.tracking`: see `tartvg.tracking.dashboard`."""

import sys

from tartvg.launch.terminal import print_anything
from tartvg.tracking.dashboard import main

if __name__ == "__main__":
    print_anything()
    sys.exit(main())
