"""``python -m emulator thread|address pytest …`` runs tests under a sanitizer.

From within ``tests/``.
"""

import os
import sys

from . import sanitized

command = sanitized(sys.argv[1], sys.executable, "-m", *sys.argv[2:])
os.execvp(command[0], command)
