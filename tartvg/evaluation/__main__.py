"""`python -m tartvg.evaluation`: annotations and predictions in, scores out."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, where a json.py is somebody's own and not Python's
    from tartvg.evaluation.cli import main
    from tartvg.launch.terminal import print_anything

    print_anything()
    sys.exit(main())
