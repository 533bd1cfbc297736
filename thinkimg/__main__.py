"""Command line for `python -m thinkimg`."""

import os
import sys

# With -m the working directory is the first place for imports: a file such as random.py would stand in for a library's.
if sys.path[0] == os.getcwd():
    sys.path.append(sys.path.pop(0))

from thinkimg.cli.main import main  # noqa: E402

main()
