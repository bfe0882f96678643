"""Build from Debian's packages what the Dockerfile and the compose file fetch from a registry of images.

They are for an engine that reaches no registry. `python` brings Debian's Python and this machine's settings
of pip; `postgres` knows of the official image's entrypoint what the compose file uses.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from docker_engine import KEYRING, MIRROR, Engine, Unavailable

CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PYTHON = f"""
FROM stand-in:bare
COPY certificates {CERTIFICATES}
COPY wheels/ /opt/wheels/
RUN ln -sf python3 /usr/bin/python
ENV PIP_FIND_LINKS=/opt/wheels PIP_CERT={CERTIFICATES} SSL_CERT_FILE={CERTIFICATES}
"""
POSTGRES = """
FROM stand-in:bare
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql \\
  && rm -rf /var/lib/apt/lists/* && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/
COPY --chmod=755 entrypoint /usr/local/bin/stand-in-entrypoint
ENV PGDATA=/var/lib/postgresql/data
VOLUME /var/lib/postgresql/data
STOPSIGNAL SIGINT
ENTRYPOINT ["stand-in-entrypoint"]
"""
ENTRYPOINT = """#!/bin/sh
set -eu
as() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }
mkdir -p "$PGDATA" /var/run/postgresql
chown postgres: "$PGDATA" /var/run/postgresql
chmod 700 "$PGDATA"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  cat "$POSTGRES_PASSWORD_FILE" > /tmp/password && chown postgres: /tmp/password
  as initdb --encoding=UTF8 --locale=C.UTF-8 --auth-host=scram-sha-256 --username=postgres \\
    --pwfile=/tmp/password > /dev/null
  rm /tmp/password
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
fi
exec setpriv --reuid postgres --regid postgres --init-groups postgres -c listen_addresses='*'
"""


def build_stand_ins(engine: Engine, folder: Path) -> None:
    """Build the images that the engine lacks. Raises Unavailable."""
    wanted = {"python:3.11-slim-bookworm": PYTHON, "postgres:17-bookworm": POSTGRES}
    have = engine.docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
    if wanted.keys() <= set(have):
        return
    _import_debian(engine, folder)
    _copy_settings_of_pip(folder)
    (folder / "entrypoint").write_text(ENTRYPOINT, encoding="utf-8")
    for tag, text in wanted.items():
        (folder / "Dockerfile").write_text(text, encoding="utf-8")
        engine.docker("build", "--quiet", "--tag", tag, str(folder))


def _import_debian(engine: Engine, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "debian.tar"
    lean = [f"--dpkgopt=path-exclude=/usr/share/{place}/*" for place in ("doc", "man", "locale")]
    packages = "--include=ca-certificates,python3,python3-venv"
    done = subprocess.run(
        [
            *("mmdebstrap", "--variant=minbase", "--mode=root", f"--keyring={KEYRING}"),
            *(*lean, '--aptopt=APT::Sandbox::User "root"', packages, "bookworm", str(archive), MIRROR),
        ],
        env=engine.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"mmdebstrap makes no base image: {done.stderr.strip()[-300:]}")
    engine.docker("import", str(archive), "stand-in:bare")
    archive.unlink()


def _copy_settings_of_pip(folder: Path) -> None:
    """Give the build the certificates and the folder of wheels that pip uses on this machine, if it does."""
    shutil.copy(os.environ.get("SSL_CERT_FILE", CERTIFICATES), folder / "certificates")
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    (wheels / ".keep").touch()
    for place in map(Path, os.environ.get("PIP_FIND_LINKS", "").split()):
        for wheel in place.glob("torch-*.whl") if place.is_dir() else []:
            shutil.copy(wheel, wheels)
