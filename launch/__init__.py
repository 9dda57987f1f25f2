"""How a run is started: the quickstart script and the experiments that come with the testbed."""

import platform
import sys

# Every Python has to understand this file: older ones do not understand the others.
if sys.version_info < (3, 11):  # noqa: UP036 - so that they are told
    sys.stderr.write(
        "error: found Python "
        + platform.python_version()
        + " ("
        + sys.executable
        + "), expected 3.11 or newer: PYTHON=python3.12 launch/quickstart makes a .venv\n"
    )
    sys.exit(2)
