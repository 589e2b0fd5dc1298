"""`python -m tartvg.tracking`: see `tartvg.tracking.dashboard`."""

import sys

from tartvg.tracking.dashboard import main

if __name__ == "__main__":
    sys.exit(main())
