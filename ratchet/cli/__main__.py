import os

from ratchet.cli.main import main

os.environ.setdefault("PYTHONUNBUFFERED", "1")
main()
