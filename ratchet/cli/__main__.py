"""Run `python -m ratchet.cli`; stages that it starts print line by line, as in a terminal."""

import os

from ratchet.cli.main import main

os.environ.setdefault("PYTHONUNBUFFERED", "1")
main()
