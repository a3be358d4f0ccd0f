"""``python -m tests.emulator address pytest …`` runs tests under a sanitizer."""

import os
import sys

from . import sanitized

command = sanitized(sys.argv[1], sys.executable, "-m", *sys.argv[2:])
os.execvp(command[0], command)
