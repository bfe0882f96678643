"""Make the users, databases and buckets of the services that share a PostgreSQL and an object store.

    python -m ratchet.services.stores --databases mlflow prefect --buckets mlflow dvc

PostgreSQL is reached as libpq's variables say (PGHOST, PGUSER, PGPASSFILE), the store as boto3's do
(AWS_ENDPOINT_URL_S3, AWS_SHARED_CREDENTIALS_FILE). A database belongs to a user of the same name, whose
password is in the file NAME_pgpass of --secrets. What is there already stays, except for passwords: they are
set anew, so that a changed file takes effect. Needs the extra `store`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ratchet.errors import ConfigError, RatchetError, ServiceError


def make_database(server: Any, name: str, password: str) -> None:
    """Make the user `name` and a database that nobody else may connect to.

    `server` is a connection of psycopg in autocommit mode, as a superuser.
    """
    from psycopg import sql

    user = sql.Identifier(name)
    # The server gets the hash, so its log can never show the password.
    hashed = server.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
    if not server.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name]).fetchone():
        server.execute(sql.SQL("CREATE ROLE {} LOGIN").format(user))
    server.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(user, sql.Literal(hashed)))
    if not server.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
        server.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(user, user))
    server.execute(sql.SQL("REVOKE CONNECT, TEMPORARY ON DATABASE {} FROM PUBLIC").format(user))


def make_bucket(store: Any, name: str) -> None:
    """Make a bucket; `store` is boto3's client for S3."""
    if name not in {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}:
        store.create_bucket(Bucket=name)


def read_password(path: Path) -> str:
    """Read the password of a file in the form of ~/.pgpass. Raises ConfigError."""
    try:
        fields = path.read_text(encoding="utf-8").strip().split(":")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", remedy="docker/make-secrets makes it"
        ) from None
    if len(fields) != 5 or not fields[4]:
        raise ConfigError(f"{path} is not host:port:database:user:password", remedy="docker/make-secrets")
    return fields[4]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m ratchet.services.stores")
    parser.add_argument("--databases", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--buckets", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--secrets", type=Path, default=Path("/run/secrets"), help="folder of NAME_pgpass")
    given = parser.parse_args(arguments)
    passwords = {name: read_password(given.secrets / f"{name}_pgpass") for name in given.databases}
    _make_databases(passwords)
    _make_buckets(given.buckets)


def _make_databases(passwords: dict[str, str]) -> None:
    if not passwords:
        return
    import psycopg

    try:
        with psycopg.connect(dbname="postgres", autocommit=True) as server:
            for name, password in passwords.items():
                make_database(server, name, password)
    except psycopg.Error as error:
        raise ServiceError(
            f"PostgreSQL: {str(error).strip()}", remedy="PGHOST, PGUSER and PGPASSFILE name a superuser?"
        ) from None


def _make_buckets(names: list[str]) -> None:
    if not names:
        return
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        store = boto3.client("s3", region_name="us-east-1")
        for name in names:
            make_bucket(store, name)
    except (BotoCoreError, ClientError) as error:
        raise ServiceError(
            f"the object store: {error}",
            remedy="AWS_ENDPOINT_URL_S3 and AWS_SHARED_CREDENTIALS_FILE name its admin?",
        ) from None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RatchetError as fault:
        sys.exit(str(fault))
